"""Page bitmaps on the main channel, in pieces; only pieces with a set bit are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from engine import wire
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import RamBlock

B = TypeVar("B", bound=wire.Bits)


def pieces(kind: type[B], index: int, bits: bytes) -> Iterator[B]:
    """A block's bitmap as messages of `kind`."""
    for start in range(0, len(bits), wire.BITS_BYTES_MAX):
        piece = bits[start : start + wire.BITS_BYTES_MAX]
        if piece.count(0) != len(piece):
            yield kind(index, 8 * start, piece)


def _bytes_of(bitmap: memoryview, block: RamBlock) -> bytes:
    """Whole words, and none that has no page."""
    return bytes(bitmap[: -(-block.page_count // 64) * 8])


def received_pieces(received: PageBitmaps) -> Iterator[wire.Received]:
    """What is here."""
    for index, (view, block) in enumerate(zip(received, received.blocks, strict=True)):
        yield from pieces(wire.Received, index, _bytes_of(view, block))


def put(message: wire.Bits, bitmaps: PageBitmaps) -> None:
    """Set the bits of a piece that a peer has sent; nobody else writes the bitmaps.

    :raise WireError: it is no piece of these bitmaps; nothing was changed."""
    message.check([block.page_count for block in bitmaps.blocks])
    _merge(message, bitmaps, lambda old, new: old | new)


def take_away(message: wire.Bits, bitmaps: PageBitmaps) -> None:
    """Clear the bits of a piece; as `put`."""
    message.check([block.page_count for block in bitmaps.blocks])
    _merge(message, bitmaps, lambda old, new: old & ~new)


def _merge(message: wire.Bits, bitmaps: PageBitmaps, merged: Callable[[int, int], int]) -> None:
    start, size = message.first_page // 8, len(message.bits)
    with bitmaps[message.block][start : start + size] as part:
        old = int.from_bytes(part, "little")
        new = int.from_bytes(message.bits, "little")
        part[:] = merged(old, new).to_bytes(size, "little")


class Announced:
    """What the destination was told to be stale; each page is told once."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._blocks = tuple(blocks)
        self._told = [0] * len(self._blocks)

    def news(self, dirty: PageBitmaps) -> list[wire.Stale]:
        """What is dirty and was not told; counts as told from now on."""
        found: list[wire.Stale] = []
        for index, block in enumerate(self._blocks):
            bits = _bytes_of(dirty[index], block)
            now = int.from_bytes(bits, "little")
            fresh, self._told[index] = now & ~self._told[index], self._told[index] | now
            found += pieces(wire.Stale, index, fresh.to_bytes(len(bits), "little"))
        return found
