"""`migrate` and its kin: what is refused, and in which order events and statuses come."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import pytest

from tests.conformance.compare import Difference, command, compare
from tests.conformance.couples import SLOW, Couple, settled_status
from tests.conformance.peers import Peer, both, peer

INET: Final = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"}
#: QEMU's process is gone when it has been asked: nothing there to compare.
CPR_ALONE: Final = "A `cpr` channel alone is refused where QEMU 10.0 ends or accepts it."
REASONS: Final = (CPR_ALONE,)
DIFFERENCES: Final = (
    Difference(
        r"tcp:127\.0\.0\.1:(x|70000)", r"return|error",
        "An address with a port that is no number from 0 to 65535 is refused at once.",
        shown_by=[command("migrate", uri="tcp:127.0.0.1:70000")],
    ),
    Difference(
        "query-migrate", r"return(\[\d+\])?\.socket-address\[0\]\.port",
        "The port that port 0 became is another one.",
        shown_by=[command("migrate-incoming", uri="tcp:127.0.0.1:0"), command("query-migrate")],
        incoming=True,
    ),
)  # fmt: skip


def _migrate(**arguments: object) -> dict[str, Any]:
    return {"execute": "migrate", "arguments": arguments}


def _incoming(**arguments: object) -> dict[str, Any]:
    given = {name.replace("_", "-"): value for name, value in arguments.items()}
    return {"execute": "migrate-incoming", "arguments": given}


def _channel(addr: object, kind: object = "main") -> dict[str, object]:
    return {"channel-type": kind, "addr": addr}


def _socket(**members: object) -> dict[str, object]:
    return {"transport": "socket", **members}


WRONG_URIS: Final = ("foo:bar", "", 1, None, "tcp", "tcp:", "tcp:127.0.0.1", "unix")
WRONG_CHANNELS: Final[list[object]] = [
    1, [], [1], [{}], [{"channel-type": "main"}], [{"addr": INET}], [_channel(INET, "nope")],
    [_channel({})], [_channel({"transport": "nope"})], [_channel({"transport": 1})],
    [_channel(_socket())], [_channel(_socket(type="nope"))], [_channel(_socket(type="inet"))],
    [_channel(_socket(type="inet", host="127.0.0.1"))], [_channel({**INET, "port": 1})],
    [_channel({**INET, "foo": 1})], [_channel(_socket(type="unix"))],
    [_channel(_socket(type="vsock", cid="1"))], [_channel({"transport": "exec"})],
    [_channel({"transport": "file"})], [_channel({"transport": "rdma"})],
    [_channel(INET), _channel(INET)],
    [_channel(INET), _channel(INET, "cpr"), _channel(INET, "cpr")],
    [{**_channel(INET), "x": 1}],
]  # fmt: skip

WRONG_STREAMS: Final = (
    "fd:nope", "fd:", "fd:99", "fd:0x10", "fd:-1",
    "file:", "file:/nonexistent/x", "file:/nonexistent/x,offset=1", "file:,offset=1", "file:/",
    "file:/dev/full", "file:/dev/full,offset=1M", "file:/dev/fdset/7", "file:/x,offset=",
    "file:/x,offset=-1", "file:/x,offset=1x", "file:/x,offset=0x10,offset=1",
    "file:/x,offset=99999999999999999999", "vsock:", "vsock:1", "vsock:1:", "vsock::1",
)  # fmt: skip
WRONG_STREAM_ADDRESSES: Final[tuple[dict[str, object], ...]] = (
    {"transport": "exec", "args": ["nosuch"]},
    {"transport": "exec", "args": "nosuch"},
    {"transport": "file", "filename": "/nonexistent/x"},
    {"transport": "file", "filename": "/nonexistent/x", "offset": "1"},
    {"transport": "file", "filename": "/dev/full", "offset": -1},
    {"transport": "file", "filename": "/dev/full", "offset": 2**63},
    {"transport": "file", "filename": "", "offset": 0},
    {"transport": "socket", "type": "fd", "str": "nope"},
    {"transport": "socket", "type": "fd", "str": ""},
)

REFUSED: Final[list[object]] = [
    _migrate(),
    _migrate(uri="tcp:127.0.0.1:1", channels=[_channel(INET)]),
    *(_migrate(uri=uri) for uri in WRONG_URIS),
    *(_migrate(channels=channels) for channels in WRONG_CHANNELS),
    _migrate(uri="tcp:127.0.0.1:1", resume=True),
    _migrate(uri="tcp:127.0.0.1:1", resume=1),
    _migrate(uri="tcp:127.0.0.1:1", foo=1),
    _migrate(uri="file:/nonexistent/x,offset=0x20M"),
    {"execute": "migrate-continue", "arguments": {}},
    {"execute": "migrate-continue", "arguments": {"state": "nope"}},
    {"execute": "migrate-continue", "arguments": {"state": 1}},
    {"execute": "migrate-continue", "arguments": {"state": "active"}},
    {"execute": "migrate-continue", "arguments": {"state": "none"}},
    {"execute": "migrate_cancel"},
    {"execute": "migrate_cancel", "arguments": {"a": 1}},
    {"execute": "migrate-start-postcopy"},
    {"execute": "migrate-pause"},
    {"execute": "migrate-recover"},
    {"execute": "migrate-recover", "arguments": {"uri": "tcp:127.0.0.1:0"}},
    _incoming(uri="tcp:127.0.0.1:0"),
    _incoming(),
    {"execute": "query-migrate", "arguments": {"x": 1}},
    {"execute": "query-migrate"},
    *(_migrate(uri=uri) for uri in WRONG_STREAMS),
    *(_migrate(channels=[_channel(addr)]) for addr in WRONG_STREAM_ADDRESSES),
    {"execute": "query-migrate"},
]  # fmt: skip
#: A stream has no room for channels.
WITH_MULTIFD: Final[list[object]] = [
    {"execute": "migrate-set-capabilities", "arguments": {
        "capabilities": [{"capability": "multifd", "state": True}]}},
    *(
        _migrate(uri=uri)
        for uri in ("fd:nope", "fd:99", "exec:", "exec:true", "file:/x", "fd:", "file:/x,offset=x")
    ),
    _migrate(uri="exec:true", resume=True),
    _migrate(channels=[_channel(_socket(type="fd", str="nope"))]),
    _migrate(channels=[_channel({"transport": "exec", "args": ["/bin/true"]})]),
    {"execute": "query-migrate"},
]  # fmt: skip


def test_a_source_refuses_what_qemu_refuses(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare(REFUSED, qemu.client, ours.client, DIFFERENCES)


def test_a_cpr_channel_alone_is_refused_where_qemu_ends(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    request = _migrate(channels=[_channel(INET, "cpr")])
    assert ours.client.ask(request)["error"]["desc"] == "Channel list has no main entry"
    with contextlib.suppress(EOFError, ConnectionError):
        assert "return" in qemu.client.ask(request), CPR_ALONE


def test_a_source_with_multifd_refuses_streams(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare(WITH_MULTIFD, qemu.client, ours.client, DIFFERENCES)


@pytest.mark.parametrize(
    "uri", ["fd:nope", "file:/nonexistent/x", "file:", "vsock:x:1", "unix:/nonexistent/x", "rest"]
)
def test_a_destination_refuses_as_qemu_does(uri: str) -> None:
    """One for each process: QEMU's may not try again."""
    uris = [uri] if uri != "rest" else ["fd:", "vsock:", "file:/x,offset=0x20M", "vsock:1"]
    with both(incoming="defer") as (qemu, ours):
        compare([_incoming(uri=uri) for uri in uris], qemu.client, ours.client, DIFFERENCES)


