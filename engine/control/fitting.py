"""Whether a source fits a destination: what its Hello says, and what the guest here is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Protocol

from engine import wire
from engine.compress.codecs import CODEC_IDS
from engine.control.compression import lacking_codecs
from engine.control.encryption import check_encryption
from engine.control.framestream import ConnectionLost
from engine.control.host import Host
from engine.errors import MigrationError, PeerRefused, WireError
from engine.memory.blocks import PAGE_SIZE

log = logging.getLogger("ramferry.destination")


class Door(Protocol):
    """Where sources come in."""

    @property
    def serves_others(self) -> bool:
        """After a source that was refused another may come."""
        ...

    async def accept(self) -> wire.FirstWord: ...
    async def send(self, message: wire.Message) -> None: ...


async def next_fitting(host: Host, door: Door, *, is_stream: bool) -> wire.Hello:
    """Wait for a source that fits here; others are told what differs, and may come again.

    :raise MigrationError: it does not fit, and no other can come."""
    while True:
        hello = await door.accept()
        try:
            assert isinstance(hello, wire.Hello), "the door lets nobody else in"
            check_fits(host, hello, is_stream=is_stream)
        except (PeerRefused, WireError) as exc:
            await refuse(door, exc)
            continue
        return hello


async def refuse(door: Door, exc: MigrationError) -> None:
    """Tell the source why it is not let in.

    :raise MigrationError: `exc`, if no other can come."""
    log.warning("refused a source: %s", exc)
    with contextlib.suppress(ConnectionLost):
        await door.send(wire.Refused(wire.cut(str(exc))))
    if not door.serves_others:
        raise exc


def check_fits(host: Host, hello: wire.Hello, *, is_stream: bool) -> None:
    """Can this source's guest become ours?

    :raise PeerRefused: no, and why.
    :raise WireError: RAM blocks that no guest has."""
    guest = host.guest
    _check_encryption(host)
    if hello.version != wire.VERSION:
        raise PeerRefused(f"version {hello.version} expected {wire.VERSION}")
    if len(hello.session) != wire.SESSION_BYTES or not 1 <= hello.channels <= wire.CHANNELS_MAX:
        raise PeerRefused(f"{hello.channels} channels or a bad session; 1 to 255 are allowed")
    if hello.page_size != PAGE_SIZE:
        raise PeerRefused(f"Mismatched RAM page size: {hello.page_size} != {PAGE_SIZE}")
    if hello.guest_kind != guest.kind:
        raise PeerRefused(f"guest kind '{hello.guest_kind}' and local is '{guest.kind}'")
    if lacking := lacking_codecs(hello.codecs, CODEC_IDS.values()):
        raise PeerRefused(f"cannot decode {lacking}; this build knows {', '.join(CODEC_IDS)}")
    if hello.channels > 1 and is_stream:
        raise PeerRefused(f"{hello.channels} channels on one stream")
    _check_uuid(host.uuid, wire.cut(hello.uuid))
    _check_blocks(host, hello.blocks)


def check_resumes(host: Host, session: bytes, question: wire.Resume) -> None:
    """Is this the source of the postcopy that is paused here?

    :raise PeerRefused: no, and why.
    :raise WireError: RAM blocks that no guest has."""
    _check_encryption(host)
    if question.version != wire.VERSION:
        raise PeerRefused(f"version {question.version} expected {wire.VERSION}")
    if question.session != session:
        raise PeerRefused("another postcopy is paused here")
    if not 1 <= question.channels <= wire.CHANNELS_MAX:
        raise PeerRefused(f"{question.channels} channels; 1 to 255 are allowed")
    if lacking := lacking_codecs(question.codecs, CODEC_IDS.values()):
        raise PeerRefused(f"cannot decode {lacking}; this build knows {', '.join(CODEC_IDS)}")
    _check_blocks(host, question.blocks)


def _check_encryption(host: Host) -> None:
    try:
        check_encryption(host)
    except MigrationError as exc:
        raise PeerRefused(str(exc)) from exc


def _check_blocks(host: Host, shapes: Sequence[wire.BlockShape]) -> None:
    blocks = host.guest.blocks
    wire.check_blocks(shapes)
    if len(shapes) != len(blocks):
        raise PeerRefused(f"{len(shapes)} RAM blocks and local are {len(blocks)}")
    for shape, block in zip(shapes, blocks, strict=True):
        if shape.name != block.name:
            raise PeerRefused(f'Unknown ramblock "{shape.name}", cannot accept migration')
        if shape.size != block.size:
            raise PeerRefused(f"Size mismatch: {shape.name}: {shape.size:#x} != {block.size:#x}")
        if shape.backing_page_size != block.backing_page_size:
            raise PeerRefused(
                f"Mismatched RAM page size {shape.name} (local) {block.backing_page_size} "
                f"!= {shape.backing_page_size}"
            )


def _check_uuid(own: str, theirs: str) -> None:
    """As QEMU's `validate-uuid`: both must have one to differ (vmstate_uuid, savevm.c)."""
    if not theirs:
        return
    if not own:
        log.warning("UUID is received %s, but local uuid isn't set", theirs)
    elif theirs != own:
        raise PeerRefused(f"UUID received is {theirs} and local is {own}")
