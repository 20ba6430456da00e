"""Migration URIs, and what a hostile peer may announce instead of an endpoint."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.uri import Address, parse_migrate_target, parse_uri
from engine.errors import UsageError, WireError


@pytest.mark.parametrize(
    ("text", "address", "endpoint", "bind"),
    [
        ("tcp:host:44", Address("host", 44), "tcp://host:44", "tcp://host:44"),
        ("tcp:127.0.0.1:0", Address("127.0.0.1", 0), "tcp://127.0.0.1:0", "tcp://127.0.0.1:*"),
        ("tcp:[::1]:5", Address("::1", 5), "tcp://[::1]:5", "tcp://[::1]:5"),
        ("tcp::5", Address("", 5), "tcp://:5", "tcp://*:5"),
        ("unix:/a/b", Address(path="/a/b"), "ipc:///a/b", "ipc:///a/b"),
    ],
)
def test_uris_mean_endpoints(text: str, address: Address, endpoint: str, bind: str) -> None:
    assert parse_uri(text) == address
    assert (address.endpoint, address.bind_endpoint) == (endpoint, bind)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("foo:bar", "unknown migration protocol: foo:bar"),
        ("", "unknown migration protocol: "),
        ("tcp:host", "write tcp:HOST:PORT"),
        ("tcp:host:70000", "0 to 65535 are allowed"),
        ("tcp:host:-1", "0 to 65535 are allowed"),
        ("tcp:*:5", "error parsing host"),
        ("unix:", "is empty or too long"),
        ("unix:" + "x" * 91, "is empty or too long"),
        ("exec:cat", "migration over 'exec:' is not in this build"),
        ("fd:3", "migration over 'fd:' is not in this build"),
    ],
)
def test_what_is_no_uri_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_uri(text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


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


@pytest.mark.parametrize(
    ("uri", "channels", "says"),
    [
        (None, None, "need either 'uri' or 'channels' argument"),
        (None, [], "need either 'uri' or 'channels' argument"),
        ("tcp:h:1", [channel(type="unix", path="/p")], "need either 'uri' or 'channels' argument"),
        (None, [channel(), channel()], "Channel list has more than one main entry"),
        (None, [channel("cpr")], "Channel list has no main entry"),
        (None, [channel(transport="exec")], "use socket"),
        (None, [channel(type="inet", host="h", port=5)], "needs type inet with host and port"),
        (None, [{"channel-type": "main", "addr": 5}], "use socket"),
    ],
)
def test_wrong_targets_are_refused(uri: str | None, channels: Any, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_migrate_target(uri, channels)
    assert says in str(refused.value)
