"""What is read: prefixes, several sets in a file, shards, our checkpoints; and what PyTorch's classes make of it."""

import json
import sys

import convert_fakes as fakes
import jax
import numpy as np
import pytest

from crcm_jax.cli import convert as cli
from crcm_jax.convert import engine, outputs
from crcm_jax.errors import UsageError, UserError
from crcm_jax.saving.weights import save_params

MODEL = fakes.TINY["t2v"]


def convert(source, to, layout, **options):
    options.setdefault("heads", 2)
    said = []
    engine.convert(source, to, layout, say=said.append, **options)
    return fakes.load(to), "\n".join(said)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch (pip install -e .[parity])")


def as_torch(torch, arrays):
    carriers = {2: (np.int16, torch.bfloat16), 4: (np.int32, torch.float32)}
    return {
        n: torch.from_numpy(a.view(carriers[a.itemsize][0])).view(carriers[a.itemsize][1]) for n, a in arrays.items()
    }


def test_files_of_torch_keep_every_byte(torch, tmp_path):
    native = fakes.tensors(MODEL)
    torch.save(as_torch(torch, native), tmp_path / "n.pth")
    convert(tmp_path / "n.pth", tmp_path / "ours.safetensors", "ours")
    found, _ = convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", "native")
    assert fakes.same(found, native)
    found, _ = convert(tmp_path / "back.pth", tmp_path / "r.pt", "rcm")
    again, _ = convert(tmp_path / "r.pt", tmp_path / "again.pth", "native")
    assert fakes.same(again, native)
    # Each tensor is a tensor of its own, not a window on one large storage.
    loaded = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in loaded.values())
    assert "Layout: Wan's own tensor names." in (tmp_path / "back.pth.md").read_text()


@pytest.mark.parametrize("which", ["ema", "params", "critic", None])
def test_training_checkpoints_of_rcm(torch, tmp_path, which):
    sets = {"net_ema.": 1, "net.": 2, "net_fake_score.": 3}
    sets = {prefix: fakes.tensors(MODEL, "rcm", seed) for prefix, seed in sets.items()}
    torch.save(as_torch(torch, {p + n: a for p, s in sets.items() for n, a in s.items()}), tmp_path / "model.pt")
    found, said = convert(tmp_path / "model.pt", tmp_path / "out.pt", "rcm", which=which)
    wanted = sets[{"params": "net.", "critic": "net_fake_score."}.get(which, "net_ema.")]
    assert fakes.same({name.removeprefix("net."): a for name, a in found.items()}, wanted)
    assert said.count("left aside") == 2


@pytest.mark.parametrize("which, key", [(None, "generator_ema"), ("params", "generator"), ("critic", "critic")])
def test_self_forcing_files(torch, tmp_path, which, key):
    wrap = lambda name: "model._fsdp_wrapped_module." + name.replace(".ffn.", "._fsdp_wrapped_module.ffn.")  # noqa: E731
    sets = {name: fakes.tensors(MODEL, seed=i) for i, name in enumerate(("generator", "generator_ema", "critic"))}
    wrapped = {name: {wrap(n): t for n, t in as_torch(torch, s).items()} for name, s in sets.items()}
    torch.save({**wrapped, "step": 600, "critic_optimizer": {"state": {}}}, tmp_path / "model.pt")
    found, said = convert(tmp_path / "model.pt", tmp_path / "out.safetensors", "native", which=which)
    assert fakes.same(found, sets[key])
    assert "passed over critic_optimizer, step: no weights" in said


def test_a_set_that_is_not_there(tmp_path):
    fakes.save(tmp_path / "n.safetensors", {"net." + n: a for n, a in fakes.tensors(MODEL, "rcm").items()})
    _, said = convert(tmp_path / "n.safetensors", tmp_path / "out.safetensors", "rcm", which="ema")
    assert "these are the only ones" in said
    with pytest.raises(UserError, match="holds no critic weights, only net"):
        convert(tmp_path / "n.safetensors", tmp_path / "no.safetensors", "rcm", which="critic")