def test_a_destination_with_multifd_refuses_streams(destinations: tuple[Peer, Peer]) -> None:
    qemu, ours = destinations
    requests = [WITH_MULTIFD[0], *(_incoming(uri=f"{scheme}:x") for scheme in ("fd", "exec"))]
    compare([*requests, _incoming(uri="file:/x")], qemu.client, ours.client, DIFFERENCES)


def test_a_destination_refuses_what_qemu_refuses(destinations: tuple[Peer, Peer]) -> None:
    qemu, ours = destinations
    requests: list[object] = [
        _migrate(uri="tcp:127.0.0.1:1"),
        _incoming(),
        _incoming(uri="foo:1"),
        _incoming(uri="tcp:127.0.0.1:0", channels=[_channel(INET)]),
        _incoming(channels=[_channel(INET), _channel(INET)]),
        {"execute": "migrate-recover", "arguments": {"uri": "tcp:127.0.0.1:0"}},
        {"execute": "query-status"},
        {"execute": "query-migrate"},
        _incoming(uri="tcp:127.0.0.1:0", exit_on_error=False),
        _incoming(uri="tcp:127.0.0.1:0"),
        _incoming(),
        {"execute": "query-migrate"},
        {"execute": "migrate_cancel"},
        {"execute": "query-migrate"},
        {"execute": "cont"},
        {"execute": "query-status"},
        {"execute": "stop"},
        {"execute": "query-status"},
    ]
    compare(requests, qemu.client, ours.client, DIFFERENCES)


# -- sequences: section by section what a client sees --------------------------------------------

#: Ours writes while it migrates, so that a slow migration stays active.
WRITING: Final = ("--guest", "workload:size=64M,rate=20M,pattern=sweep")


