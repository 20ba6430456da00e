"""The inbox: the largest order arrives whole, with all its descriptors."""

from __future__ import annotations

import os
import socket

import pytest

from engine import wire
from engine.errors import WireError
from engine.memory.pieces import PIECES_MAX, TrackedPiece
from engine.worker import Inbox


def longest_shape(number: int = 0) -> wire.BlockShape:
    return wire.BlockShape(f"{number:0255d}", 2**44, 2**30)


def test_the_largest_order_to_a_sender_fits_one_datagram() -> None:
    """Every block has its RAM and a tracker's descriptor; every field is as long as it can be."""
    shapes = [longest_shape(number) for number in range(wire.BLOCKS_MAX)]
    wire.check_blocks(shapes)
    longest_piece = TrackedPiece(wire.BLOCKS_MAX, 16, 2**47, 2**44, 2**44)
    order = wire.PrepareSender(
        254, 255, b"s" * 16, "e" * 255, 2**32, shapes, "content-hash",
        [longest_piece] * PIECES_MAX, True, 2**64 - 1,
    )  # fmt: skip
    count = len(wire.SENDER_FDS) + 2 * wire.BLOCKS_MAX
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inbox: Inbox[wire.SenderOrder] = Inbox(theirs.detach(), wire.SenderOrder, "test")

    with ours:
        socket.send_fds(ours, [wire.encode(order)], [ours.fileno()] * count)
        taken = inbox.take()

    inbox.close()
    assert taken is not None
    received, fds = taken
    for fd in fds:
        os.close(fd)
    assert received == order
    assert len(fds) == count == 252


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([], "a guest of 0 RAM blocks; 1 to 123 can be migrated"),
        ([longest_shape(n) for n in range(124)], "a guest of 124 RAM blocks; 1 to 123 can be"),
        ([longest_shape(1), longest_shape(1)], "two RAM blocks of one name"),
        ([wire.BlockShape("ram", 4097, 4096)], "'ram' is not whole pages"),
    ],
)
def test_blocks_that_cannot_be_migrated_are_refused(
    shapes: list[wire.BlockShape], reason: str
) -> None:
    with pytest.raises(WireError, match=reason):
        wire.check_blocks(shapes)