def test_shards(tmp_path, monkeypatch):
    native = fakes.tensors(MODEL)
    fakes.save(tmp_path / "n.safetensors", native)
    monkeypatch.setattr(outputs, "_SHARD", 16_000)
    found, _ = convert(tmp_path / "n.safetensors", tmp_path / "d", "diffusers")
    index = json.loads((tmp_path / "d/diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "d").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"]) == set(found) and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in found.values())
    # Heads come from config.json: nothing else tells them at this size.
    again, said = convert(tmp_path / "d", tmp_path / "n2.safetensors", "native", heads=None)
    assert fakes.same(again, native) and f"{len(files)} .safetensors files, diffusers layout" in said


def test_one_tensor_under_two_names(tmp_path):
    model = fakes.TINY["umt5"]
    shared = fakes.tensors(model, "diffusers")
    table = shared.pop("shared.weight")
    native, _ = convert(
        fakes.save(tmp_path / "a.safetensors", {**shared, "shared.weight": table}), tmp_path / "1.safetensors", "native"
    )
    alias = {**shared, "encoder.embed_tokens.weight": table}
    found, _ = convert(fakes.save(tmp_path / "b.safetensors", alias), tmp_path / "2.safetensors", "native")
    assert fakes.same(found, native)
    both = {**alias, "shared.weight": table}
    found, said = convert(fakes.save(tmp_path / "c.safetensors", both), tmp_path / "3.safetensors", "native")
    assert fakes.same(found, native) and "passed over, in no network: encoder.embed_tokens.weight" in said
    both["shared.weight"] = table + table
    with pytest.raises(UserError, match="one tensor with two contents"):
        convert(fakes.save(tmp_path / "d.safetensors", both), tmp_path / "4.safetensors", "native")


def test_tensors_that_no_network_reads_are_passed_over(tmp_path):
    theirs = fakes.tensors(fakes.TINY["i2v"], "diffusers")
    theirs |= {f"blocks.{i}.attn2.norm_added_q.weight": np.ones(24, np.float32) for i in range(3)}
    found, said = convert(fakes.save(tmp_path / "a.safetensors", theirs), tmp_path / "b.safetensors", "native")
    assert len(found) == len(theirs) - 3 and "passed over, in no network: blocks.0.attn2.norm_added_q.weight" in said


def test_the_vision_tower_out_of_the_whole_of_clip(tmp_path):
    """The text tower is passed over; fused projections are taken apart, and names without their prefix are known."""
    model = fakes.TINY["clip"]
    native = fakes.tensors(model)
    text = {f"textual.blocks.{i}.attn.q.weight": np.ones((4, 4), np.float32) for i in range(24)}
    whole = {**native, **text, "textual.token_embedding.weight": np.ones((9, 4), np.float32),
             "log_scale": np.ones((), np.float32)}  # fmt: skip
    found, said = convert(fakes.save(tmp_path / "a.safetensors", whole), tmp_path / "a", "diffusers")
    assert "native layout of clip-vision" in said and "passed over, in no network: log_scale, textual." in said
    fused = native["visual.transformer.2.attn.to_qkv.weight"]
    for i, x in enumerate("qkv"):
        part = found[f"vision_model.encoder.layers.2.self_attn.{x}_proj.weight"]
        np.testing.assert_array_equal(part, fused[12 * i : 12 * (i + 1)])
    np.testing.assert_array_equal(found["visual_projection.weight"], native["visual.head"].T)
    bare = {name.removeprefix("vision_model."): array for name, array in found.items()}
    bare["embeddings.position_ids"] = np.arange(10)[None]
    again, _ = convert(fakes.save(tmp_path / "b.safetensors", bare), tmp_path / "c.safetensors", "native")
    assert fakes.same(again, native)


