"""The command line: help, suggestions, and one sentence with an exit code for what a user gets wrong."""

import subprocess
import sys

import pytest

from crcm_jax import __main__ as program
from crcm_jax.cli import train
from crcm_jax.errors import UsageError, UserError, blame_config

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="small"):
    if variant != "small":
        raise ValueError(f"no variant {variant!r}: choose small")
    return ConfigDict({"seed": 0, "optim": {"lr": 1e-3, "warmup": 5}, "rollout": {"steps": (4,)}})
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return tmp_path / "c.py"


def test_parse(file):
    words = ["--config.optim.lr=0.5", "--config.rollout.steps=(4,2)", "--workdir=out/x"]
    config, workdir = train.parse([f"--config={file}:small", *words])
    assert config.optim.lr == 0.5 and config.rollout.steps == (4, 2) and str(workdir) == "out/x"
    assert config.seed == 0 and config.is_locked


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.optim.lrr=1"], r"no key config\.optim\.lrr: did you mean config\.optim\.lr\?"),
        (["--config.opti.warmup=1"], r"no key config\.opti\.warmup: did you mean config\.optim\.warmup\?"),
        (["--config.lr=1"], r"no key config\.lr: did you mean config\.optim\.lr\?"),
        (["--config.xyzzy=1"], r"no key config\.xyzzy$"),
        (["--config.optim.lr=fast"], r"config\.optim\.lr=fast: could not convert"),
        (["--workdri=x"], "workdri.*[Dd]id you mean.*workdir"),
        (["out/x"], "'out/x' is not an option"),
    ],
)
def test_what_is_wrong_with_a_command_line(file, words, message):
    with pytest.raises(UsageError, match=message) as caught:
        train.parse([f"--config={file}", "--workdir=w", *words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--workdir=w"], "--config=FILE.py is missing, for example: crcm train"),
        (["--config=nowhere.py:tf", "--workdir=w"], r"no configuration file nowhere\.py"),
        (["--config={file}"], "--workdir is missing"),
        (["--config={file}", "--workdir=gs://bucket/run"], "is no folder: mount the bucket"),
        (["--config={file}:large", "--workdir=w"], "^no variant 'large': choose small$"),
    ],
)
def test_what_is_missing(file, words, message):
    with pytest.raises(UsageError, match=message):
        train.parse([word.format(file=file) for word in words])


def test_help_lists_every_command_with_its_example(capsys):
    assert program.dispatch(["--help"]) == 0
    text = capsys.readouterr().out
    assert train.HELP in text and train.EXAMPLE in text
    with pytest.raises(SystemExit) as caught:
        program.dispatch(["train", "--help"])
    assert caught.value.code == 0 and "--workdir" in capsys.readouterr().out
    assert program.dispatch([]) == 2


def test_unknown_command():
    with pytest.raises(UsageError, match="no command 'trian': did you mean 'train'"):
        program.dispatch(["trian"])


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("the thing: mend it"), 1, "crcm: the thing: mend it\n"),
        (UsageError("no such key"), 2, "crcm: no such key\n"),
        (OSError(28, "No space left on device"), 1, "disk is full"),
        (None, 0, ""),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, words):
    def dispatch(argv):
        if error:
            raise error

    monkeypatch.setattr(program, "dispatch", dispatch)
    with pytest.raises(SystemExit) as caught:
        program.run()
    told = capsys.readouterr().err
    assert (caught.value.code or 0) == code and words in told and "Traceback" not in told


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(program, "dispatch", lambda argv: [][0])
    with pytest.raises(IndexError):
        program.run()


def test_errors_of_reading_a_configuration_are_the_users():
    with pytest.raises(UsageError, match="does not divide"), blame_config():
        raise ValueError("3 does not divide 7")
    with pytest.raises(UserError, match="own"), blame_config():
        raise UserError("own")


def test_the_module_runs_and_answers_mistakes_without_loading_jax(file):
    code = (
        "import sys; from crcm_jax import __main__ as m; sys.argv[1:] = sys.argv[1:]\n"
        "try: m.run()\nfinally: print('jax' in sys.modules)"
    )
    words = ["train", f"--config={file}", "--workdir=w", "--config.seeed=1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n"
    assert done.stderr == "crcm: the configuration has no key config.seeed: did you mean config.seed?\n"
