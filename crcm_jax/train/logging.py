"""What a run tells while it goes: a progress bar, metrics.jsonl, TensorBoard scalars.

Metrics stay on the device until the next step has been handed to it, so logging never makes the device wait.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from crcm_jax.errors import UserError
from crcm_jax.saving import manifest

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"
STREAK_LIMIT = 3
"""So many iterations in a row without a finite loss end the run."""

_SUMS = ("bad_samples", "skipped", "damaged_examples")
_LAST = ("lr",)


class RunLog:
    """Means over windows of `every` iterations, one JSON line each; counts are summed, the learning rate is the last.

    A line holds nothing that depends on the clock: a run that was interrupted and went on leaves the same file as one
    that was not. Speed goes to the progress bar and to TensorBoard.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        total: int,
        every: int,
        window: dict[str, Any] | None = None,
        *,
        sections: Mapping[str, str],
        quiet: bool = False,
    ):
        """`start`: iterations done, lines after which are dropped; `window`: `state()` of the run that did them.

        sections: where the configuration has each player's optimiser.
        quiet: only keeps the window, and ends the run when it must, for a process that does not speak for all.
        """
        self.every = max(1, every)
        self._sections = sections
        self._window: dict[str, list[float]] = {key: list(value) for key, value in (window or {}).items()}
        self._pending: tuple[int, str, dict[str, jax.Array], dict[str, int]] | None = None
        self._shown: dict[str, str] = {}
        self._waited = 0.0
        self._files = None if quiet else _Files(workdir, start)
        looks = {"unit": "it", "dynamic_ncols": True, "smoothing": 0.05, "disable": quiet}
        self._bar = tqdm(total=total, initial=start, desc=workdir.name, **looks)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what takes the next batch. The bar and TensorBoard tell which share of a window's time that was; the
        devices work on the iteration before meanwhile, so that it costs nothing until it is longer than one."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def push(self, iteration: int, player: str, metrics: dict[str, jax.Array], counts: dict[str, int]) -> None:
        """Takes the metrics of the iteration just dispatched (`iteration` counts it), reads those of the one before."""
        previous, self._pending = self._pending, (iteration, player, metrics, counts)
        if previous is not None:
            self._read(*previous)

    def flush(self) -> None:
        """Reads what is pending and puts every line on the disk."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._read(*previous)
        if self._files:
            self._files.sync()

    def state(self) -> dict[str, Any]:
        """The unfinished window, as JSON; call `flush` first."""
        return {key: list(value) for key, value in self._window.items()}

    def _read(self, iteration: int, player: str, metrics: dict[str, jax.Array], counts: dict[str, int]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        streak = values.pop("bad_streak", 0.0)
        for name, value in values.items():
            self._add(f"{player}/{name}", value)
        self._bar.update(1)
        if math.isfinite(values["loss"]):
            self._shown[f"{player} loss"] = f"{values['loss']:.4g}"
            self._bar.set_postfix(self._shown, refresh=False)
        if iteration % self.every == 0:
            self._write(iteration, counts)
        if streak >= STREAK_LIMIT:
            raise UserError(
                f"the {player}'s loss was not finite for any sample in {STREAK_LIMIT} iterations running, up to "
                f"iteration {iteration}: lower {self._sections[player]}.lr or look at the data; the last checkpoint is "
                "kept"
            )

    def _add(self, key: str, value: float) -> None:
        entry = self._window.setdefault(key, [0.0, 0.0])
        if _name(key) in _LAST:
            entry[:] = [value, 1.0]
        elif math.isfinite(value):
            entry[0] += value
            entry[1] += 1.0

    def _write(self, iteration: int, counts: dict[str, int]) -> None:
        line: dict[str, Any] = {"iteration": iteration, **counts}
        for key in sorted(self._window):
            total, count = self._window[key]
            if _name(key) in _SUMS:
                line[key] = int(total)
            else:
                # Every sample of the window was bad: there is no number to give, and NaN is not JSON.
                line[key] = total / count if count else None
        waited, self._window, self._waited = self._waited, {}, 0.0
        if self._files:
            share = self._files.write(line, waited)
            self._shown["waiting for data"] = f"{share:.2%}"

    def close(self) -> None:
        """Ends the bar and closes the files; what is pending and was not flushed is lost."""
        self._bar.close()
        if self._files:
            self._files.close()


class _Files:
    """metrics.jsonl and TensorBoard's folder of a run that has done `start` iterations."""

    def __init__(self, workdir: Path, start: int):
        path = workdir / JSONL
        if path.exists():
            manifest.write_text(path, _lines_until(path, start))
        self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._board = _Board(workdir / TENSORBOARD, start)
        self._clock = (time.perf_counter(), start)

    def write(self, line: dict[str, Any], waited: float) -> float:
        """One window's line; returns which share of its time the `waited` seconds were."""
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        iteration = line["iteration"]
        for key, value in line.items():
            if key != "iteration" and value is not None:
                self._board.scalar(key, value, iteration)
        now, then = time.perf_counter(), self._clock
        took = max(now - then[0], 1e-9)
        self._board.scalar("iterations_per_second", (iteration - then[1]) / took, iteration)
        self._board.scalar("waiting_for_data", waited / took, iteration)
        self._board.flush()
        self._clock = (now, iteration)
        return waited / took

    def sync(self) -> None:
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        self._lines.close()
        self._board.close()


class _Board:
    """TensorBoard's event file, written in step with the run: tensorboardX's usual writer has a thread and a bounded
    queue, and blocks for ever once a full disk has ended the thread."""

    def __init__(self, folder: Path, start: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if start:
            # Tells TensorBoard to drop what an interrupted run wrote after its last checkpoint.
            session = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=session))

    def scalar(self, name: str, value: float, iteration: int) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=iteration, summary=summary.scalar(name, value)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _lines_until(path: Path, iteration: int) -> str:
    """The lines of a metrics file up to `iteration`; a last line that a kill cut short is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["iteration"] > iteration:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        kept.append(line + "\n")
    return "".join(kept)
