"""Saving and restoring a run, in the background and bit for bit.

A checkpoint is a folder named by its iteration, as `storage` describes, with trees named after players,
`student.params`, `student.opt`, `student.ema` and so on, and `counters`; beside them `data.json`, where the data stood
in every process, and in `meta.json` the unfinished window of the log. It knows nothing of meshes: any number of devices
and processes can go on from it. All processes of a run write their parts of the arrays into one folder, which they must
share; the first process writes everything else.
"""

from __future__ import annotations

import base64
import contextlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from crcm_jax.errors import UserError
from crcm_jax.parallel import processes
from crcm_jax.saving import files, manifest, storage
from crcm_jax.saving.weights import load_params, save_params
from crcm_jax.train import old_checkpoints
from crcm_jax.train.identity import as_json
from crcm_jax.train.state import PlayerState, TrainState

__all__ = ["FOLDER", "Checkpoints", "load_params", "save_params"]

FOLDER = storage.FOLDER


def trees_of(state: TrainState) -> dict[str, Any]:
    """The state as the named trees that a checkpoint holds."""
    trees: dict[str, Any] = {}
    for name, player in state.players.items():
        trees[f"{name}.params"] = player.params
        # Orbax keeps no empty subtrees: a missing master copy is left out rather than stored as None.
        trees[f"{name}.opt"] = {key: value for key, value in player.opt._asdict().items() if value is not None}
        trees |= {f"{name}.{average}": tree for average, tree in player.averages.items()}
    updates = {name: player.updates for name, player in state.players.items()}
    totals = {name: getattr(state, name) for name in ("bad_samples", "skipped_updates", "bad_streak")}
    return trees | {"counters": {"iteration": state.iteration, "updates": updates, **totals}}


