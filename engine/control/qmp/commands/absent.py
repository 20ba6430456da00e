"""What QEMU has and ramferry has not: spice, COLO, Xen, block devices. The commands
are there, with QEMU's arguments, and say so; those that only ask answer what a QEMU
without the feature answers.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final

from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, Handler, QmpError
from engine.control.qmp.visitor import Alternate, UInt64
from engine.errors import shown

NO_XEN = "ramferry has no Xen: its guests are neither Xen's nor replicated"
NO_XEN_EVENTS = "Xen event channel emulation not enabled"
NO_DEVICES = "ramferry keeps no devices' state in files; 'migrate' moves the guest as a whole"


UINT32_MAX: Final = 2**32 - 1


class ClientMigrateInfo(Arguments, frozen=True):
    """Where a spice client would go."""

    protocol: str
    hostname: str
    port: int | None = None
    tls_port: int | None = None
    cert_subject: str | None = None


class ColoMode(enum.Enum):
    """QAPI COLOMode."""

    NONE = "none"
    PRIMARY = "primary"
    SECONDARY = "secondary"


class ColoExitReason(enum.Enum):
    """QAPI COLOExitReason."""

    NONE = "none"
    REQUEST = "request"
    ERROR = "error"
    PROCESSING = "processing"


class ColoStatus(Arguments, frozen=True):
    """QAPI COLOStatus."""

    mode: ColoMode
    last_mode: ColoMode
    reason: ColoExitReason


class XenSaveDevicesState(Arguments, frozen=True):
    """A file to write."""

    filename: str
    live: bool | None = None


class XenLoadDevicesState(Arguments, frozen=True):
    """A file to read."""

    filename: str


class XenSetGlobalDirtyLog(Arguments, frozen=True):
    """On or off."""

    enable: bool


class XenSetReplication(Arguments, frozen=True):
    """On or off, on which side."""

    enable: bool
    primary: bool
    failover: bool | None = None


class ReplicationStatus(Arguments, frozen=True):
    """QAPI ReplicationStatus."""

    error: bool
    desc: str | None = None


class XenEventInject(Arguments, frozen=True):
    """An event channel's port."""

    port: int


class BlockDirtyBitmap(Arguments, frozen=True):
    """QAPI BlockDirtyBitmap."""

    node: str
    name: str


class BlockDirtyBitmapAdd(BlockDirtyBitmap, frozen=True):
    """QAPI BlockDirtyBitmapAdd."""

    granularity: UInt64 | None = None
    persistent: bool | None = None
    disabled: bool | None = None


class BlockDirtyBitmapMerge(Arguments, frozen=True):
    """QAPI BlockDirtyBitmapMerge."""

    node: str
    target: str
    bitmaps: list[Annotated[Any, Alternate("BlockDirtyBitmapOrStr", BlockDirtyBitmap)]]


def _refuse(text: str) -> Handler:
    async def refuse(_: object) -> None:
        raise QmpError(text)

    return refuse


async def _client_migrate_info(asked: ClientMigrateInfo) -> None:
    if asked.protocol != "spice":
        raise QmpError("Parameter 'protocol' expects 'spice'")
    raise QmpError("SPICE is not in use", "DeviceNotActive")


async def _query_colo_status(_: object) -> object:
    return {"mode": "none", "last-mode": "none", "reason": "none"}


async def _query_replication_status(_: object) -> object:
    return {"error": False}


async def _no_node(asked: BlockDirtyBitmap | BlockDirtyBitmapMerge) -> None:
    raise QmpError(f"Node '{shown(asked.node)}' not found")


async def _add_dirty_bitmap(asked: BlockDirtyBitmapAdd) -> None:
    if (asked.granularity or 0) > UINT32_MAX:
        raise QmpError("Parameter 'granularity' expects uint32_t")
    if not asked.name:
        raise QmpError("Bitmap name cannot be empty")
    node = shown(asked.node)
    raise QmpError(f"Cannot find device='{node}' nor node-name='{node}'")


def register(registry: CommandRegistry, _process: ControlProcess) -> None:
    """Add this subject's commands."""
    add = registry.add
    add("client_migrate_info", _client_migrate_info, ClientMigrateInfo)
    add("x-colo-lost-heartbeat", _refuse("VM is not in COLO mode"), features=("unstable",))
    add("query-colo-status", _query_colo_status, returns=ColoStatus)
    add("xen-save-devices-state", _refuse(NO_DEVICES), XenSaveDevicesState)
    add("xen-load-devices-state", _refuse(NO_DEVICES), XenLoadDevicesState)
    add("xen-set-global-dirty-log", _refuse(NO_XEN), XenSetGlobalDirtyLog)
    add("xen-set-replication", _refuse(NO_XEN), XenSetReplication)
    add("query-xen-replication-status", _query_replication_status, returns=ReplicationStatus)
    add("xen-colo-do-checkpoint", _refuse(NO_XEN))
    add("xen-event-list", _refuse(NO_XEN_EVENTS))
    add("xen-event-inject", _refuse(NO_XEN_EVENTS), XenEventInject)
    add("block-dirty-bitmap-add", _add_dirty_bitmap, BlockDirtyBitmapAdd)
    for verb in ("remove", "clear", "enable", "disable"):
        add(f"block-dirty-bitmap-{verb}", _no_node, BlockDirtyBitmap)
    add("block-dirty-bitmap-merge", _no_node, BlockDirtyBitmapMerge)
