"""Migration URIs: what a person or a client writes, and the endpoints of channels beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from errno import EINVAL, ERANGE
from pathlib import Path
from typing import Any, Final

from engine import unixsocket
from engine.control.parameter_table import UINT64_MAX
from engine.control.parameter_text import qemu_size
from engine.errors import UsageError, WireError, shown

UNIX_PATH_BYTES_MAX: Final = 90  #: sun_path holds 108; `.channel-254` and a NUL must fit behind

FAULT_CHANNEL: Final = 255  #: number of postcopy's fault channel, behind every multifd channel's


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP or unix address; `path` is empty for TCP.

    :ivar host: name or address without brackets; empty means every interface (listeners only).
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def display(self) -> str:
        return self.path or f"{self._bracketed}:{self.port}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def channel_endpoint(self, index: int, port_base: int) -> str:
        """Where the receiver of channel `index` listens, or the fault service (FAULT_CHANNEL); a
        base of 0 takes any free port."""
        if self.path:
            return f"ipc://{self.path}.channel-{index}"
        port = str(port_base + 1 + index) if port_base else "*"
        return f"tcp://{self._bracketed or '*'}:{port}"

    def handover_uri(self, port_base: int) -> str:
        """Where the incoming guest listens for the token."""
        if self.path:
            return f"unix:{self.path}.handover"
        return f"tcp:{self._bracketed or '0.0.0.0'}:{port_base}"

    def reach(self, endpoint: str) -> str:
        """What the peer announced, with the host by which we reach it.

        :raise WireError: not an endpoint of this kind of address."""
        if self.path:
            if not endpoint.startswith((f"ipc://{self.path}.", f"unix:{self.path}.")):
                raise WireError(f"the destination announced the endpoint '{endpoint[:100]}'")
            return endpoint
        scheme = "tcp:" if not endpoint.startswith("tcp://") else "tcp://"
        return f"{scheme}{self._bracketed}:{_port_of(endpoint)}"

    def remove_files(self, channels: int) -> None:
        """Remove the sockets that killed listeners left behind; no-op for TCP.

        The handover's is the guest's, who may answer there for longer than we live."""
        if self.path:
            unixsocket.remove_dead(self.path)
            for index in (*range(channels), FAULT_CHANNEL):
                unixsocket.remove_dead(f"{self.path}.channel-{index}")

    def socket_address(self) -> dict[str, object]:
        """QAPI SocketAddress, as query-migrate shows it."""
        if self.path:
            return {"type": "unix", "path": self.path}
        kind: dict[str, object] = {"ipv6": True} if ":" in self.host else {"ipv4": True}
        return kind | {"type": "inet", "host": self.host or "0.0.0.0", "port": str(self.port)}


def _port_of(endpoint: str) -> int:
    """:raise WireError: no valid port at the end."""
    port = endpoint.rpartition(":")[2]
    if not _is_port(port) or not int(port):
        raise WireError(f"the endpoint '{endpoint[:100]}' has no port")
    return int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 65536


@dataclass(frozen=True, slots=True)
class FdAddress:
    """`fd:NAME`: a descriptor that a client has named with `getfd`, or (destinations only) the
    number of one that the process was started with."""

    name: str

    @property
    def display(self) -> str:
        return f"fd:{self.name}"


@dataclass(frozen=True, slots=True)
class ExecAddress:
    """`exec:COMMAND`: what a program reads from stdin, or writes to stdout."""

    args: tuple[str, ...]

    @property
    def display(self) -> str:
        return f"exec:{' '.join(self.args)}"


@dataclass(frozen=True, slots=True)
class FileAddress:
    """`file:PATH[,offset=N]`; `/dev/fdset/N` is a set of descriptors."""

    path: str
    offset: int = 0

    @property
    def display(self) -> str:
        return f"file:{self.path}"


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """`vsock:CID:PORT`, numbers as they were written: QEMU reads them when it connects."""

    cid: str
    port: str

    @property
    def display(self) -> str:
        return f"{self.cid}:{self.port}"

    def socket_address(self) -> dict[str, object]:
        """QAPI SocketAddress, as query-migrate shows it."""
        return {"type": "vsock", "cid": self.cid, "port": self.port}


StreamAddress = FdAddress | ExecAddress | FileAddress | VsockAddress
Target = Address | StreamAddress


def parse_uri(text: str) -> Target:
    """`tcp:HOST:PORT`, `unix:PATH`, `fd:NAME`, `exec:COMMAND`, `file:PATH[,offset=N]` or
    `vsock:CID:PORT`.

    :raise UsageError: anything else, in QEMU's words where it has some."""
    scheme, separator, rest = text.partition(":")
    if not separator:
        scheme = ""
    match scheme:
        case "unix":
            return _unix(rest)
        case "tcp":
            host, colon, port = rest.rpartition(":")
            if not colon:
                raise UsageError(f"error parsing address '{shown(rest)}'")
            return _tcp(host.removeprefix("[").removesuffix("]"), port, rest)
        case "fd":
            if not rest:
                raise UsageError("invalid file descriptor address")
            return FdAddress(rest)
        case "exec":
            return _exec(("/bin/sh", "-c", rest))
        case "file":
            path, comma, offset = rest.partition(",offset=")
            return _file(path, _file_offset(offset) if comma else 0)
        case "vsock":
            cid, _, port = rest.partition(":")
            if not (cid and port):
                raise UsageError(f"error parsing address '{shown(rest)}'")
            return VsockAddress(cid, port)
        case "rdma":
            raise _no_rdma()
    raise UsageError(f"unknown migration protocol: {shown(text)}")


