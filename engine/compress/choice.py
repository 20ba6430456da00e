"""From what control orders to the policy that a sender follows."""

from __future__ import annotations

import os

from engine.compress.auto import Auto
from engine.compress.codecs import CODECS
from engine.compress.policy import Arm, Fixed, Policy
from engine.wire import Compress


def policy_of(wanted: Compress, channels: int, before: Policy | None = None) -> Policy:
    """:param wanted: its codec is `none`, `auto` or a name of `CODECS`.
    :param channels: that share the CPUs that `auto` may use.
    :param before: was followed so far; an `auto` goes on with what it knows."""
    if wanted.codec == "auto":
        cpus = os.cpu_count() or 1
        if isinstance(before, Auto):
            before.allow(channels, cpus, wanted.cpu_percent)
            return before
        return Auto(channels, cpus, wanted.cpu_percent)
    levels = {
        "zlib": wanted.zlib_level,
        "zstd": wanted.zstd_level,
        "lz4": wanted.lz4_acceleration,
    }
    return Fixed(Arm(wanted.codec, levels.get(wanted.codec, 0), CODECS.get(wanted.codec)))