@pytest.mark.parametrize("form", ["run", "run.safetensors"])
def test_our_own_checkpoint_with_its_recipe_on_the_card(tmp_path, form):
    tree = MODEL.family.network(MODEL.config).init(jax.random.key(0))
    rollout = {"steps": [4, 2], "times": [[0.9375, 5 / 6, 0.625], [5 / 6]], "noisy_context": False, "context_start": 0}
    config = {"model": fakes.SIZES, "chunks": {"first": 1, "size": 1}, "rollout": rollout, "sizes": {"student": {}}}
    meta = {"training": "sf_dmd", "model": fakes.SIZES, "config": config, "iteration": 450}
    save_params(tmp_path / form, tree, meta)
    found, _ = convert(tmp_path / form, tmp_path / "d", "diffusers", heads=None, dtype="BF16")
    np.testing.assert_array_equal(
        found["blocks.2.ffn.net.0.proj.weight"],
        np.asarray(tree["blocks"]["ffn"]["up"]["kernel"][2].T).astype(fakes.TYPES["BF16"]),
    )
    card = (tmp_path / "d/README.md").read_text()
    assert "training type `sf_dmd`, chunks c1-1, 450 iterations" in card
    assert "4, 2 steps" in card and "0.9375, 0.833333, 0.625; 0.833333" in card and "license:" in card


def test_the_command(tmp_path, capsys):
    source = fakes.save(tmp_path / "n.safetensors", fakes.tensors(MODEL))
    words = [f"--from={source}", f"--to={tmp_path / 'o.safetensors'}", "--layout=ours", "--heads=2"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "o.safetensors").exists()
    assert "native layout of wan-transformer" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert (tmp_path / "o.safetensors").exists()
    with pytest.raises(UserError, match="exists already"):
        cli.main(words)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0 and cli.EXAMPLE in capsys.readouterr().out
    for wrong, why in (
        (["--from=x"], "--to and --layout say"), (["--to=x"], "--from"),
        ([*words[:2], "--layout=flax"], "invalid choice"),
        ([words[0], f"--to={tmp_path / 'x.bin'}", "--layout=native"], "end it in .pth or .pt or .safetensors"),
        ([words[0], f"--to={tmp_path / 'x.pth'}", "--layout=diffusers"], "name a folder"),
        ([*words[:1], f"--to={tmp_path / 'y'}", "--layout=diffusers"], "give --heads"),
        ([words[0], f"--to={tmp_path / 'y'}", "--layout=diffusers", "--model=wan3"], "--model=wan3 is not one of"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            cli.main(wrong)


def test_safetensors_need_no_torch(tmp_path, monkeypatch):
    source = fakes.save(tmp_path / "n.safetensors", fakes.tensors(MODEL))
    monkeypatch.setitem(sys.modules, "torch", None)
    convert(source, tmp_path / "o.safetensors", "ours")
    convert(tmp_path / "o.safetensors", tmp_path / "d", "diffusers")
    with pytest.raises(UserError, match="need PyTorch: pip install torch"):
        convert(source, tmp_path / "n.pth", "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "n.safetensors", "o.safetensors"]


@pytest.mark.parametrize("name", ["t2v", "i2v", "vae21", "vae22", "umt5", "clip", "clip-bare"])
def test_the_classes_of_pytorch_load_what_is_written(torch, tmp_path, name):
    """Strictly, and with every byte in its place."""
    reason = "needs diffusers and transformers (pip install -e .[parity])"
    diffusers, transformers = (pytest.importorskip(library, reason=reason) for library in ("diffusers", "transformers"))
    model, native = fakes.TINY[name], fakes.tensors(fakes.TINY[name], kind="F32")
    found, _ = convert(fakes.save(tmp_path / "n.safetensors", native), tmp_path / "d", "diffusers")
    kind = {"umt5": transformers.UMT5EncoderModel, "clip": transformers.CLIPVisionModelWithProjection,
            "clip-bare": transformers.CLIPVisionModel}.get(name)  # fmt: skip
    kind = kind or (diffusers.AutoencoderKLWan if name.startswith("vae") else diffusers.WanTransformer3DModel)
    loaded, info = kind.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = {n: t.numpy() for n, t in loaded.state_dict().items() if n != "encoder.embed_tokens.weight"}
    card = (tmp_path / "d/README.md").read_text()
    assert {"t2v": "- text-to-video", "i2v": "- image-to-video"}.get(
        name, kind.__name__.removesuffix("WithProjection")
    ) in card
    if name == "clip-bare":
        found = {n.removeprefix("vision_model."): array for n, array in found.items()}
    assert fakes.same(state, found)
    if name.startswith("vae"):
        assert tuple(loaded.config.latents_mean) == model.config.mean
