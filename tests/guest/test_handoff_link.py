"""Orders to a VMM that answers late, wrong, or not at all."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import GuestError
from engine.guest.handoff_link import LINE_BYTES_MAX, VmmLink
from tests.support import WAIT_S


@contextlib.contextmanager
def linked() -> Iterator[tuple[VmmLink, socket.socket, threading.Event]]:
    """Our end, the VMM's, and whether the end of the connection was told."""
    ours, theirs = socket.socketpair()
    has_ended = threading.Event()
    link = VmmLink(ours, "VMM", has_ended.set)
    theirs.settimeout(WAIT_S)
    with theirs:
        try:
            yield link, theirs, has_ended
        finally:
            link.close()


def test_answers_are_told_apart_by_their_numbers() -> None:
    with linked() as (link, theirs, _):
        one, two = link.order("status"), link.order("save", limit=5)
        first, second = [json.loads(line) for line in read_lines(theirs, 2)]
        assert first == {"id": one, "execute": "status"}
        assert second == {"id": two, "execute": "save", "limit": 5}
        theirs.send(b'{"id":%d,"size":7}\n{"id":%d,"running":true}\n' % (two, one))

        assert link.answer(one, "status", WAIT_S).running is True
        assert link.answer(two, "save", WAIT_S).size == 7


def read_lines(connection: socket.socket, count: int) -> list[bytes]:
    buffer = b""
    while buffer.count(b"\n") < count:
        buffer += connection.recv(4096)
    return buffer.splitlines()


def test_a_refusal_is_told_in_one_line() -> None:
    with linked() as (link, theirs, _):
        number = link.order("pause")
        theirs.send(b'{"id":%d,"error":"a\\nb"}\n' % number)

        with pytest.raises(GuestError, match=r"^VMM refused 'pause': a\\nb$"):
            link.answer(number, "pause", WAIT_S)


def test_who_does_not_answer_is_not_waited_for_and_may_answer_late() -> None:
    with linked() as (link, theirs, has_ended):
        number = link.order("pause")
        with pytest.raises(GuestError, match=r"did not do 'pause': no answer in 0.01 s"):
            link.answer(number, "pause", 0.01)
        theirs.send(b'{"id":%d}\n' % number)
        again = link.order("status")
        theirs.send(b'{"id":%d}\n' % again)

        assert link.answer(again, "status", WAIT_S).id == again
        assert not has_ended.is_set()


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"\n", "something else"),
        (b"{}\n", "missing required field `id`"),
        (b'{"id":"1"}\n', "Expected `int`"),
        (b"x" * (LINE_BYTES_MAX + 4096), "more than 4096 bytes in a line"),
        (None, "it has hung up"),
    ],
    ids=["blank", "no-number", "text", "too-long", "hangs-up"],
)
def test_nonsense_ends_the_connection_and_all_that_wait(said: bytes | None, says: str) -> None:
    with linked() as (link, theirs, has_ended):
        number = link.order("status")
        if said is None:
            theirs.shutdown(socket.SHUT_RDWR)
        else:
            theirs.sendall(said)

        with pytest.raises(GuestError, match=says) as caught:
            link.answer(number, "status", WAIT_S)
        assert "\n" not in str(caught.value)
        assert has_ended.wait(WAIT_S)
        with pytest.raises(GuestError, match="takes no orders"):
            link.order("resume")


def test_who_reads_nothing_is_noticed_without_waiting() -> None:
    def order_on(link: VmmLink) -> None:
        for _ in range(100_000):
            link.order("resume")

    with linked() as (link, _theirs, _), pytest.raises(GuestError, match="takes no orders"):
        order_on(link)


def test_what_nobody_waits_for_is_not_kept() -> None:
    """Orders that were only told, or are not asked for any more, and their answers."""
    with linked() as (link, theirs, _):
        link.tell("release")
        dropped = link.order("resume")
        link.forget(dropped)
        last = link.order("status")
        numbers = [json.loads(line)["id"] for line in read_lines(theirs, 3)]
        assert numbers[1:] == [dropped, last]
        for number in numbers:
            theirs.send(b'{"id":%d}\n' % number)
        link.answer(last, "status", WAIT_S)

        assert not link._replies


def test_what_was_ordered_last_is_read_behind_the_end() -> None:
    with linked() as (link, theirs, _):
        link.order("resume")
        theirs.send(b'{"id":77}\n')  # never read: the end is a reset for who reads on
        link.close()

        assert json.loads(read_lines(theirs, 1)[0])["execute"] == "resume"


@given(st.binary(max_size=200))
def test_no_bytes_end_in_anything_but_an_answer_or_an_error(said: bytes) -> None:
    with linked() as (link, theirs, _):
        number = link.order("status")
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(GuestError):
            link.answer(number, "status", WAIT_S)
