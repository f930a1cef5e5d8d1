"""Says in one sentence why one process of several has ended, where it cannot say so itself.

Where a coordinator or a peer is gone, JAX ends a process from within its runtime: no exception, but a log line and a
stack trace; a killed process says nothing. So each has a witness, a small program that outlives it: the process's
standard error passes through it, and what it says last is put into words.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys

_GO_ON = "; the same command on every process goes on from the last checkpoint"

LOST = "another process has ended or cannot be reached" + _GO_ON

_RUNTIME = re.compile(rb"^[EF]\d{4} .*(coordination_service\w*\.cc|/?client\.h):\d+\]")
"""The runtime's last words: a process that has begun them does not go on."""

PEACE = "peace"

HELD_BACK = 10
"""Seconds in which a process that has begun them must end."""

_MEANINGS = (
    (
        r"DEADLINE_EXCEEDED",
        "not all processes met at the coordinator in time: check --coordinator, that its host and port can be reached, "
        "and that every --process from 0 to --processes − 1 was started",
    ),
    (r"ALREADY_EXISTS|newer incarnation", "another process has the same number: give each its own --process"),
    (
        r"Unexpected task registered",
        "the coordinator was told of fewer processes: give the same --processes everywhere",
    ),
    (
        r"(?s)stopped sending heartbeats\)?:\s*(?P<who>\d+(?:\s+\d+)*)\s",
        "process {who} has ended or cannot be reached" + _GO_ON,
    ),
    (
        r"Failed to send RPC to coordination service",
        "process 0, the coordinator, has ended or cannot be reached" + _GO_ON,
    ),
    (r"", LOST),
)


def meaning(words: str) -> str:
    """One sentence for what the runtime said last; for silence, that the process was killed."""
    if not words:
        return "this process was killed or crashed" + _GO_ON
    for pattern, sentence in _MEANINGS:
        if found := re.search(pattern, words):
            return sentence.format(**{name: ", ".join(who.split()) for name, who in found.groupdict().items()})
    raise AssertionError("the last pattern matches everything")


class Witness:
    """The witness of this process, from now until `dismiss`."""

    def __init__(self, process: str):
        """process: what the sentence calls it."""
        listening, speaking = os.pipe()
        command = [sys.executable, "-P", __file__, process, str(listening)]
        # A session of its own: what a terminal or a scheduler sends to the process is not meant for it.
        self._program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listening], start_new_session=True
        )
        os.close(listening)
        sys.stderr.flush()
        self._real = os.dup(2)
        os.dup2(speaking, 2)
        os.close(speaking)

    def rename(self, process: str) -> None:
        """What the sentence shall call the process from now on."""
        assert self._program.stdin is not None  # it was opened with one
        self._program.stdin.write(f"{process}\n".encode())
        self._program.stdin.flush()

    def dismiss(self, last_words: str = "") -> None:
        """The process ends in peace, or says itself why it ends, at once: then what else it utters is not passed on."""
        sys.stderr.flush()
        os.write(self._real, last_words.encode())
        if not last_words:
            os.dup2(self._real, 2)
        self._program.communicate(PEACE.encode())


def main(process: str, listening: int) -> None:
    """Passes on what comes from `listening` until standard input is closed; speaks unless there was peace.

    What might be the runtime's last words is held back, until it turns out that they were not.
    """
    life, words, rest, last = sys.stdin.fileno(), b"", b"", b""
    sources = {listening, life}
    while sources:
        # After the end, what is still in the pipe, without waiting for children of the process that hold it open.
        ready = select.select(sources, [], [], 0 if life not in sources else HELD_BACK if last else None)[0]
        if not ready and life not in sources:
            break
        if not ready:
            os.write(2, last + rest)
            last = rest = b""
        if life in ready:
            words += (heard := os.read(life, 99))
            sources -= set() if heard else {life}
        if listening in ready:
            chunk = os.read(listening, 1 << 16)
            sources -= set() if chunk else {listening}
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if last or _RUNTIME.match(line):
                    last += line + b"\n"
                else:
                    os.write(2, line + b"\n")
            # A progress bar ends no line; the runtime ends each of its own.
            if not last and not re.match(rb"[EF]\d", rest):
                os.write(2, rest)
                rest = b""
    *_, said = [process, *words.decode().split()]
    if said != PEACE:
        reason = meaning((last + rest).decode(errors="replace"))
        os.write(2, f"\ncrcm [process {said}]: {reason}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
