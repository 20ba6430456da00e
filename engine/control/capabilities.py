"""Migration capabilities: one table, with the conflicts that QEMU checks, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from engine.errors import UsageError, shown


@dataclass(frozen=True, slots=True)
class Capability:
    """One line of the table; `refusal` says why this build cannot turn it on."""

    name: str
    help: str
    acts: bool = False
    refusal: str = ""


_NOT_YET: Final = "this build of ramferry has no {0} yet"

CAPABILITIES: Final[tuple[Capability, ...]] = (
    Capability("xbzrle", "send differences to cached pages"),
    Capability("rdma-pin-all", "pin all RAM for RDMA"),
    Capability("auto-converge", "throttle the guest when it dirties more than is sent", acts=True),
    Capability("zero-blocks", "left over from block migration"),
    Capability("events", "emit MIGRATION and MIGRATION_PASS", acts=True),
    Capability("postcopy-ram", "switch to postcopy", refusal=_NOT_YET.format("postcopy")),
    Capability(
        "x-colo",
        "fault tolerance",
        refusal="QEMU compiled without replication module can't enable COLO",
    ),
    Capability("release-ram", "free what was sent in postcopy"),
    Capability("return-path", "answers from the destination; always there"),
    Capability(
        "pause-before-switchover",
        "wait for migrate-continue before the switchover",
        refusal=_NOT_YET.format("pause-before-switchover"),
    ),
    Capability("multifd", "parallel channels; ramferry always uses multifd-channels of them"),
    Capability("dirty-bitmaps", "block dirty bitmaps; there are no block devices here"),
    Capability("postcopy-blocktime", "measure how long vCPUs wait for pages"),
    Capability("late-block-activate", "no effect, as in QEMU"),
    Capability(
        "x-ignore-shared",
        "skip shared RAM",
        refusal="moving shared RAM is what ramferry does; it cannot be skipped",
    ),
    Capability("validate-uuid", "compare the UUIDs of both sides"),
    Capability(
        "background-snapshot",
        "snapshot of the start",
        refusal="Background-snapshot is not supported by host kernel",
    ),
    Capability("zero-copy-send", "long runs of raw pages are always lent, never copied"),
    Capability("postcopy-preempt", "a channel of its own for requested pages"),
    Capability("switchover-ack", "wait for the destination before stopping; always done"),
    Capability(
        "dirty-limit",
        "throttle each vCPU by its dirty rate",
        refusal="dirty-limit requires KVM with accelerator property 'dirty-ring-size' set",
    ),
    Capability(
        "mapped-ram",
        "fixed page offsets in a file",
        refusal=_NOT_YET.format("file migration"),
    ),
)
_BY_NAME: Final = {capability.name: capability for capability in CAPABILITIES}

#: (capability, other, must it be off or on, QEMU's text), checked in this order.
CONFLICTS: Final[tuple[tuple[str, str, bool, str], ...]] = (
    (
        "zero-copy-send",
        "multifd",
        True,
        "Zero copy only available for non-compressed non-TLS multifd migration",
    ),
    (
        "zero-copy-send",
        "xbzrle",
        False,
        "Zero copy only available for non-compressed non-TLS multifd migration",
    ),
    ("postcopy-preempt", "postcopy-ram", True, "Postcopy preempt requires postcopy-ram"),
    (
        "switchover-ack",
        "return-path",
        True,
        "Capability 'switchover-ack' requires capability 'return-path'",
    ),
    ("multifd", "xbzrle", False, "Multifd is not compatible with xbzrle"),
)


class CapabilityStore:
    """Which capabilities are on."""

    def __init__(self) -> None:
        self._on: dict[str, bool] = {capability.name: False for capability in CAPABILITIES}

    def is_on(self, name: str) -> bool:
        return self._on[name]

    def query(self) -> list[dict[str, object]]:
        """QMP's list, in QEMU's order."""
        return [{"capability": name, "state": state} for name, state in self._on.items()]

    def set(self, changes: Mapping[str, bool]) -> None:
        """All or nothing.

        :raise UsageError: unknown, not in this build, or in conflict; nothing was changed."""
        for name in changes:
            if name not in _BY_NAME:
                raise UsageError(f"Parameter 'capability' does not accept value '{shown(name)}'")
        wanted = self._on | dict(changes)
        for name, state in changes.items():
            if state and _BY_NAME[name].refusal:
                raise UsageError(_BY_NAME[name].refusal)
        for name, other, must_be, text in CONFLICTS:
            if wanted[name] and wanted[other] is not must_be:
                raise UsageError(text)
        self._on = wanted


def is_capability(name: str) -> bool:
    """Whether the table has it."""
    return name in _BY_NAME
