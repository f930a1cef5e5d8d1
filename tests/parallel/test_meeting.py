"""The processes of a run meet, or each says in one sentence why not, within the time that they were given."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from crcm_jax.errors import UserError
from crcm_jax.parallel.meeting import meet

WAIT = 1.5


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(port, *processes, wait=WAIT, late=None):
    """What becomes of each (count, index): nothing, or a sentence. late: one that comes after the others."""

    def come(process):
        time.sleep(0.4 if process == late else 0)
        try:
            meet(f"127.0.0.1:{port}", *process, wait)
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)

    began = time.monotonic()
    with ThreadPoolExecutor(len(processes)) as pool:
        ends = list(pool.map(come, processes))
    assert time.monotonic() - began < wait + 2
    return ends


@pytest.mark.parametrize("late", [None, (4, 0), (4, 2)])
def test_all_come_in_whatever_order_and_the_port_is_free_again(port, late):
    assert together(port, *((4, i) for i in range(4)), late=late) == [None] * 4
    with socket.create_server(("", port)):
        pass


def test_a_port_in_use(port):
    for host in ("127.0.0.1", ""):
        with socket.create_server((host, port)):
            for count in (1, 2):
                (told,) = together(port, (count, 0))
                assert f"cannot listen at port {port}" in told and "address already in use" in told
                assert "choose another port, --coordinator=127.0.0.1:PORT" in told


def test_no_coordinator(port):
    (told,) = together(port, (2, 1))
    assert "not all processes met at 127.0.0.1" in told and "within 1.5 s (connection refused)" in told


def test_some_never_come(port):
    first, other = together(port, (4, 0), (4, 2))
    assert "process 1, 3 of 4 did not come" in first and "not all processes met" in other


def test_the_same_number_twice(port):
    ends = together(port, (3, 0), (3, 1), (3, 1))
    assert "process 2 of 3 did not come" in ends[0]
    assert sum("another process has the number 1" in end for end in ends[1:]) == 1


def test_different_counts(port):
    for told in together(port, (3, 0), (2, 1)):
        assert told == "process 1 was told of 2 processes and process 0 of 3: give the same --processes everywhere"


def test_strangers_do_not_disturb_and_are_not_taken_for_the_coordinator(port):
    def knock():
        time.sleep(0.2)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff" * 700):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(words)

    thread = threading.Thread(target=knock)
    thread.start()
    assert together(port, (2, 0), (2, 1), late=(2, 1), wait=5) == [None, None]
    thread.join()

    with socket.create_server(("127.0.0.1", port)) as other:

        def answer():
            peer = other.accept()[0]
            peer.sendall(b"220 mail.example.org ESMTP\r\n")
            time.sleep(0.5)
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert "another program answers" in together(port, (2, 1))[0]
        thread.join()
