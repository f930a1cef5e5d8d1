"""The pipeline: same seed, same batches; resumed at the exact example; shards that add up; cheap enough."""

import json
import time

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits

from crcm_jax import recipes
from crcm_jax.configs.digits import get_config
from crcm_jax.data import digits, pipeline
from crcm_jax.errors import UserError
from crcm_jax.models.text.embedded import Embedded
from crcm_jax.models.text.words import WordEncoder
from crcm_jax.models.vae.pixels import PixelCodec

CODEC, WORDS = PixelCodec(patch=2, mean=-0.75, std=0.52), Embedded(WordEncoder())


def config(**changes):
    c = ConfigDict(dict(data=digits.default_config()))
    c.data.update(dict(batch_size=4, examples=64) | changes)
    return c


def stream(c=None, split="train", **kwargs):
    return iter(pipeline.make(c or config(), split, codec=CODEC, text_encoder=WORDS, **kwargs))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        jax.tree.map(np.testing.assert_array_equal, x, y)  # which is told if the keys differ


def rows(batches):
    return [latents.tobytes() for batch in batches for latents in batch["latents"]]


def test_a_batch_is_what_the_trainer_expects():
    batch = next(stream(config(batch_size=256, examples=1000)))
    assert batch.keys() == {"latents", "prompt"}
    assert batch["latents"].shape == (256, 9, 8, 8, 4) and batch["prompt"]["text"].shape == (256, 12, 32)
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(batch))
    assert abs(batch["latents"].mean()) < 0.1 and abs(batch["latents"].std() - 1) < 0.1


def test_latents_and_text_belong_together():
    source = pipeline.make_source(config())
    clips = {CODEC.encode(None, source[i]["video"][None]).tobytes(): source[i]["prompt"] for i in range(64)}
    for batch in take(stream(), 4):
        for latents, text in zip(batch["latents"], batch["prompt"]["text"]):
            np.testing.assert_array_equal(text, WORDS([clips[latents.tobytes()]])["text"][0])


def test_same_seed_same_batches_whatever_the_threads():
    reference = take(stream(), 20)
    assert_same(reference, take(stream(), 20))
    assert_same(reference, take(stream(config(threads=0)), 20))
    assert_same(reference, take(stream(config(threads=3, prefetch=7)), 20))
    assert rows(reference) != rows(take(stream(config(seed=1)), 20))
    assert rows(reference) != rows(take(stream(split="heldout"), 20))


@pytest.mark.parametrize("consumed", [0, 1, 7, 16, 21])
def test_resumes_at_the_exact_example(consumed):
    iterator = stream()
    take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    fresh = stream()
    fresh.set_state(state)
    assert_same(expected, take(fresh, 5))
    iterator.set_state(state)  # and going back works too
    assert_same(expected, take(iterator, 5))


def test_an_epoch_sees_every_example_once_in_another_order_each_time():
    epochs = [rows(take(it, 16)) for it in [stream()] for _ in range(2)]
    assert len(set(epochs[0])) == 64 and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    source = pipeline.make_source(config())
    unshuffled = [CODEC.encode(None, source[i]["video"][None])[0].tobytes() for i in range(64)]
    assert set(unshuffled) == set(epochs[0]) and unshuffled != epochs[0]


@pytest.mark.parametrize("parts", [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 3, 6), (1, 2, 4, 5, 7)), ((2, 3), (2, 3))])
def test_processes_read_their_rows_of_the_one_batch(parts):
    whole = take(stream(config(batch_size=8)), 20)  # more than one epoch
    for part in parts:
        its = take(stream(config(batch_size=8), rows=part), 20)
        assert_same([jax.tree.map(lambda x, part=part: x[list(part)], batch) for batch in whole], its)


def test_processes_give_the_same_batches_and_resume():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for it, the command line does it
    reference, iterator = take(stream(), 8), stream(config(workers=2))
    assert_same(reference[:5], take(iterator, 5))
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    fresh = stream(config(workers=2))
    fresh.set_state(state)
    assert_same(reference[5:], take(fresh, 3))
    fresh.close()


def cpu_seconds(run):
    """Of this thread, the best of several runs, as caches warm; other work on the machine hardly counts."""
    costs = []
    for _ in range(8):
        began = time.thread_time()
        run()
        costs.append(time.thread_time() - began)
    return min(costs)


def test_costs_little_beside_a_training_step():
    """One twentieth of what a step's products of matrices alone would take on the same machine, both in CPU time."""
    c = get_config("tf")
    network = jax.eval_shape(recipes.student(c).init, jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(network["blocks"]) if x.ndim == 3)
    tokens = c.data.batch_size * 2 * c.data.frames * 4  # of the clip and of its clean context
    a, b = np.ones((2048, 192), np.float32), np.ones((192, 512), np.float32)
    with threadpool_limits(1):
        multiplication = cpu_seconds(lambda: [a @ b for _ in range(10)]) / (10 * 2 * a.size * 512)
    step = 6 * size * tokens * multiplication

    iterator = stream(config(batch_size=c.data.batch_size, examples=1_000_000, threads=0))
    next(iterator)
    assert cpu_seconds(lambda: take(iterator, 5)) / 5 < 0.05 * step


@pytest.mark.parametrize(
    "changes, kwargs, message",
    [
        (dict(name="nothing"), {}, 'no data source "nothing": set data.name to one of digits, tfds'),
        (dict(width=15), {}, "16×15 pixels does not split"),
        (dict(batch_size=65), {}, "64 examples do not fill a batch of 65"),
        ({}, dict(split="validation"), 'no split "validation"'),
    ],
)
def test_mistakes_are_named_before_the_first_batch(changes, kwargs, message):
    with pytest.raises(UserError, match=message):
        pipeline.make(config(**changes), **{"codec": CODEC, "text_encoder": WORDS, **kwargs})
