"""What `pip install` of the wheel puts on a machine, and that it works far from a checkout."""

import email.parser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from crcm_jax.cli import _configs

ROOT = Path(__file__).parents[2]
SOURCES = ("crcm_jax", "pallas_kernels", "configs", "convert", "tests", "benchmarks")
FILES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt")
TINY = {
    "data.frames": 3, "data.height": 4, "data.width": 4, "data.digit_size": 4, "data.batch_size": 2, "model.dim": 16,
    "model.ffn_dim": 16, "model.heads": 2, "model.layers": 1, "model.freq_dim": 8, "model.patch": "(1, 2, 2)",
    "train.steps": 1, "train.sample_every": 0,
}  # fmt: skip


def pip(*words):
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder in which the wheel lies, beside nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a build leaves files, and takes those of earlier ones: not in this checkout
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    pip("wheel", str(tree), "--no-build-isolation", f"--wheel-dir={folder}")
    (wheel,) = folder.glob("*.whl")
    pip("install", str(wheel), f"--target={folder / 'site'}")
    return folder / "site"


@pytest.fixture(scope="module")
def crcm(installed, tmp_path_factory):
    """Runs the installed command in a folder that holds nothing but what it writes; returns what it printed."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(installed)}

    def run(*words, code=0):
        done = subprocess.run(
            [sys.executable, installed / "bin" / "crcm", *words], cwd=cwd, env=env, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr[-2000:]
        return done.stdout + done.stderr

    run.cwd, run.env = cwd, env
    return run


def test_nothing_but_the_two_packages_stands_at_the_top(installed):
    found = {entry.name for entry in installed.iterdir() if entry.suffix != ".dist-info"}
    assert found == {"bin", "crcm_jax", "pallas_kernels"}
    assert not [path for path in installed.rglob("*") if path.is_symlink()]
    for name in ("configs/digits.py", "convert/tables/umt5.py", "evaluate/report.html"):
        assert (installed / "crcm_jax" / name).is_file()
    assert (installed / "crcm_jax/assets/digits_teacher.safetensors").is_file()


def test_what_running_needs_holds_nothing_for_tests_or_the_demo(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    needs = email.parser.Parser().parsestr(metadata.read_text()).get_all("Requires-Dist")
    core = {re.split(r"[<>=]", line)[0] for line in needs if "extra ==" not in line}
    tests_and_demo = {"pytest", "pytest-xdist", "ruff", "mypy", "beartype", "scikit-learn", "matplotlib", "imageio"}
    assert {"jax", "flax", "grain", "orbax-checkpoint"} <= core
    assert not core & {*tests_and_demo, "imageio-ffmpeg", "tensorflow-datasets"}


def test_the_command_trains_and_samples_in_an_empty_folder(crcm):
    code = "import crcm_jax, crcm_jax.convert.engine as e; print(crcm_jax.__version__, e.__file__)"
    told = subprocess.check_output([sys.executable, "-c", code], cwd=crcm.cwd, env=crcm.env, text=True)
    version, file = told.split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version) and file.startswith(crcm.env["PYTHONPATH"])
    assert "crcm train" in crcm("--help")
    words = [f"--config.{key}={value}" for key, value in TINY.items()]
    crcm("train", "--config=digits:tf", "--workdir=run", *words)
    crcm("sample", "--checkpoint=run", "--prompt=a three moves up", "--ode=2", "--out=three.png")
    with Image.open(crcm.cwd / "three.png") as image:
        assert image.size[0] > 3 * 4


def test_a_configuration_by_name(crcm):
    assert _configs.names() == ["digits", "wan2_1", "wan_shapes"]
    told = crcm("train", "--config=digit:tf", "--workdir=run", code=2)
    assert "no configuration file digit" in told and "digits, wan2_1, wan_shapes" in told
    (crcm.cwd / "digits").write_text("raise ValueError('a file of that name goes first')")
    assert "goes first" in crcm("train", "--config=digits", "--workdir=run", code=2)
