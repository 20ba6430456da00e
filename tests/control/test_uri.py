"""Migration URIs, and what a hostile peer may announce instead of an endpoint."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.uri import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    StreamAddress,
    Target,
    VsockAddress,
    parse_destination,
    parse_listen_address,
    parse_migrate_target,
    parse_uri,
)
from engine.errors import UsageError, WireError


@pytest.mark.parametrize(
    ("text", "address", "channel"),
    [
        ("tcp:host:44", Address("host", 44), "tcp://host:*"),
        ("tcp:127.0.0.1:0", Address("127.0.0.1", 0), "tcp://127.0.0.1:*"),
        ("tcp:[::1]:5", Address("::1", 5), "tcp://[::1]:*"),
        ("tcp::5", Address("", 5), "tcp://*:*"),
        ("unix:/a/b", Address(path="/a/b"), "ipc:///a/b.channel-0"),
    ],
)
def test_uris_mean_endpoints(text: str, address: Address, channel: str) -> None:
    assert parse_uri(text) == address
    assert address.channel_endpoint(0, 0) == channel


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("foo:bar", "unknown migration protocol: foo:bar"),
        ("", "unknown migration protocol: "),
        ("tcp:host", "error parsing address 'host'"),
        ("tcp:host:70000", "0 to 65535 are allowed"),
        ("tcp:host:-1", "0 to 65535 are allowed"),
        ("tcp:*:5", "error parsing host"),
        ("unix:", "is empty or too long"),
        ("unix:" + "x" * 91, "is empty or too long"),
        ("tcp:127.0.0.1:" + "9" * 5000, "0 to 65535 are allowed"),
        ("tcp:h:000080", "0 to 65535 are allowed"),
        ("tcp:h:\u0661", "0 to 65535 are allowed"),
        ("tcp:a..b:4444", "error parsing host in address 'a..b:4444'"),
        ("tcp:" + "h" * 64 + ":4444", "error parsing host"),
        ("tcp:\udcff:4444", "error parsing host in address '\\udcff:4444'"),
        ("unix:/tmp/\udcff\udcfe", "'/tmp/\\udcff\\udcfe' is not UTF-8"),
        ("unix:/tmp/\ud800", "is not UTF-8"),
        ("unix:*", "is no file (a wildcard or an abstract name); write './*'"),
        ("unix:@x", "is no file (a wildcard or an abstract name); write './@x'"),
        ("smoke\n:" + "x" * 5000, "unknown migration protocol: smoke\\n:xxx"),
        ("fd:", "invalid file descriptor address"),
        ("exec:a\0b", "has a NUL in it"),
        ("file:a\0b", "has a NUL in it"),
        ("file:/x,offset=0x20M", "file URI has bad offset 0x20M: Invalid argument"),
        ("file:/x,offset=-1", "file URI has bad offset -1: Numerical result out of range"),
        ("file:/x,offset=0x1,offset=1", "bad offset 0x1,offset=1: Invalid argument"),
        ("vsock:2", "error parsing address '2'"),
        ("vsock::5", "error parsing address ':5'"),
        ("rdma:h:5", "no RDMA channel in this build; use tcp: or unix:"),
    ],
)
def test_what_is_no_uri_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_uri(text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250
    with pytest.raises(UsageError, match="a monitor listens at unix:PATH or tcp:HOST:PORT"):
        parse_listen_address(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("fd:f-1", FdAddress("f-1")),
        ("exec:cat >x; :", ExecAddress(("/bin/sh", "-c", "cat >x; :"))),
        ("exec:", ExecAddress(("/bin/sh", "-c", ""))),
        ("file:/a:b,c", FileAddress("/a:b,c")),
        ("file:/a,offset=0x1000", FileAddress("/a", 4096)),
        ("file:/a,offset=1.5M", FileAddress("/a", 1572864)),
        ("vsock:2:5", VsockAddress("2", "5")),
    ],
)
def test_uris_mean_streams(text: str, address: StreamAddress) -> None:
    assert parse_uri(text) == address
    assert parse_destination(text, None) == address
    with pytest.raises(UsageError, match="a monitor listens at unix:PATH or tcp:HOST:PORT"):
        parse_listen_address(text)


@given(
    st.text(st.characters(codec=None), max_size=60),
    st.sampled_from(["tcp:", "unix:", "fd:", "exec:", "file:", "file:/x,offset=", "vsock:", ""]),
)
def test_no_text_ends_in_anything_but_an_address_or_a_usage_error(text: str, scheme: str) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(parse_uri(scheme + text), Target)


@pytest.mark.parametrize("uri", ["tcp::4444", "tcp:[]:4444", "tcp:h:0", "tcp::0"])
def test_a_destination_must_be_somewhere(uri: str) -> None:
    assert parse_migrate_target(uri, None) == parse_uri(uri)
    with pytest.raises(UsageError, match="to connect to; write tcp:HOST:PORT"):
        parse_destination(uri, None)


def test_ports_of_channels_and_handover_follow_the_base() -> None:
    address = Address("127.0.0.1", 4444)

    assert address.channel_endpoint(3, 0) == "tcp://127.0.0.1:*"
    assert address.channel_endpoint(3, 5000) == "tcp://127.0.0.1:5004"
    assert address.handover_uri(5000) == "tcp:127.0.0.1:5000"


def test_only_the_port_is_taken_from_what_a_peer_announces() -> None:
    address = Address("10.0.0.1", 4444)

    assert address.reach("tcp://0.0.0.0:77") == "tcp://10.0.0.1:77"
    assert address.reach("tcp:192.168.0.9:78") == "tcp:10.0.0.1:78"


@given(st.text(max_size=60))
def test_a_hostile_endpoint_is_refused_or_leads_to_the_same_host(text: str) -> None:
    address = Address("10.0.0.1", 4444)
    try:
        reached = address.reach(text)
    except WireError:
        return
    assert reached.startswith(("tcp://10.0.0.1:", "tcp:10.0.0.1:"))
    assert 0 < int(reached.rpartition(":")[2]) < 65536


@pytest.mark.parametrize("text", ["ipc:///etc/passwd", "unix:/else.handover", "tcp://h:1"])
def test_a_unix_peer_cannot_send_us_to_other_files(text: str) -> None:
    with pytest.raises(WireError):
        Address(path="/run/x").reach(text)


def channel(kind: str = "main", **addr: Any) -> dict[str, Any]:
    return {"channel-type": kind, "addr": {"transport": "socket"} | addr}


def test_the_channels_form_means_the_same() -> None:
    inet = channel(type="inet", host="h", port="5")

    assert parse_migrate_target(None, [inet]) == parse_migrate_target("tcp:h:5", None)
    assert parse_migrate_target(None, [channel(type="unix", path="/p")]) == Address(path="/p")
    given = channel(type="fd", str="f")
    assert parse_migrate_target(None, [given]) == FdAddress("f")
    program = channel(transport="exec", args=["gzip", "-d"])
    assert parse_migrate_target(None, [program]) == ExecAddress(("gzip", "-d"))
    file = channel(transport="file", filename="/f,offset=1", offset=7)
    assert parse_migrate_target(None, [file]) == FileAddress("/f,offset=1", 7)
    vsock = channel(type="vsock", cid="2", port="5")
    assert parse_migrate_target(None, [vsock]) == parse_migrate_target("vsock:2:5", None)


@pytest.mark.parametrize(
    ("uri", "channels", "says"),
    [
        (None, None, "need either 'uri' or 'channels' argument"),
        (None, [], "need either 'uri' or 'channels' argument"),
        ("tcp:h:1", [channel(type="unix", path="/p")], "need either 'uri' or 'channels' argument"),
        (None, [channel(), channel()], "Channel list has more than one main entry"),
        (None, [channel("cpr")], "Channel list has no main entry"),
        (None, [channel(transport="exec", args=[])], "exec: has no program to run"),
        (None, [channel(transport="rdma", host="h", port="5")], "no RDMA channel in this build"),
    ],
)
def test_wrong_targets_are_refused(uri: str | None, channels: Any, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_migrate_target(uri, channels)
    assert says in str(refused.value)


def test_only_dead_sockets_of_the_main_and_the_channels_are_removed(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "m"))
    for name in ("m", "m.channel-0", "m.channel-2", "m.handover"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
    (tmp_path / "m.channel-1").write_text("precious")

    address.remove_files(2)

    left = ["m.channel-1", "m.channel-2", "m.handover"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    for name in ("m.channel-2", "m.handover"):
        (tmp_path / name).unlink()
