"""The processes of one run: how they find each other, share a batch, agree and stop. One process is the simplest case.

What they agree upon travels by the devices' own collectives, and so in the same order on every process as the steps do.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crcm_jax import interrupts
from crcm_jax.errors import UserError
from crcm_jax.parallel import meeting, witness

T = TypeVar("T")

_LOST = re.compile(r"(?i)gloo|nccl|connection (closed|reset|refused)|peer|socket|UNAVAILABLE|ABORTED|barrier")

SILENCE = 60
"""Seconds without a sign of life after which a process counts as dead."""


class ToldByFirst(UserError):
    """An error that the first process has met, and tells; the others need not repeat it."""


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None, wait: int = 300) -> int:
    """Makes this process one of several and returns its number. To be called before JAX touches a device.

    coordinator: host:port at which process 0 listens; count, index: how many processes there are, and which this is.
    All None: the cluster's environment knows (TPU VMs, GKE, Slurm, Open MPI); UserError if it does not. wait: seconds.
    UserError too if the port is taken or not all come in time, but where the environment knows: there JAX itself ends
    the process (see `witness`).
    """
    if coordinator is not None and count is not None and index is not None:
        meeting.meet(coordinator, count, index, wait)
    # Signals are this program's own to handle (`StopSignal`).
    jax.config.update("jax_enable_preemption_service", False)
    # At the end all wait for the first, which may have much to put its seal on; the dead are noticed even then.
    waits: dict[str, Any] = {
        "initialization_timeout": wait,
        "heartbeat_timeout_seconds": SILENCE,
        "shutdown_timeout_seconds": 86_400,
    }
    try:
        jax.distributed.initialize(coordinator, count, index, **waits)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run cannot be joined ({str(error).splitlines()[0]}): give --coordinator=HOST:PORT, "
            "--processes=N and --process=I"
        ) from error
    return jax.process_index()


def leave() -> None:
    """Waits for the others to be done as well."""
    jax.distributed.shutdown()


def explain(error: BaseException, index: int | None) -> tuple[str, int]:
    """(what to say of why process `index`, or None for as JAX numbers it, ends with `error`; its exit code).

    What the first process says for all is not repeated. An error of the runtime while others compute the same is most
    likely a peer's end: collectives fail then, where they can notice.
    """
    if isinstance(error, ToldByFirst):
        return "", error.exit_code
    if index is None and jax.distributed.is_initialized():
        index = jax.process_index()
    me = "crcm" if index is None else f"crcm [process {index}]"
    if isinstance(error, UserError):
        return f"\n{me}: {error}\n", error.exit_code
    if isinstance(error, KeyboardInterrupt) or interrupts.seen():
        return f"\n{me}: stopped\n", interrupts.CODE
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return f"\n{me}: {witness.LOST} ({str(error).splitlines()[0][:300]})\n", UserError.exit_code
    return f"\n{me}:\n" + "".join(traceback.format_exception(error)), 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """What every process has to say, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(data)] = data
    return [bytes(row[:n]).decode() for row, n in zip(multihost_utils.process_allgather(padded), lengths)]


def decided_by_first(decide: Callable[[], T]) -> T:
    """What `decide` (a value that JSON can hold) gives on the first process, where alone it is called.

    A UserError there ends them all: here as it is, elsewhere as `ToldByFirst`.
    """
    if jax.process_count() == 1:
        return decide()
    answer, failure = {}, None
    if is_first():
        try:
            answer = {"value": decide()}
        except UserError as error:
            answer, failure = {"error": str(error)}, error
    answer = json.loads(gather(json.dumps(answer))[0])
    if failure is not None:
        raise failure
    if "error" in answer:
        raise ToldByFirst(answer["error"])
    return answer["value"]


def rows(sharding: jax.sharding.Sharding, size: int) -> list[int]:
    """Which rows of a batch of `size` lie on this process's devices, ascending; several may hold the same ones."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for index in slices if index for row in range(*index[0].indices(size))})


def place(local: Any, sharding: jax.sharding.Sharding, size: int) -> Any:
    """A batch of `size` on the devices, of which each process gives its `rows` (numpy, in a tree)."""
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)
    mine = np.array(rows(sharding, size))

    def leaf(x):
        def piece(index):
            first, end, _ = index[0].indices(size)
            return x[slice(*np.searchsorted(mine, (first, end)))]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, piece)

    return jax.tree.map(leaf, local)


def whole(tree: Any) -> Any:
    """A tree of arrays as the first process can use it alone: whole, in its memory. Others get a copy they can drop."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


class StopSignal(contextlib.AbstractContextManager):
    """`agreed()` turns true on SIGTERM or SIGINT, on all processes before the same iteration.

    One process stops at once. Several cast a vote before each step, a sum of one number a device that is read an
    iteration later, when it is long known: nothing waits for it, and the run stops two iterations after the signal. A
    second signal acts as if this were not here. Ctrl-C is noted, so that the exit code can tell of it.
    """

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}
        self._cast: jax.Array | None = None
        everyone = Mesh(np.array(jax.devices()), ("device",))
        self._each = NamedSharding(everyone, P("device"))
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(everyone, P()))

    def agreed(self) -> bool:
        """Whether to stop; to be called once before each iteration."""
        if jax.process_count() == 1:
            return self.requested
        ballot = jax.make_array_from_callback(
            (self._each.mesh.size,), self._each, lambda _: np.array([self.requested], np.int32)
        )
        before, self._cast = self._cast, self._sum(ballot)
        stop = before is not None and int(before) > 0
        if stop and not self.requested and is_first():
            print("\ncrcm: another process was told to stop: saving", file=sys.stderr, flush=True)
        return stop

    def _request(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:
            interrupts.note()
        print("\ncrcm: stopping: finishing the step and saving", file=sys.stderr, flush=True)
        signal.signal(number, self._before[number])

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            # Python delivers signals to the main thread alone; elsewhere the caller has to handle them.
            with contextlib.suppress(ValueError):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)