def state_from(trees: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `trees_of`; `like` supplies players and types."""
    counters = dict(trees["counters"])
    updates = counters.pop("updates")

    def player(name, old):
        opt = type(old.opt)(**({"master": None} | trees[f"{name}.opt"]))
        averages = {average: trees[f"{name}.{average}"] for average in old.averages}
        return PlayerState(trees[f"{name}.params"], opt, updates[name], averages)

    return TrainState(players={name: player(name, old) for name, old in like.players.items()}, **counters)


def _encode(data_state: Any) -> str:
    if isinstance(data_state, bytes):
        return json.dumps({"bytes": base64.b64encode(data_state).decode()})
    return json.dumps({"json": data_state})


def _together(encoded: list[str]) -> str:
    """The data states of all processes; of those that are all the same, one."""
    return encoded[0] if len(set(encoded)) == 1 else json.dumps({"processes": encoded})


def _decode(text: str) -> Any:
    """This process's data state. Where all were the same, it serves any number of processes."""
    kind, value = next(iter(json.loads(text).items()))
    if kind == "processes":
        if len(value) != jax.process_count():
            raise UserError(
                f"the checkpoint holds a data position for each of {len(value)} processes, and they differ: go on with "
                f"as many processes, not {jax.process_count()}"
            )
        return _decode(value[jax.process_index()])
    return base64.b64decode(value) if kind == "bytes" else value


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run: saved in the background, one at a time; the last `keep` whole ones stay."""

    def __init__(self, workdir: Path, config, keep: int = 2):
        self.parent = workdir / FOLDER
        self.config = as_json(config)
        self.keep = max(1, keep)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._saved: int | None = None

    def save(self, state: TrainState, data_state: Any, log_state: Any) -> None:
        """Starts a save of everything that is needed to go on bit for bit; waits for the save before it.

        Returns when the state may be donated. A failure is raised by `check`, `wait` or the next `save`.
        """
        self.wait()
        iteration = int(jax.device_get(state.iteration))
        if iteration == self._saved:
            return
        folder = self.parent / f"{iteration:09d}"
        meta = {
            "format": storage.FORMAT,
            "iteration": iteration,
            "training": self.config.get("training"),
            "model": self.config.get("model"),
            "config": self.config,
            "log": log_state,
            "jax": jax.__version__,
        }

        def prepare():
            try:
                if folder.exists():
                    manifest.discard(folder)  # half-written or damaged: a whole one would have been restored
                folder.mkdir(parents=True)
            except OSError as error:
                raise self._failure(error, folder) from error

        processes.decided_by_first(prepare)
        positions = _together(processes.gather(_encode(data_state)))
        try:
            response = storage.write_trees(folder, trees_of(state))
        except Exception as error:
            raise self._failure(error, folder) from error

        def finish():
            try:
                # Every process's part; and first, so that nobody writes any more when a failure clears the folder.
                response.result()
                if processes.is_first():
                    manifest.write_text(folder / "data.json", positions)
                    manifest.write_text(folder / "meta.json", json.dumps(meta, indent=1))
                    manifest.seal(folder)
            except Exception as error:
                raise self._failure(error, folder) from error
            self._saved = iteration
            if processes.is_first():
                self._prune(iteration)

        self._pending = self._worker.submit(finish)

    def _failure(self, error: Exception, folder: Path) -> UserError:
        kept = [path for path in storage.candidates(self.parent) if path != folder and manifest.is_sealed(path)]
        before = f"the checkpoint before it, {kept[0]}, is intact" if kept else "there is no checkpoint before it"
        full = files.is_full(error)
        reason = "the disk is full" if full else f"{type(error).__name__}: {error}".splitlines()[0]
        if folder.exists() and processes.is_first():
            manifest.discard(folder)
        mend = "free some space" if full else "mend that"
        return UserError(f"cannot write checkpoint {folder}: {reason}; {before}; {mend} and run the same command again")

    def _prune(self, newest: int) -> None:
        """Deletes all but the last `keep` whole checkpoints up to iteration `newest`, which has just been sealed.

        Later ones can only be left from before the run went back to an earlier checkpoint: damaged, or half-written.
        """
        folders = storage.candidates(self.parent)
        kept = [folder for folder in folders if int(folder.name) <= newest and manifest.is_sealed(folder)][: self.keep]
        for folder in folders:
            if folder not in kept:
                manifest.discard(folder)

    def check(self) -> None:
        """Raises if a save has failed since the last call; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns once no save is under way; UserError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for a save under way and reports its failure."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def __exit__(self, kind, error, trace) -> None:
        # Where a collective has failed another process is gone, and its part of a save under way will never come.
        if jax.process_count() == 1 or not isinstance(error, RuntimeError):
            self.close()

    def restore(self, like: TrainState) -> tuple[TrainState, Any, Any] | None:
        """(state, data state, log state) of the last whole checkpoint, in `like`'s shapes, types and shardings; None if
        the run has none. UserError if it is of another training type or architecture."""
        found = processes.decided_by_first(lambda: str(storage.newest_whole(self.parent) or ""))
        if not found:
            return None
        folder = Path(found)
        meta = storage.read_meta(folder)
        if meta["training"] != self.config.get("training"):
            raise UserError(
                f"{folder} is of training type {meta['training']!r}, this run is {self.config.get('training')!r}: "
                "choose another --workdir"
            )
        trees = trees_of(like)
        wanted = old_checkpoints.wanted(trees) if meta["format"] == 1 else trees
        stored = storage.stored_shapes(folder)
        for name in wanted:
            flaw = storage.first_difference(stored.get(name, {}), wanted[name])
            if flaw:
                raise UserError(f"{folder} is of another architecture: {name}: {flaw}")
        found = storage.read_trees(folder, storage.abstract(wanted))
        state = state_from(old_checkpoints.converted(found, trees) if meta["format"] == 1 else found, like)
        self._saved = meta["iteration"]
        return state, _decode((folder / "data.json").read_text(encoding="utf-8")), meta["log"]
