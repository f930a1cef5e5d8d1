"""The habits of the command line: ranges, places, spellings, and how soon a mistake is answered."""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crcm_jax import __main__ as program
from crcm_jax.cli import _config, _memory, _numbers, _places, aot, convert, data, demo, evaluate, sample, train
from crcm_jax.cli._parser import Parser
from crcm_jax.config_ranges import RULES
from crcm_jax.errors import UsageError, UserError

ROOT = Path(__file__).parents[2]
NOWHERE = ("", "0", "-1", "nan", "inf", "-inf", "1e30", "9" * 400, "three", "1_0", " ", "1/0", "0x10", "٣٣٣٣٣٣٣٣٣٣٣٣")


def refused(kind, text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", NOWHERE)
def test_no_number_of_a_count(text):
    assert repr(text) in refused(_numbers.integer(1), text)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "-inf", "1e30", "three", "1/0", "9" * 400])
def test_no_positive_number(text):
    assert repr(text) in refused(_numbers.number(above=0, at_most=1000), text)


def test_numbers():
    assert _numbers.integer(0)("0") == 0 and _numbers.integer(0, 5)("5") == 5
    assert refused(_numbers.integer(2, 5), "6") == "'6' is not a whole number of at least 2 and of at most 5"
    assert _numbers.number(above=0)("1e-4") == 1e-4 and _numbers.number(above=0)("5/6") == 5 / 6
    assert _numbers.several(_numbers.integer(1), example="4,2")("4, 2") == (4, 2)
    for text in ("", ",", "4,", "4,0", "4;2"):
        assert "such as 4,2" in refused(_numbers.several(_numbers.integer(1), example="4,2"), text)
    assert _numbers.times("15/16,5/6;") == ((15 / 16, 5 / 6), ())
    for text in ("", ";", "1/0", "1", "0", "-0.5", "nan", "5/6,"):
        refused(_numbers.times, text)


def test_sizes_that_no_memory_holds():
    size = _numbers.pair("x", example="832x480", at_most=_numbers.LONGEST_SIDE)
    assert size("832x480") == (832, 480)
    for text in ("0x0", "-832x480", "832x-480", "832", "x", "832x480x3", "99999999x16", "832.0x480", ""):
        assert "is not like 832x480" in refused(size, text)
    with pytest.raises(UserError) as caught:
        _memory.refuse_what_cannot_fit(2, 81, 400_000, 400_000, latents=10**9, weights=3 * 10**9)
    assert re.match(
        r"2 clips of 81 frames of 400000x400000 pixels cannot be held: 311,040.0 GB of pixels, 2.0 GB of latents, "
        r"3.0 GB of weights, and there are [\d,.]+ GB of memory: choose a smaller --size", str(caught.value),
    )  # fmt: skip
    _memory.refuse_what_cannot_fit(1, 9, 16, 24, latents=100)
    with pytest.raises(UserError, match=r"the weights need 28\.0 GB on each device, which has 16\.0 GB"):
        _memory.refuse_weights(28 * 10**9, 16 * 10**9)
    _memory.refuse_weights(28 * 10**9, None)
    assert 10**8 < _memory.of_machine() < 10**14


# Places


def test_places_are_tried_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for text in ("new.gif", "a/b/c.gif", "file", "mit Leerzeichen und Ümläuten.gif"):
        assert _places.new_file(f"{tmp_path}/{text}") == tmp_path / text
    for text in ("new", "a/b/c", "folder"):
        assert _places.new_folder(f"{tmp_path}/{text}") == tmp_path / text
    assert "is a folder: name a file" in refused(_places.new_file, str(tmp_path / "folder"))
    assert "is a folder: name a file" in refused(_places.new_file, f"{tmp_path}/new/")
    assert "is a file: name a folder" in refused(_places.new_folder, str(tmp_path / "file"))
    for kind in (_places.new_file, _places.new_folder, _places.new_place):
        assert f"{tmp_path}/file is no folder" in refused(kind, f"{tmp_path}/file/below/it")
        assert "cannot be a name: file name too long" in refused(kind, f"{tmp_path}/{'x' * 300}")
        assert "empty" in refused(kind, "") and "empty" in refused(kind, "  ")
        assert "cannot be a name" in refused(kind, f"{tmp_path}/a\0b")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "old"


