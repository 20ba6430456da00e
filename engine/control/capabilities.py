"""Migration capabilities: one table, and the conflicts that QEMU checks, in its order.

Names, order and texts are QEMU 10.0's (MigrationCapability in qapi/migration.json,
migrate_caps_check in migration/options.c); what QEMU has given up is marked and shown only once it
was set. What this build cannot do is refused last, after every text of QEMU's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from engine.control.parameters import ZERO_COPY_TEXT, Parameters, ParameterStore
from engine.errors import UsageError, shown

log = logging.getLogger("ramferry.control")


@dataclass(frozen=True, slots=True)
class Capability:
    """One line of the table.

    :ivar acts: it changes what ramferry does today; others are kept and shown.
    :ivar refusal: why this build cannot turn it on.
    :ivar is_hidden: queries show it only once it was set.
    :ivar deprecated: what to use instead; empty: not deprecated.
    """

    name: str
    help: str
    acts: bool = False
    refusal: str = ""
    is_hidden: bool = False
    deprecated: str = ""


_NOT_YET: Final = "this build of ramferry has no {0} yet"

CAPABILITIES: Final[tuple[Capability, ...]] = (
    Capability("xbzrle", "send what changed in pages of earlier rounds", acts=True),
    Capability("rdma-pin-all", "pin all RAM for RDMA"),
    Capability("auto-converge", "throttle the guest when it dirties more than is sent", acts=True),
    Capability(
        "zero-blocks", "left over from block migration", deprecated="nothing, for it has no effect"
    ),
    Capability("events", "emit MIGRATION and MIGRATION_PASS", acts=True),
    Capability("postcopy-ram", "switch to postcopy with migrate-start-postcopy", acts=True),
    Capability("x-colo", "fault tolerance", refusal=_NOT_YET.format("fault tolerance (COLO)")),
    Capability("release-ram", "free what was sent in postcopy"),
    Capability(
        "return-path", "answers from the destination; always there, but on a stream", acts=True
    ),
    Capability(
        "pause-before-switchover", "wait for migrate-continue before the switchover", acts=True
    ),
    Capability(
        "multifd", "parallel channels; always multifd-channels of them, but on a stream", acts=True
    ),
    Capability("dirty-bitmaps", "block dirty bitmaps; there are no block devices here"),
    Capability("postcopy-blocktime", "show how long vCPUs waited for pages", acts=True),
    Capability("late-block-activate", "no effect, as in QEMU"),
    Capability(
        "x-ignore-shared",
        "skip shared RAM",
        refusal="moving shared RAM is what ramferry does; it cannot be skipped",
    ),
    Capability("validate-uuid", "compare the UUIDs of both sides", acts=True),
    Capability(
        "background-snapshot",
        "snapshot of the start",
        refusal=_NOT_YET.format("background snapshot"),
    ),
    Capability("zero-copy-send", "long runs of raw pages are always lent, never copied"),
    Capability("postcopy-preempt", "requested pages have a channel of their own; always so"),
    Capability(
        "switchover-ack", "wait for the destination before stopping; always done", acts=True
    ),
    Capability("dirty-limit", "limit each vCPU's dirty rate to vcpu-dirty-limit", acts=True),
    Capability(
        "mapped-ram", "fixed page offsets in a file", refusal=_NOT_YET.format("mapped-ram files")
    ),
    Capability(
        "compress",
        "old compression: zlib with compress-level on compress-threads channels",
        is_hidden=True,
        deprecated="multifd with multifd-compression",
    ),
)
_BY_NAME: Final = {capability.name: capability for capability in CAPABILITIES}

#: What a background snapshot cannot stand, in QEMU's order of looking.
SNAPSHOT_CONFLICTS: Final = (
    "postcopy-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "release-ram",
    "rdma-pin-all",
    "compress",
    "xbzrle",
    "x-colo",
    "validate-uuid",
    "zero-copy-send",
)
DIRTY_LIMIT_CONFLICT: Final = (
    "dirty-limit conflicts with auto-converge either of then available currently"
)
DIRTY_LIMIT_REFUSAL: Final = (
    "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a check asks about besides capabilities.

    :ivar before: what is on now.
    :ivar parameters: as they are now.
    :ivar is_listening: a destination's listener is open, so its channels are decided.
    :ivar refusal_of: why the guest or this machine cannot do a capability, or None."""

    before: Mapping[str, bool]
    parameters: Parameters
    is_listening: bool
    refusal_of: Callable[[str], str | None]


#: Looks at the wanted set; returns QEMU's text, or None where it sees nothing wrong.
Check = Callable[[Mapping[str, bool], Surroundings], "str | None"]


def conflicting(name: str, other: str, text: str) -> Check:
    """Both must not be on."""
    return lambda wanted, _: text if wanted[name] and wanted[other] else None


def requiring(name: str, other: str, text: str) -> Check:
    """The first needs the second."""
    return lambda wanted, _: text if wanted[name] and not wanted[other] else None


def before_listening(name: str, text: str) -> Check:
    """It cannot be turned on once the listener is open."""
    return lambda wanted, around: (
        text if wanted[name] and not around.before[name] and around.is_listening else None
    )


