"""Batches from latents: what is stored, nothing encoded; damaged examples left out, named and counted; resuming."""

import json

import latent_sets as sets
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from benchmarks import data as bench
from crcm_jax.data import pipeline, skipping
from crcm_jax.data.latents import LatentSource
from crcm_jax.errors import UserError
from crcm_jax.models.vae.pixels import PixelCodec

CODEC = PixelCodec(patch=1, channels=5)
"""Its latents have the sets' shape, and it has no say in anything else."""


def config(folder, text=sets.TEXT, **changes):
    data = dict(name="latents", path=str(folder), batch_size=2, seed=0, frames=3, height=2, width=4, threads=2)
    return ConfigDict({"data": data | changes, "text": {"length": text[0]}, "model": {"text_dim": text[1]}})


def stream(folder, text=sets.TEXT, rows=None, **changes):
    return iter(pipeline.make(config(folder, text, **changes), codec=CODEC, rows=rows))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def numbers(batches):
    """Which examples the batches hold, by their latents; text must belong to them."""
    known = {sets.example(i).latents.astype(np.float32).tobytes(): i for i in range(12)}
    found = []
    for batch in batches:
        for latents, text in zip(batch["latents"], batch["prompt"]["text"]):
            found.append(known[latents.tobytes()])
            np.testing.assert_array_equal(text, sets.example(found[-1]).text.astype(np.float32))
    return found


@pytest.fixture(scope="module", params=["tar", "array_record"])
def folder(request, tmp_path_factory):
    return sets.write(tmp_path_factory.mktemp("sets") / request.param, kind=request.param)


def test_batches_are_what_is_stored(folder):
    batches = take(stream(folder), 12)
    assert all(batch.keys() == {"latents", "prompt", "damaged"} for batch in batches)
    assert batches[0]["latents"].shape == (2, *sets.LATENTS) and batches[0]["prompt"]["text"].shape == (2, *sets.TEXT)
    assert all(x.dtype == np.float32 for batch in batches for x in (batch["latents"], batch["prompt"]["text"]))
    order = numbers(batches)
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert all((batch["damaged"] == 0).all() for batch in batches)


def test_both_formats_give_the_same_batches(tmp_path):
    orders = [numbers(take(stream(sets.write(tmp_path / k, kind=k)), 8)) for k in ("tar", "array_record")]
    assert orders[0] == orders[1]


def test_longer_clips_are_cut_and_shorter_texts_filled_with_zeros(folder):
    batch = next(stream(folder, text=(9, 8), frames=2))
    assert batch["latents"].shape == (2, 2, 2, 4, 5) and batch["prompt"]["text"].shape == (2, 9, 8)
    assert (batch["prompt"]["text"][:, 6:] == 0).all() and (batch["prompt"]["text"][:, :6] != 0).any((1, 2)).all()
    whole = {sets.example(i).latents[:2].astype(np.float32).tobytes() for i in range(12)}
    assert all(latents.tobytes() in whole for latents in batch["latents"])


