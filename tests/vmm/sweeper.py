"""The boot sector of sweeper.S, as bytes: an assembler for x86 is not on every machine."""

from __future__ import annotations

from typing import Final

CODE: Final = bytes.fromhex(
    "fa31c08ed88ed0bc007ce4920c02e692b035e670e47188c7b034e670e47188c3660fb7db66c1e3106681c300"
    "00f0000f0116e07c0f20c00c010f22c0ea417c080066b810008ed88ec08ed0bc007c0000bf00001000c70700"
    "00000081c70010000039df72f031edbf0000100089e9c1e10681e1c00f0000392f751fff078d042f89440f04"
    "81c70010000039df72e945b05289eee80e000000ebcdb05789fee803000000f4ebfd66baf803eeb908000000"
    "c1c60489f0240f3c0a720204270430eee2eeb00aeec366900000000000000000ffff0000009acf00ffff0000"
    "0092cf001700c87c"
)
SECTOR: Final = CODE + bytes(510 - len(CODE)) + b"\x55\xaa"
