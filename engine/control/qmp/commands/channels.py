"""`channels` of `migrate` and `migrate-incoming`: QAPI's MigrationChannel and what is in it."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

from engine.control.qmp.visitor import Arguments, UInt64, Union


class ChannelType(enum.Enum):
    """QAPI MigrationChannelType."""

    MAIN = "main"
    CPR = "cpr"


class Inet(Arguments, frozen=True):
    """QAPI InetSocketAddress; also where RDMA connects to."""

    host: str
    port: str
    numeric: bool | None = None
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool | None = None
    mptcp: bool | None = None


class Unix(Arguments, frozen=True):
    """QAPI UnixSocketAddress."""

    path: str
    abstract: bool | None = None
    tight: bool | None = None


class Vsock(Arguments, frozen=True):
    """QAPI VsockSocketAddress."""

    cid: str
    port: str


class Fd(Arguments, frozen=True):
    """QAPI FdSocketAddress."""

    name: str = msgspec.field(name="str")


class Exec(Arguments, frozen=True):
    """QAPI MigrationExecCommand."""

    args: list[str]


class File(Arguments, frozen=True):
    """QAPI FileMigrationArgs."""

    filename: str
    offset: UInt64


SOCKET = Union("type", {"inet": Inet, "unix": Unix, "vsock": Vsock, "fd": Fd})
ADDRESS = Union("transport", {"socket": SOCKET, "exec": Exec, "rdma": Inet, "file": File})


class Channel(Arguments, frozen=True):
    """QAPI MigrationChannel."""

    channel_type: ChannelType
    addr: Annotated[dict[str, Any], ADDRESS]


def as_objects(channels: list[Channel] | None) -> list[dict[str, Any]] | None:
    """What `uri.parse_migrate_target` takes."""
    if channels is None:
        return None
    return [{"channel-type": one.channel_type.value, "addr": one.addr} for one in channels]