def _no_rdma() -> UsageError:
    """What is missing for it, beside our own part."""
    hardware = "" if Path("/sys/class/infiniband").is_dir() else "no RDMA device on this host, "
    return UsageError(f"rdma: {hardware}and no RDMA channel in this build; use tcp: or unix:")


def _exec(args: tuple[str, ...]) -> ExecAddress:
    if not args:
        raise UsageError("exec: has no program to run")
    if any("\0" in argument for argument in args):
        raise UsageError(f"exec: '{shown(' '.join(args))}' has a NUL in it")
    return ExecAddress(args)


def _file(path: str, offset: int) -> FileAddress:
    if "\0" in path:
        raise UsageError(f"file: '{shown(path)}' has a NUL in it")
    return FileAddress(path, offset)


def _file_offset(text: str) -> int:
    size = qemu_size(text, 1)
    if size is None or not 0 <= size <= UINT64_MAX:
        reason = os.strerror(EINVAL if size is None else ERANGE)
        raise UsageError(f"file URI has bad offset {shown(text)}: {reason}")
    return size


def _tcp(host: str, port: str, rest: str) -> Address:
    if not _is_port(port):
        raise UsageError(f"error parsing port in address '{shown(rest)}'; 0 to 65535 are allowed")
    if not _is_host(host):
        raise UsageError(f"error parsing host in address '{shown(rest)}'")
    return Address(host=host, port=int(port))


def _is_host(text: str) -> bool:
    """Whether a resolver may be asked for it; the empty one stands for every interface."""
    if any(character in text for character in "/*;,[]") or not text.isprintable():
        return False
    try:
        text.encode("idna")  # as the resolver does it: no empty label, none of 64 characters
    except UnicodeError:
        return False
    return True


def _unix(path: str) -> Address:
    try:
        length = len(path.encode())
    except UnicodeEncodeError as exc:
        raise UsageError(f"UNIX socket path '{shown(path)}' is not UTF-8") from exc
    if not 0 < length <= UNIX_PATH_BYTES_MAX or "\0" in path:
        raise UsageError(
            f"UNIX socket path '{shown(path)}' is empty or too long; "
            f"1 to {UNIX_PATH_BYTES_MAX} bytes are allowed"
        )
    if path == "*" or path.startswith("@"):
        raise UsageError(
            f"UNIX socket path '{shown(path)}' is no file (a wildcard or an abstract name); "
            f"write './{shown(path)}' for a file of that name"
        )
    return Address(path=path)


def parse_listen_address(text: str) -> Address:
    """Where a monitor listens: `unix:PATH` or `tcp:HOST:PORT`.

    :raise UsageError: anything else."""
    reason = f"'{shown(text)}': a monitor listens at unix:PATH or tcp:HOST:PORT"
    try:
        address = parse_uri(text)
    except UsageError as exc:
        raise UsageError(f"{reason}; {exc}") from exc
    if not isinstance(address, Address):
        raise UsageError(reason)
    return address


def parse_migrate_target(uri: str | None, channels: Sequence[Mapping[str, Any]] | None) -> Target:
    """`migrate`'s and `migrate-incoming`'s target: `uri`, or one main channel.

    :raise UsageError: QEMU's texts."""
    if (uri is None) is (not channels):
        raise UsageError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return parse_uri(uri)
    assert channels
    kinds = [channel.get("channel-type") for channel in channels]
    for kind in ("main", "cpr"):
        if kinds.count(kind) > 1:
            raise UsageError(f"Channel list has more than one {kind} entry")
    if kinds != ["main"]:
        raise UsageError("Channel list has no main entry")
    return _from_channel(channels[0].get("addr"))


def parse_destination(uri: str | None, channels: Sequence[Mapping[str, Any]] | None) -> Target:
    """`migrate`'s target, which must be somewhere.

    :raise UsageError: as `parse_migrate_target`, and for an address to listen at."""
    address = parse_migrate_target(uri, channels)
    if not isinstance(address, Address):
        return address
    if not address.path and not (address.host and address.port):
        missing = "port" if address.host else "host"
        raise UsageError(
            f"address '{shown(address.display)}' has no {missing} to connect to; "
            "write tcp:HOST:PORT"
        )
    return address


def _from_channel(addr: object) -> Target:
    """Of QAPI's MigrationAddress, which the monitor has checked already."""
    assert isinstance(addr, Mapping)
    kind = addr["transport"] if addr["transport"] != "socket" else addr["type"]
    match kind:
        case "inet":
            return _tcp(addr["host"], addr["port"], f"{addr['host']}:{addr['port']}")
        case "unix":
            return _unix(addr["path"])
        case "fd":
            return FdAddress(addr["str"])
        case "vsock":
            return VsockAddress(addr["cid"], addr["port"])
        case "exec":
            return _exec(tuple(addr["args"]))
        case "file":
            return _file(addr["filename"], addr["offset"] % (UINT64_MAX + 1))
    raise _no_rdma()