def _zero_copy(wanted: Mapping[str, bool], around: Surroundings) -> str | None:
    """It needs plain multifd; compression and TLS are as the parameters say."""
    if not wanted["zero-copy-send"]:
        return None
    settings = around.parameters
    is_plain = wanted["multifd"] and not (wanted["xbzrle"] or wanted["compress"])
    if is_plain and not settings.uses_compression and not settings.uses_tls:
        return None
    return ZERO_COPY_TEXT


def _dirty_limit(wanted: Mapping[str, bool], around: Surroundings) -> str | None:
    """QEMU wants KVM's dirty ring, ramferry a guest that can be slowed vCPU by vCPU."""
    return around.refusal_of("dirty-limit") if wanted["dirty-limit"] else None


#: Every rule, in QEMU's order; those with `compress` are QEMU 9.0's, in the places they had there.
CHECKS: Final[tuple[Check, ...]] = (
    conflicting("postcopy-ram", "x-ignore-shared", "Postcopy is not compatible with ignore-shared"),
    *(
        conflicting(
            "background-snapshot", other, f"Background-snapshot is not compatible with {other}"
        )
        for other in SNAPSHOT_CONFLICTS
    ),
    _zero_copy,
    requiring("postcopy-preempt", "postcopy-ram", "Postcopy preempt requires postcopy-ram"),
    conflicting("postcopy-preempt", "compress", "Postcopy preempt not compatible with compress"),
    before_listening("postcopy-preempt", "Postcopy preempt must be set before incoming starts"),
    conflicting("multifd", "compress", "Multifd is not compatible with compress"),
    before_listening("multifd", "Multifd must be set before incoming starts"),
    requiring(
        "switchover-ack",
        "return-path",
        "Capability 'switchover-ack' requires capability 'return-path'",
    ),
    conflicting("dirty-limit", "auto-converge", DIRTY_LIMIT_CONFLICT),
    _dirty_limit,
    conflicting("multifd", "xbzrle", "Multifd is not compatible with xbzrle"),
    conflicting("compress", "xbzrle", "Compression is not compatible with xbzrle"),
    conflicting("mapped-ram", "xbzrle", "Mapped-ram migration is incompatible with xbzrle"),
    conflicting("mapped-ram", "compress", "Mapped-ram migration is incompatible with compression"),
    conflicting("mapped-ram", "postcopy-ram", "Mapped-ram migration is incompatible with postcopy"),
)


def no_dirty_limit(capability: str) -> str | None:
    """For a store without a guest that can be slowed vCPU by vCPU."""
    return DIRTY_LIMIT_REFUSAL if capability == "dirty-limit" else None


def _not_listening() -> bool:
    """For a store without a destination beside it."""
    return False


class CapabilityStore:
    """Which capabilities are on."""

    def __init__(
        self,
        parameters: ParameterStore | None = None,
        refusal_of: Callable[[str], str | None] = no_dirty_limit,
        is_listening: Callable[[], bool] = _not_listening,
    ) -> None:
        """
        :param parameters: compression and TLS forbid zero-copy-send.
        :param refusal_of: why the guest cannot do a capability of that name, in QEMU's words, or
            None; only asked for `dirty-limit`.
        :param is_listening: whether a destination's listener is open."""
        self._parameters = parameters or ParameterStore()
        self._refusal_of = refusal_of
        self._is_listening = is_listening
        self._on: dict[str, bool] = {capability.name: False for capability in CAPABILITIES}
        self._shown = {one.name for one in CAPABILITIES if not one.is_hidden}

    def is_on(self, name: str) -> bool:
        return self._on[name]

    def query(self) -> list[dict[str, object]]:
        """QMP's list, in QEMU's order; what QEMU has given up only once it was set."""
        return [
            {"capability": name, "state": state}
            for name, state in self._on.items()
            if name in self._shown
        ]

    def set(self, changes: Mapping[str, bool]) -> None:
        """All or nothing.

        :raise UsageError: unknown, in conflict, or not in this build; nothing was changed."""
        for name in changes:
            check_name(name)
        wanted = self._on | dict(changes)
        around = Surroundings(
            self._on, self._parameters.values, self._is_listening(), self._refusal_of
        )
        for check in CHECKS:
            if (text := check(wanted, around)) is not None:
                raise UsageError(text)
        for capability in CAPABILITIES:
            if wanted[capability.name] and capability.refusal:
                raise UsageError(capability.refusal)
        self._on = wanted
        self._shown.update(changes)
        for name in changes:
            if _BY_NAME[name].deprecated:
                log.warning("%s is deprecated; instead: %s", name, _BY_NAME[name].deprecated)


def check_name(name: str) -> None:
    """:raise UsageError: QEMU's text for a capability that the table has not."""
    if name not in _BY_NAME:
        raise UsageError(f"Parameter 'capability' does not accept value '{shown(name)}'")


def is_capability(name: str) -> bool:
    """Whether the table has it."""
    return name in _BY_NAME
