"""Where RAM blocks are tracked: pieces of them, as one process or several map them.

What a block's pages have seen is the union of what its pieces have: a process may map a part of a
block, or one part twice, but the first process maps each block whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from engine.errors import MemoryRefused
from engine.memory.blocks import PAGE_SIZE, RamBlock

#: A piece is at most 31 bytes of an order of 64 KiB, in which 123 blocks are 39 KiB.
PIECES_MAX: Final = 512
ADDRESS_MAX: Final = 2**63  #: no process has memory from there on


class TrackedPiece(NamedTuple):
    """A part of a block in a tracked process.

    :ivar block: index of the block.
    :ivar process: index of the process, and of its pagemap beside the piece; 0 maps all of RAM.
    :ivar address: where the piece begins in the process.
    :ivar offset: where it begins in the block."""

    block: int
    process: int
    address: int
    size: int
    offset: int

    @property
    def first_page(self) -> int:
        return self.offset // PAGE_SIZE

    @property
    def end_page(self) -> int:
        return (self.offset + self.size) // PAGE_SIZE

    @property
    def block_address(self) -> int:
        """Where page 0 of the block would be."""
        return self.address - self.offset


def whole_piece(block: int, address: int, size: int) -> TrackedPiece:
    """All of a block in the first process."""
    return TrackedPiece(block, 0, address, size, 0)


def check_piece_count(count: int) -> None:
    """:raise MemoryRefused: too many to be told of."""
    if count > PIECES_MAX:
        raise MemoryRefused(f"the memory is mapped in {count} pieces; {PIECES_MAX} can be")


def check_pieces(
    pieces: Sequence[TrackedPiece], blocks: Sequence[RamBlock], process_count: int
) -> None:
    """:raise MemoryRefused: a piece is none of such a block or process, or a page of the first
    process's would not be looked at."""
    check_piece_count(len(pieces))
    for piece in pieces:
        if not _fits(piece, blocks, process_count):
            raise MemoryRefused(f"memory cannot be tracked as {piece}")
    for i, block in enumerate(blocks):
        own = [piece for piece in pieces if piece.block == i and not piece.process]
        if len(own) != 1 or own[0].size != block.size:
            raise MemoryRefused(f"not all of memory '{block.name}' is tracked")


def _fits(piece: TrackedPiece, blocks: Sequence[RamBlock], process_count: int) -> bool:
    if not (0 <= piece.block < len(blocks) and 0 <= piece.process < process_count):
        return False
    if piece.size <= 0 or piece.offset < 0 or piece.block_address < 0:
        return False
    if (piece.address | piece.size | piece.offset) % PAGE_SIZE:
        return False
    block_end = piece.block_address + blocks[piece.block].size
    return piece.address + piece.size <= block_end <= ADDRESS_MAX
