"""How the processes of a run meet before JAX is told of each other: what JAX ends a process over is a sentence here.

Process 0 listens where JAX will listen later; the others come, say their numbers, and go on together. Nothing is asked
of the network that JAX does not need as well.
"""

from __future__ import annotations

import contextlib
import socket
import time

from crcm_jax.errors import UserError

_HELLO = "crcm process"
_GO = "go"
_NO = "no: "
_LONGEST = 1000
"""Bytes of a line that is read from whoever connects."""
_PATIENCE = 5.0
"""Seconds in which one who has connected must say a number."""


def meet(coordinator: str, count: int, index: int, wait: float) -> None:
    """Returns when all `count` processes have come to `coordinator`, host:port, which is free again then.

    UserError within about `wait` seconds if they do not come, cannot be reached, were told of another number of
    processes or have the same number, or if the port is taken.
    """
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + wait
    if count == 1:
        _listen(coordinator, int(port)).close()
    elif index == 0:
        with _listen(coordinator, int(port)) as server:
            _gather(server, coordinator, count, wait, until)
    else:
        _come(host.strip("[]"), int(port), f"{_HELLO} {index} of {count}\n", wait, until)


def _listen(coordinator: str, port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(
            f"process 0 cannot listen at port {port} of this machine ({why}): choose another port, "
            f"--coordinator={coordinator.rpartition(':')[0]}:PORT"
        ) from None


def _gather(server: socket.socket, coordinator: str, count: int, wait: float, until: float) -> None:
    """Process 0's part: lets everybody go once all are there."""
    with contextlib.ExitStack() as stack:
        came: dict[int, socket.socket] = {}
        while len(came) < count - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                peer = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in came)
                raise UserError(
                    f"process {missing} of {count} did not come to {coordinator} within {wait:g} s: start every "
                    "--process from 0 to --processes − 1, and check that the others reach that host and port"
                ) from None
            words = _read(peer, _PATIENCE).split()
            if len(words) != 5 or " ".join(words[:2]) != _HELLO or not (words[2].isdecimal() and words[4].isdecimal()):
                # Whoever looks for open ports, and not one of ours.
                peer.close()
                continue
            index, told = int(words[2]), int(words[4])
            if told != count:
                why = f"process {index} was told of {told} processes and process 0 of {count}"
                _tell([*came.values(), peer], f"{_NO}{why}: give the same --processes everywhere\n")
                raise UserError(f"{why}: give the same --processes everywhere")
            if not 0 < index < count or index in came:
                _tell([peer], f"{_NO}another process has the number {index}: give each its own --process\n")
                continue
            came[index] = peer
        _tell(came.values(), f"{_GO}\n")
        # They hang up first: the port is then free at once.
        for peer in came.values():
            _read(peer, 1.0)


def _come(host: str, port: int, hello: str, wait: float, until: float) -> None:
    """The part of every other process."""
    reason = "nobody listens there"
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as peer:
                peer.sendall(hello.encode())
                answer = _read(peer, max(until - time.monotonic(), 0.001))
        except OSError as error:
            reason, answer = (error.strerror or str(error)).lower(), ""
        if answer == _GO:
            return
        if answer.startswith(_NO):
            raise UserError(answer.removeprefix(_NO))
        if answer:
            raise UserError(f"another program answers at {host}:{port}: choose another port for --coordinator")
        time.sleep(min(0.2, max(until - time.monotonic(), 0)))
    raise UserError(
        f"not all processes met at {host}:{port} within {wait:g} s ({reason}): check --coordinator, that its host and "
        "port can be reached, and that every --process from 0 to --processes − 1 was started"
    )


def _read(peer: socket.socket, seconds: float) -> str:
    """A line, or what came of one before the other side hung up or time was over."""
    until, heard = time.monotonic() + seconds, b""
    with contextlib.suppress(OSError):
        while b"\n" not in heard and len(heard) < _LONGEST:
            peer.settimeout(max(until - time.monotonic(), 0.001))
            more = peer.recv(_LONGEST)
            if not more:
                break
            heard += more
    return heard.decode(errors="replace").strip()


def _tell(peers, line: str) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(line.encode())