def _run(engine: str, scenario: str) -> dict[str, Any]:
    """What a client sees of one engine in one scenario."""
    more = () if engine == "qemu" else WRITING
    with peer(engine, *more) as source, peer(engine, *more, incoming="defer") as destination:
        capabilities = ("pause-before-switchover",) if "pre-switchover" in scenario else ()
        couple = Couple(source, destination, *capabilities)
        couple.source.execute("cont")
        couple.destination.execute("cont")  # it runs when it arrives
        couple.source.events.clear()
        return SCENARIOS[scenario](couple) | couple.seen()


def _completes(couple: Couple) -> dict[str, Any]:
    couple.migrate()
    couple.source.wait_event("MIGRATION", status="completed")
    couple.destination.wait_event("MIGRATION", status="completed")
    settled_status(couple.source)
    return {"again": couple.source.execute("migrate", uri=couple.uri)}


def _completes_one_way(couple: Couple) -> dict[str, Any]:
    """Nobody takes the guest: after the end its user may let it run again."""
    couple.uri = "exec:cat >/dev/null"
    couple.migrate()
    couple.source.wait_event("MIGRATION", status="completed")
    return {
        "status": settled_status(couple.source),
        "again": couple.source.execute("migrate", uri=couple.uri),
        "cont": couple.source.execute("cont"),
    }


def _completes_stopped(couple: Couple) -> dict[str, Any]:
    couple.source.execute("stop")
    return _completes(couple)


def _continues(couple: Couple) -> dict[str, Any]:
    couple.migrate()
    couple.source.wait_event("MIGRATION", status="pre-switchover")
    seen = {
        "status": couple.source.execute("query-status"),
        "migration": couple.source.execute("query-migrate")["return"]["status"],
        "wrong": couple.source.execute("migrate-continue", state="active"),
        "cont": couple.source.execute("cont"),
        "capabilities": couple.source.execute("migrate-set-capabilities", capabilities=[]),
        "second": couple.source.execute("migrate", uri=couple.uri),
        "right": couple.source.execute("migrate-continue", state="pre-switchover"),
    }
    couple.source.wait_event("MIGRATION", status="completed")
    couple.destination.wait_event("MIGRATION", status="completed")
    return seen


def _cancelled_while_active(couple: Couple) -> dict[str, Any]:
    couple.set(SLOW)
    couple.migrate()
    couple.source.wait_event("MIGRATION", status="active")
    seen = {
        "second": couple.source.execute("migrate", uri=couple.uri),
        "cancel": couple.source.execute("migrate_cancel"),
    }
    couple.source.wait_event("MIGRATION", status="cancelled")
    couple.destination.wait_event("MIGRATION", status="failed")
    return seen | {"again": couple.source.execute("migrate_cancel")}


def _cancelled_in_pre_switchover(couple: Couple) -> dict[str, Any]:
    couple.migrate()
    couple.source.wait_event("MIGRATION", status="pre-switchover")
    seen = {"cancel": couple.source.execute("migrate_cancel")}
    couple.source.wait_event("MIGRATION", status="cancelled")
    couple.source.wait_event("RESUME")
    couple.destination.wait_event("MIGRATION", status="failed")
    return seen


def _refused_connection(couple: Couple) -> dict[str, Any]:
    seen = {"migrate": couple.source.execute("migrate", uri="tcp:127.0.0.1:1")}
    couple.source.wait_event("MIGRATION", status="failed")
    return seen | {"info": couple.source.execute("query-migrate")}


def _wrong_credentials(couple: Couple) -> dict[str, Any]:
    """Nothing is sent in the clear where credentials were named; a destination would see how far
    each source came before it found out."""
    couple.uri = "exec:cat >/dev/null"
    couple.source.execute("object-add", **{"qom-type": "secret", "id": "s", "data": "x"})
    seen = {}
    for identity in ("nope", "s"):
        couple.source.execute("migrate-set-parameters", tls_creds=identity)
        couple.source.events.clear()
        couple.migrate()
        couple.source.wait_event("MIGRATION", status="failed")
        seen[identity] = couple.source.execute("query-migrate")["return"]["error-desc"]
    return seen


SCENARIOS: Final = {
    "completes": _completes,
    "completes one way": _completes_one_way,
    "completes, guest stopped": _completes_stopped,
    "continues from pre-switchover": _continues,
    "cancelled while active": _cancelled_while_active,
    "cancelled in pre-switchover": _cancelled_in_pre_switchover,
    "connection refused": _refused_connection,
    "wrong credentials": _wrong_credentials,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_client_sees_what_it_sees_of_qemu(scenario: str) -> None:
    theirs, own = _run("qemu", scenario), _run("ramferry", scenario)

    assert own == theirs


def test_both_is_a_pair() -> None:
    with both() as (qemu, ours):
        assert (qemu.name, ours.name) == ("qemu", "ramferry")