def test_places_that_must_not_be_written(tmp_path):
    for kind in (_places.new_file, _places.new_folder, _places.new_place):
        assert "cannot be written: /proc" in refused(kind, "/proc/nowhere/clip.gif")
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere else")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "permission denied" in refused(_places.new_file, f"{tmp_path}/closed/a.gif")
    (tmp_path / "kept").touch(mode=0o400)
    assert "must not be written" in refused(_places.new_file, f"{tmp_path}/kept")


# Spellings

LEAVES = [key for key in RULES if "*" not in key] + [f"critic_optim.{name}" for name in ("lr", "b1", "warmup")]
TYPOS = {
    "learning_rate": "optim.lr", "optim.learning_rate": "optim.lr", "critic_optim.learning_rate": "critic_optim.lr",
    "optim.lrr": "optim.lr", "optm.lr": "optim.lr", "batch_size": "data.batch_size",
    "train.batch_size": "data.batch_size",
    "data.batchsize": "data.batch_size", "data.batch": "data.batch_size", "optim.beta1": "optim.b1",
    "optim.wd": "optim.weight_decay", "optim.weight_deacy": "optim.weight_decay", "ema_decay": "ema.rate",
    "train.max_steps": "train.steps", "train.step": "train.steps", "train.saveevery": "train.save_every",
    "num_layers": "model.layers", "model.num_heads": "model.heads", "model.hidden_size": "model.dim",
    "gradient_accumulation_steps": "optim.accumulate", "max_grad_norm": "optim.grad_clip",
    "mesh.fdsp": "mesh.fsdp", "mesh.tensr": "mesh.tensor", "data.num_workers": "data.workers",
    "rollout.step": "rollout.steps", "objective.guidence": "objective.guidance", "dmd.guidance_scale": "dmd.guidance",
    "sample.ode_step": "sample.ode_steps", "data.hieght": "data.height", "seeed": "seed",
}  # fmt: skip


@pytest.mark.parametrize("typo", TYPOS)
def test_likely_typos_find_the_key(typo):
    assert _config.nearest(typo, LEAVES) == TYPOS[typo]


@pytest.mark.parametrize("strange", ["xyzzy", "optim.qqq", "colour", "data.zzz"])
def test_what_comes_near_nothing_suggests_nothing(strange):
    assert _config.nearest(strange, LEAVES) is None