def test_processes_read_their_rows_of_the_one_batch(folder):
    whole = numbers(take(stream(folder, batch_size=4), 6))
    parts = [numbers(take(stream(folder, batch_size=4, rows=rows), 6)) for rows in ((0, 2), (1, 3))]
    assert [number for pair in zip(*parts) for number in pair] == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_at_the_exact_example(folder, workers):
    if workers and (folder / "shard_000000.tar").exists():
        pytest.skip("processes take seconds to start: with one of the formats is enough")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for it, the command line does it
    iterator = stream(folder, workers=workers)
    take(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = numbers(take(iterator, 5))
    iterator.close()
    fresh = stream(folder, workers=workers)
    fresh.set_state(state)
    assert numbers(take(fresh, 5)) == wanted
    fresh.close()


def test_another_set_is_not_gone_on_with(tmp_path):
    folder = sets.write(tmp_path / "set")
    state = stream(folder).get_state()
    sets.write(folder, count=13)
    with pytest.raises(UserError, match=r"set no longer holds the examples that this run began with.*init\.student"):
        stream(folder).set_state(state)


@pytest.mark.parametrize(
    "changes, text, message",
    [
        (dict(frames=4), sets.TEXT, r"latents of 3×2×4×5 .* where 4×2×4×5 are needed: change data\.frames"),
        (dict(height=3), sets.TEXT, r"where 3×3×4×5 are needed"),
        ({}, (5, 8), r"text of 6×8 \(token, channel\) where 5×8 is needed: change text\.length or model\.text_dim"),
        ({}, (6, 9), r"where 6×9 is needed"),
        (dict(path=""), sets.TEXT, r"--config\.data\.path is missing"),
        (dict(batch_size=13), sets.TEXT, r"12 examples do not fill a batch of 13"),
    ],
)
def test_what_does_not_fit_is_told_before_the_first_batch(folder, changes, text, message):
    with pytest.raises(UserError, match=message) as caught:
        stream(folder, text, **changes)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match='no split "heldout"'):
        LatentSource(config(folder).data, "heldout")


def damaged_set(folder, kind="tar"):
    """12 examples: 6 has an altered byte, 9 another shape, 10 is not finite."""
    sets.write(folder, count=12, shard=1, kind=kind)
    sets.flip(folder / f"shard_000006.{kind}", sets.example(6).text.tobytes())
    write = array_record_write if kind == "array_record" else tar_write
    write(folder / f"shard_000009.{kind}", sets.example(9, latents=(3, 2, 5, 5)))
    nan = sets.example(10)
    nan.text[3, 4] = np.nan
    write(folder / f"shard_000010.{kind}", nan)
    return folder


def tar_write(path, example):
    path.unlink()
    writer = sets.TarWriter(path)
    writer.write(example)
    writer.close()


def array_record_write(path, example):
    sets.array_record_shard.write(path, [example])


@pytest.mark.parametrize("kind", ["tar", "array_record"])
def test_damaged_examples_are_left_out_named_and_counted(tmp_path, capfd, kind):
    folder = damaged_set(tmp_path / "set", kind)
    batches = take(stream(folder), 18)
    order = numbers(batches)
    for epoch in (order[:12], order[12:24]):
        assert len(epoch) == 12 and set(epoch) == set(range(12)) - {6, 9, 10}
    assert sum(batch["damaged"].sum() for batch in batches[:6]) >= 3
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("crcm: left out")]
    assert len(told) == 3 and told[-1].endswith("3 so far")  # once each, however often they are met
    for words in ("6", "latents of 3×2×5×5", "not finite"):
        assert any(words in line for line in told)
    # the same examples in their places whatever the number of processes, and after a restart
    parts = [numbers(take(stream(folder, rows=[i]), 18)) for i in range(2)]
    assert [number for pair in zip(*parts) for number in pair] == order
    fresh = stream(folder)
    take(fresh, 3)
    again = stream(folder)
    again.set_state(fresh.get_state())
    assert numbers(take(again, 5)) == order[6:16]


def test_a_set_that_is_gone_is_one_sentence(tmp_path):
    folder = sets.write(tmp_path / "set", count=40, shard=10)
    iterator = stream(folder)
    next(iterator)
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"10 examples in a row are damaged, the last one: .*crcm data check") as caught:
        take(iterator, 20)
    assert "\n" not in str(caught.value)


def test_every_example_can_take_anothers_place():
    """Whatever the length, the places tried next are all different."""
    for length in (*range(1, 40), 256, 1000):
        at, seen = 0, set()
        for _ in range(length):
            at = (at + skipping.Skipping(range(length))._stride) % length
            seen.add(at)
        assert len(seen) == length


def test_the_bench_measures_both_formats(capsys):
    bench.main(["--examples=4", "--frames=5", "--size=32x32", "--seconds=0.2", "--step=0.05", "--batch=2"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["set", "tar", "array_record"]
    assert all(float(row[2]) > 0 and 0 <= float(row[6].rstrip(" %")) < 100 for row in rows[1:])
