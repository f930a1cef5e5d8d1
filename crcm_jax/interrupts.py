"""Ctrl-C, at any moment: one line, exit code 130, and what was done is kept.

The first raises KeyboardInterrupt in the main thread, so that everything is closed on the way out; but while a library
loads it ends the process at once: raised within, some libraries swallow it and others make another error of it. Where
it lands in a callback of compiled code it is swallowed as well, and raised again. A second one ends the process at once
whatever it does, from a thread of its own, so that compiled code cannot hold it up. Every file is written whole or not
at all, so that nothing is lost by an end at once either.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

CODE = 130
"""The exit code of an interrupted command, as shells have it."""

_ONE = 0.5
"""Seconds within which two signals are one: a terminal and a launcher may both pass on the same Ctrl-C."""
_SWALLOWED = 0.5
"""Seconds after which an interruption that nobody deals with was swallowed."""
_LINE = b"\ncrcm: stopped\n"

before_exit: list[Callable[[], None]] = []
"""What is to be done before the process ends at once: quick, and from any thread."""

_seen = _again = False
_raised: float | None = None


def seen() -> bool:
    """Whether the user has asked to stop."""
    return _seen


def note() -> None:
    """The user has asked to stop; for those who handle the signal themselves for a while."""
    global _seen
    _seen = True


def install() -> None:
    """Takes over Ctrl-C for the rest of the process. From the main thread, before anything slow is imported.

    Where whoever started the process had it ignore Ctrl-C, as of a job in a shell's background, it goes on to.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _stop)
    told = sys.unraisablehook
    # One that is swallowed is no news.
    sys.unraisablehook = lambda event: None if event.exc_type is KeyboardInterrupt else told(event)
    threading.Thread(target=_watch, args=(reading,), daemon=True, name="interrupts").start()


def finish(code: int) -> None:
    """Work is over: from now on Ctrl-C spares the user the wait for threads and libraries to be cleared away.

    After work was broken off nobody waits for them at all: computations that still run would find their libraries gone.
    """
    if _raised is not None:
        _leave()
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))


def say() -> None:
    """The line that tells of it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, _LINE)


def _stop(number: int, frame: FrameType | None) -> None:
    global _raised, _again
    if _loading(frame):
        _end()
    if _again or not _seen:
        note()
        _raised, _again = time.monotonic(), False
        raise KeyboardInterrupt


def _loading(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def _watch(reading: int) -> None:
    """Ends the process at a second Ctrl-C; raises the first again if it was swallowed."""
    global _again
    main, first, own = threading.main_thread().ident, None, 0
    while True:
        ready, _, _ = select.select([reading], [], [], None if first is None else _SWALLOWED / 5)
        now = time.monotonic()
        for number in os.read(reading, 64) if ready else b"":
            if number != signal.SIGINT:
                continue
            if own:
                own -= 1
            elif first is not None and now - first > _ONE:
                _end()
            else:
                first = first or now
        if _raised is not None and not _again and now - _raised > _SWALLOWED and not _dealt_with(main):
            _again, own = True, own + 1
            signal.raise_signal(signal.SIGINT)


def _dealt_with(thread: int | None) -> bool:
    """Whether a thread is on its way out, closing what is open, because of a KeyboardInterrupt."""
    found: Any = None if thread is None else sys._current_exceptions().get(thread)
    error = found[1] if isinstance(found, tuple) else found
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _end() -> NoReturn:
    for last in before_exit:
        with contextlib.suppress(Exception):
            last()
    os.write(2, _LINE)
    _leave()


def _leave() -> NoReturn:
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.terminate()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(CODE)
