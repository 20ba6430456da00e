"""Whether a source fits a destination: what its Hello says, and what the guest here is."""

from __future__ import annotations

import logging

from engine import wire
from engine.compress.codecs import CODEC_IDS
from engine.control.compression import lacking_codecs
from engine.control.host import Host
from engine.errors import PeerRefused
from engine.memory.blocks import PAGE_SIZE

log = logging.getLogger("ramferry.destination")


def check_fits(host: Host, hello: wire.Hello, *, is_stream: bool) -> None:
    """Can this source's guest become ours?

    :raise PeerRefused: no, and why.
    :raise WireError: RAM blocks that no guest has."""
    guest = host.guest
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
    wire.check_blocks(hello.blocks)
    if len(hello.blocks) != len(guest.blocks):
        raise PeerRefused(f"{len(hello.blocks)} RAM blocks and local are {len(guest.blocks)}")
    for shape, block in zip(hello.blocks, guest.blocks, strict=True):
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