def test_options_of_train_and_aot_are_written_as_everywhere(tmp_path):
    file, place = f"{ROOT}/configs/digits.py:tf", str(tmp_path / "w")
    ways = [
        [f"--config={file}", f"--workdir={place}", "--config.optim.lr=0.5", "--mesh=data=2,fsdp=3"],
        ["--config", file, "--workdir", place, "--config.optim.lr", "0.5", "--mesh", "data=2", "--mesh", "fsdp=3"],
        ["--config.mesh.fsdp=3", f"--config={file}", f"--workdir={place}", "--config.optim.lr=5e-1", "--mesh=data=2"],
    ]
    for words in ways:
        config, workdir = train.parse(words)
        assert (config.optim.lr, config.mesh.data, config.mesh.fsdp, workdir) == (0.5, 2, 3, Path(place))
        assert config.is_locked
    for words in (["--mesh=data=2,fsdp=3"], ["--config.mesh.data=2", "--mesh", "fsdp=3"]):
        config, options = aot.parse([f"--config={file}", "--topology=h100:6", *words])
        assert (config.mesh.data, config.mesh.fsdp, options.topology) == (2, 3, "h100:6")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "main, words, says",
    [
        (train.main, ["--lr=1"], "no option --lr: did you mean --config.optim.lr?"),
        (train.main, ["--optim.lr=1"], "did you mean --config.optim.lr?"),
        (train.main, ["--learning_rate=1"], "did you mean --config.optim.lr?"),
        (train.main, ["--workdri=x"], "no option --workdri: did you mean --workdir?"),
        (train.main, ["--mesh=rows=2"], "mesh.rows is no axis: use data, fsdp, context, tensor"),
        (train.main, ["--mesh=data=0"], "mesh.data=0 must be a positive integer"),
        (train.main, ["--config"], "expected one argument"),
        (train.main, ["--processes=0", "--process=0", "--coordinator=h:1"], "'0' is not a whole number of at least 1"),
        (train.main, ["--processes=2", "--process=0", "--coordinator=h:99999"], "must be HOST:PORT"),
        (train.main, ["--wait=0"], "--wait"),
        (aot.main, ["--topolgy=v5p:2x2x1"], "did you mean --topology?"),
        (sample.main, ["--promt=a"], "no option --promt: did you mean --prompt?"),
        (sample.main, ["--steps=2", "--checkpoint=x", "--prompt=a", "--context-start=-1"], "--context-start"),
        (evaluate.main, ["--checkpiont=x", "--steps=2", "--checkpoint=y"], "did you mean --checkpoint?"),
        (convert.main, ["--form=x", "--from=y"], "no option --form: did you mean --from?"),
        (data.main, ["build", "--video=x", "--videos=v", "--weights=w", "--out=o"], "did you mean --videos?"),
        (data.main, ["embed", "--wieghts=w"], "--weights"),
        (demo.main, ["--workdirr=x"], "did you mean --workdir?"),
    ],
)
def test_mistakes_are_answered_alike(main, words, says):
    with pytest.raises(UsageError) as caught:
        main(words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_old_spellings_work_and_say_so(capsys):
    options = data.parser().parse_args(["build", "--prompts=p", "--weights=w", "--out=o", "--solver=unipc"])
    assert options.sampler == "unipc" and not hasattr(options, "solver")
    options, _ = sample.parse(["--model=m", "--weights=w", "--prompt=a", "--solver=euler", "--negative-prompt=b"])
    assert (options.sampler, options.negative) == ("euler", "b")
    told = capsys.readouterr().err.splitlines()
    assert told == ["crcm: --solver is called --sampler now"] * 2 + ["crcm: --negative-prompt is called --negative now"]
    assert "--solver" not in sample.parser().format_help()


def test_zero_is_never_taken_for_not_given():
    options, _ = sample.parse(["--checkpoint=x", "--prompt=a", "--context-start=0", "--guidance=0", "--seed=0"])
    assert options.context_start == 0 and options.guidance == 0
    from crcm_jax.cli import _sample_solver

    with pytest.raises(UsageError, match="--context-start is for streaming"):
        _sample_solver.choose(options, {"training": "bidirectional"})


def test_fractions_and_rows_of_times_are_read_by_all():
    for main in (sample, evaluate):
        parsed = main.parser().parse_args(["--checkpoint=x", "--steps=4,2", "--mid=15/16,5/6,5/8;5/6"])
        assert parsed.mid == ((15 / 16, 5 / 6, 5 / 8), (5 / 6,)) and parsed.steps == (4, 2)


def test_every_option_has_help_and_one_type_everywhere():
    """One spelling is one thing: the same type of value, or the same choices, whatever the command."""
    kinds: dict[str, set] = {}
    for p in (*(m.parser() for m in (sample, evaluate, convert, train, aot, demo)), *_commands(data.parser())):
        for action in p._actions:
            assert action.help, (p.prog, action.option_strings)
            for name in action.option_strings if action.help != argparse.SUPPRESS else ():
                kinds.setdefault(name, set()).add(getattr(action.type, "__qualname__", action.type))
    mixed = {name: found for name, found in kinds.items() if len(found) > 1}
    assert mixed.keys() <= {"--steps", "--out", "--to", "--prompts"}, mixed


def _commands(parser: Parser) -> list[Parser]:
    return list(next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices.values())


# Answers at once


@pytest.mark.parametrize(
    "words, code, seconds",
    [
        (["--help"], 0, 0.5),
        (["sample", "--fps=nan"], 2, 1.0),
        (["train", f"--config={ROOT}/configs/digits.py", "--workdir=w", "--config.optim.lr=-1"], 2, 1.0),
        (["aot", "--topology=v5p:2x2x1", "--mesh=x"], 2, 1.0),
        (["data", "build", "--size=0x0"], 2, 1.0),
        (["convert", "--heads=0"], 2, 1.0),
    ],
)
def test_answers_come_at_once_and_without_jax(words, code, seconds, tmp_path):
    body = (
        "import sys, time; from crcm_jax import __main__ as m\n"
        "try: m.run()\nfinally: print('jax' in sys.modules, time.process_time())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", body, *words], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == code, done.stderr
    jax, used = done.stdout.splitlines()[-1].split()
    # The processor's time: others may be at work on this machine.
    assert jax == "False" and float(used) < seconds, (used, time.monotonic() - began)
    assert not list(tmp_path.iterdir())


def test_exit_codes_are_documented(capsys):
    program.dispatch(["--help"])
    said = capsys.readouterr().out
    assert all(words in said for words in ("exit codes: 0 done", "1 could not", "2 wrong usage", "130 interrupted"))
    assert "130" in (ROOT / "README.md").read_text(encoding="utf-8")
