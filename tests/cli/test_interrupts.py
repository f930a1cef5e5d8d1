"""Ctrl-C in real processes: one line, exit code 130, at any moment, and what was done is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crcm_jax import interrupts

ROOT = Path(__file__).parents[2]
SAID = "crcm: stopped"


def start(body: str) -> subprocess.Popen:
    """`crcm` whose command does `body`, which prints a line where it may be interrupted."""
    code = f"""
import sys, time
from crcm_jax import __main__ as program, interrupts
from crcm_jax.errors import UserError

def work(argv):
{body}

program.dispatch = work
program.run()
"""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def press(process: subprocess.Popen, times: int = 1, apart: float = 0.0) -> tuple[int, list[str]]:
    """(exit code, lines on stderr) after Ctrl-C, once the process has said that it is there."""
    assert process.stdout.readline().strip() == "ready"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(apart)
    _, told = process.communicate(timeout=30)
    return process.returncode, [line for line in told.splitlines() if line]


def test_in_the_midst_of_work_what_is_open_is_closed(tmp_path):
    kept = tmp_path / "kept"
    body = f"""
    try:
        print("ready"); time.sleep(60)
    finally:
        open({str(kept)!r}, "w").write("all of it")
"""
    assert press(start(body)) == (130, [SAID]) and kept.read_text() == "all of it"


def test_a_launcher_that_passes_it_on_as_well_does_not_disturb_the_closing(tmp_path):
    body = """
    try:
        print("ready"); time.sleep(60)
    finally:
        time.sleep(0.3); print("closed")
"""
    process = start(body)
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=30)
    assert (process.returncode, told.split("\n")[1], out) == (130, SAID, "closed\n")


def test_a_second_one_ends_what_does_not_listen():
    """Code that Python cannot interrupt, as a compiler's: here a regular expression that takes for ever."""
    body = """
    import re
    print("ready"); re.match(r"(a*)*b", "a" * 60)
"""
    began = time.monotonic()
    assert press(start(body), times=2, apart=interrupts._ONE + 0.3)[0] == 130
    assert time.monotonic() - began < 10


def test_a_second_one_ends_a_closing_that_takes_too_long():
    body = """
    try:
        print("ready"); time.sleep(60)
    finally:
        time.sleep(60)
"""
    assert press(start(body), times=2, apart=interrupts._ONE + 0.3) == (130, [SAID])


def test_while_a_library_loads_that_would_swallow_it(tmp_path):
    (tmp_path / "greedy.py").write_text(
        "import time\ntry:\n    print('ready')\n    time.sleep(0.6)\nexcept BaseException:\n    pass\n"
    )
    body = f"""
    sys.path.insert(0, {str(tmp_path)!r})
    import greedy
    for _ in range(600):
        time.sleep(0.1)
"""
    assert press(start(body)) == (130, [SAID])


def test_a_library_that_makes_another_error_of_it():
    body = """
    try:
        print("ready"); time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("numpy could not be loaded")
"""
    assert press(start(body)) == (130, [SAID])


def test_one_that_a_callback_swallows_comes_again():
    """As one that lands in a destructor, or in a callback of compiled code."""
    body = """
    class Slow:
        def __del__(self):
            print("ready"); time.sleep(1)
    slow = Slow()
    del slow
    try:
        for _ in range(600):
            time.sleep(0.1)
    finally:
        time.sleep(1.5)
"""
    assert press(start(body)) == (130, [SAID])


def test_while_the_interpreter_clears_up():
    body = """
    import atexit
    atexit.register(lambda: (print("ready"), time.sleep(60)))
    return 0
"""
    assert press(start(body)) == (0, [])


def test_in_the_first_moments_of_a_real_command(tmp_path):
    """Wherever it lands between the interpreter's start and JAX, there is no traceback."""
    command = [sys.executable, "-m", "crcm_jax", "evaluate", "--checkpoint=nowhere", "--steps=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ends = []
    for delay in (0.2, 0.5, 0.9):
        process = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        ends.append((process.returncode, "Traceback" in told, [line for line in told.splitlines() if line]))
    assert ends == [(130, False, [SAID])] * 3


def test_where_it_is_to_be_ignored_it_is():
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); from crcm_jax import interrupts as i\n"
        "i.install(); signal.raise_signal(signal.SIGINT); i.finish(0); print(i.seen())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.mark.parametrize("moment", ["before", "saving"])
def test_a_run(tmp_path, moment):
    """Before its first iteration nothing is lost; later the step and the save are finished; either way, 130."""
    from crcm_jax.saving import storage

    fakes = ROOT / "tests" / "train" / "train_fakes.py"
    words = {"before": ["delay=5.0"], "saving": ["train.save_every=2", "delay=0.02", "slow_save=1.0"]}[moment]
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join((str(ROOT), str(fakes.parent))),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(fakes), str(tmp_path / "run"), "train.steps=1000", "train.log_every=1", *words],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    folder = tmp_path / "run"
    seen = {
        "before": lambda: (folder / "config.json").exists(),
        "saving": lambda: any(storage.candidates(folder / storage.FOLDER)),
    }[moment]
    until = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told, told
    assert "crcm: stop" in told
    if moment != "before":
        assert storage.newest_whole(folder / storage.FOLDER) is not None
