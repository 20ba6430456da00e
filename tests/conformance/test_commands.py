"""The commands beside the migration: the same requests to a real QEMU and to ramferry."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conformance.compare import Difference, command, compare, unlike
from tests.conformance.peers import Client, Peer
from tests.conformance.schemas import Schema
from tests.support import eventually

Peers = tuple[Peer, Peer]

NO_XEN: Final = "There is no Xen and no replication here: what would change them refuses"
NO_DEVICE_FILES: Final = "`xen-save-devices-state` and `xen-load-devices-state` refuse"
STARTED: Final = "`start-time` is when each process began to measure"
TOOK: Final = "`calc-time` of a finished measurement is how long it really took"
MONITORS: Final = "`query-yank` lists no monitors: only the migration can be yanked"
TYPES: Final = "`object-add` knows the types that a migration uses"
ENCRYPTED: Final = "An encrypted secret (`keyid`) is refused"
NUMBERS: Final = "Numbers of descriptors are those of the process that holds them"

DIFFERENCES: Final = (
    Difference(r"xen-set-|xen-colo-do-checkpoint", r"error.*|return", NO_XEN, [
        command("xen-set-global-dirty-log", enable=True),
        command("xen-set-replication", enable=False, primary=True),
        command("xen-colo-do-checkpoint"),
    ]),
    Difference(r"xen-(save|load)-devices-state", r"error\.desc", NO_DEVICE_FILES, [
        command("xen-save-devices-state", filename="/nonexistent/x"),
        command("xen-load-devices-state", filename="/nonexistent/x"),
    ]),
    Difference(r"query-dirty-rate", r"return\.start-time", STARTED),
    Difference(r"query-dirty-rate", r"return\.calc-time", TOOK),
    Difference(r"query-yank", r"return", MONITORS, [command("query-yank")]),
    Difference(r"authz-listfile|authz-pam|iothread", r"error.*|return", TYPES, [
        command("object-add", qom_type=kind, id="u")
        for kind in ("authz-listfile", "authz-pam", "iothread")
    ]),
    Difference(r"\"keyid\": \"key32\"", r"error\.desc", ENCRYPTED, [
        command("object-add", qom_type="secret", id="key32", data="A" * 43 + "=", format="base64"),
        command("object-add", qom_type="secret", id="v", data="x", keyid="key32"),
    ]),
)  # fmt: skip
#: The same, for the arguments that `query-qmp-schema` declares.
NEWER: Final = "Parameters, capabilities and statuses that QEMU 10.0 has not are in the schema"
SCHEMA_DIFFERENCES: Final = (
    Difference("migrate-set-parameters", r"(de)?compress-.*|cpr-exec-command\?|x-.*", NEWER),
    Difference(
        "migrate-set-parameters",
        r"multifd-compression\?\.enum|multifd-lz4-acceleration\?",
        "The schema has the values and parameters of compression that QEMU lacks",
    ),
    Difference("migrate-set-capabilities", r"capabilities\[0\]\.capability\.enum", NEWER),
    Difference("migrate-continue", r"state\.enum", NEWER),
    Difference("object-add", r"\(cases\)\..*|qom-type\.enum", TYPES),
)
#: What other tests here mask, or know.
REASONS: Final = (
    NUMBERS,
    "Clients find no member there that ramferry never shows",
    "`query-events` is here, QEMU has given it up",
)


def check(peers: Peers, requests: Sequence[object]) -> None:
    """Ask both, with all known differences."""
    qemu, ours = peers
    compare(requests, qemu.client, ours.client, DIFFERENCES)


# -- dirty rate and dirty limit --------------------------------------------------------------------


def test_a_dirty_rate_is_refused_in_the_same_words(peers: Peers) -> None:
    calc = "calc-dirty-rate"
    check(
        peers,
        [
            command("query-dirty-rate"),
            command("query-dirty-rate", calc_time_unit="millisecond"),
            command("query-dirty-rate", calc_time_unit="hour"),
            command(calc),
            *(command(calc, calc_time=time) for time in (0, -1, 61, 1.5, 1.0, "1", True, None)),
            *(command(calc, calc_time=time, calc_time_unit="millisecond") for time in (49, 60_001)),
            *(command(calc, calc_time=1, sample_pages=pages) for pages in (127, 16_385, -1, "a")),
            command(calc, calc_time=1, sample_pages=512, mode="dirty-bitmap"),
            command(calc, calc_time=1, sample_pages=100, mode="dirty-ring"),
            command(calc, calc_time=1, mode="dirty-ring"),
            command(calc, calc_time=0, mode="dirty-ring"),
            command(calc, calc_time=1, mode="nope"),
            command(calc, calc_time=1, mode=1),
            command(calc, calc_time=1, nope=1),
            command("query-dirty-rate"),
        ],
    )


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap"])
def test_a_paused_guest_is_measured_alike(peers: Peers, mode: str) -> None:
    for peer in peers:
        peer.client.execute("stop")
        started = peer.client.execute(
            "calc-dirty-rate", calc_time=60, calc_time_unit="millisecond", mode=mode
        )
        assert started == {"return": {}}
    for peer in peers:
        assert eventually(lambda peer=peer: status_of(peer.client) == "measured")  # type: ignore[misc]
    check(
        peers,
        [
            command("query-dirty-rate"),
            command("query-dirty-rate", calc_time_unit="millisecond"),
            command("query-dirty-rate", calc_time_unit="second"),
        ],
    )


def status_of(client: Client) -> Any:
    return client.execute("query-dirty-rate")["return"]["status"]


def test_a_second_measurement_is_refused_while_one_goes_on(peers: Peers) -> None:
    for peer in peers:
        peer.client.execute("calc-dirty-rate", calc_time=60)
        assert eventually(lambda peer=peer: status_of(peer.client) == "measuring")  # type: ignore[misc]
    check(peers, [command("calc-dirty-rate", calc_time=1), command("calc-dirty-rate", calc_time=0)])


def test_a_guest_without_a_dirty_ring_takes_no_limit(peers: Peers) -> None:
    limit, cancel = "set-vcpu-dirty-limit", "cancel-vcpu-dirty-limit"
    check(
        peers,
        [
            command(limit),
            *(command(limit, dirty_rate=rate) for rate in (10, 0, -1, 2**63, 1.5, "1", None)),
            command(limit, dirty_rate=1, cpu_index=9),
            command(limit, dirty_rate=1, cpu_index="a"),
            command(cancel),
            command(cancel, cpu_index=7),
            command(cancel, cpu_index=-1),
            command(cancel, nope=1),
            command("query-vcpu-dirty-limit"),
        ],
    )


# -- descriptors -----------------------------------------------------------------------------------


def ask_with(client: Client, request: object, *fds: int) -> Any:
    """The answer to a request with descriptors beside it."""
    socket.send_fds(client.socket, [json.dumps(request).encode() + b"\n"], list(fds))
    return client.answer()


def without_numbers(answer: Any, known: dict[int, str]) -> Any:
    """The answer with descriptors named by the order in which they were first seen (NUMBERS)."""
    if isinstance(answer, dict):
        return {
            key: known.setdefault(value, f"fd {len(known)}")
            if key == "fd"
            else without_numbers(value, known)
            for key, value in answer.items()
        }
    if isinstance(answer, list):
        return [without_numbers(one, known) for one in answer]
    return answer


def test_descriptors_that_nobody_sent(peers: Peers) -> None:
    check(
        peers,
        [
            command("getfd"),
            *(command("getfd", fdname=name) for name in ("a", "1a", "", 3)),
            command("closefd"),
            command("closefd", fdname="a"),
            command("add-fd"),
            command("add-fd", fdset_id=-1),
            command("add-fd", fdset_id="a"),
            command("add-fd", fdset_id=1, opaque="x"),
            command("add-fd", opaque=1),
            command("remove-fd"),
            command("remove-fd", fdset_id=1),
            command("remove-fd", fdset_id=1, fd=3),
            command("query-fdsets"),
        ],
    )


def test_descriptors_are_named_and_kept_in_sets_alike(peers: Peers) -> None:
    told: list[list[Any]] = []
    for peer in peers:
        client, known, seen = peer.client, dict[int, str](), list[Any]()
        reading, writing = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
        for request, fd in [
            (command("getfd", fdname="a"), reading),
            (command("getfd", fdname="a"), writing),
            (command("getfd", fdname="1a"), reading),
            (command("getfd", fdname=""), reading),
            (command("closefd", fdname=""), None),
            (command("closefd", fdname="a"), None),
            (command("closefd", fdname="a"), None),
            (command("add-fd", fdset_id=-1), reading),
            (command("add-fd", opaque="first"), reading),
            (command("add-fd"), writing),
            (command("add-fd", fdset_id=0, opaque="second"), writing),
            (command("add-fd", fdset_id=7), writing),
            (command("add-fd"), reading),
            (command("query-fdsets"), None),
            (command("add-fd"), None),
            (command("remove-fd", fdset_id=1), None),
            (command("remove-fd", fdset_id=1), None),
            (command("query-fdsets"), None),
        ]:
            answer = ask_with(client, request, *([] if fd is None else [fd]))
            seen.append(without_numbers(answer, known))
        number = next(number for number, name in known.items() if name == "fd 0")
        for _ in range(2):
            answer = client.ask(command("remove-fd", fdset_id=0, fd=number))
            text = json.dumps(answer).replace(f"fd:{number}'", "fd:N'")
            seen.append(json.loads(text))
        seen.append(without_numbers(client.ask(command("query-fdsets")), known))
        os.close(reading)
        os.close(writing)
        told.append(seen)
    assert list(unlike(told[0], told[1])) == []


# -- objects, jobs ---------------------------------------------------------------------------------


def objects(directory: Path) -> list[object]:
    """Requests that both must answer alike, in this order."""
    psk, empty = directory / "psk", directory / "empty"
    psk.mkdir()
    empty.mkdir()
    (psk / "keys.psk").write_text("user:00112233\nsomebody:44556677\n")
    (directory / "secret").write_text("from a file")
    one = Path(directory / "nothing-here")
    add = "object-add"
    anon = {"qom_type": "tls-creds-anon"}
    keys: dict[str, Any] = {"qom_type": "tls-creds-psk", "dir": str(psk)}
    x509: dict[str, Any] = {"qom_type": "tls-creds-x509"}
    secret: dict[str, Any] = {"qom_type": "secret"}
    rules: dict[str, Any] = {"qom_type": "authz-list", "id": "r"}
    rule = {"match": "fred", "policy": "allow"}
    return [
        command(add),
        command(add, id="a"),
        command(add, **anon),
        command(add, qom_type="nope", id="a"),
        command(add, qom_type=3, id="a"),
        *(command(add, id=name, **anon) for name in ("1a", "", "m a", "m/a", "\u00e9", 3)),
        command(add, id="a", **anon),
        command(add, id="a", **anon),
        command(add, id="a", qom_type="secret"),
        command(add, id="b", nope=1, **anon),
        command(add, id="b", endpoint="nope", **anon),
        command(add, id="b", endpoint="client", dir="/nonexistent", **anon),
        command(add, id="c", verify_peer="yes", **anon),
        command(add, id="c", verify_peer=True, priority="NORMAL", **anon),
        command(add, id="p", qom_type="tls-creds-psk"),
        command(add, id="p", qom_type="tls-creds-psk", dir=str(one)),
        command(add, id="p", qom_type="tls-creds-psk", dir=str(empty)),
        command(add, id="p", endpoint="client", **keys),
        command(add, id="p", endpoint="client", username="some", **keys),
        command(add, id="p", endpoint="client", username="somebody", **keys),
        command(add, id="q", endpoint="server", username="user", **keys),
        command(add, id="q", endpoint="server", **keys),
        command(add, id="x", **x509),
        *(
            command(add, id="x", dir=str(where), endpoint=endpoint, **x509)
            for where in (one, empty)
            for endpoint in ("server", "client")
        ),
        command(add, id="z", qom_type="authz-simple"),
        command(add, id="z", qom_type="authz-simple", identity="CN=x"),
        command(add, policy="nope", **rules),
        command(add, rules=[{"match": "fred"}], **rules),
        command(add, rules=[rule | {"format": "regex"}], **rules),
        command(add, rules=[1], **rules),
        command(add, rules=[rule, rule | {"x": 1}], **rules),
        command(add, policy="deny", rules=[rule, rule | {"format": "glob"}], **rules),
        command(add, qom_type="authz-pam", id="u"),
        command(add, qom_type="authz-listfile", id="u"),
        command(add, qom_type="iothread", id="u"),
        command(add, id="s", **secret),
        command(add, id="s", data="x", **secret),
        command(add, id="t", data="x", file="y", **secret),
        command(add, id="t", file=str(one), **secret),
        command(add, id="t", file=str(directory / "secret"), **secret),
        command(add, id="key32", data="A" * 43 + "=", format="base64", **secret),
        command(add, id="v", data="!!", format="base64", **secret),
        command(add, id="v", data="x", format="hex", **secret),
        command(add, id="v", data="x", keyid="nope", **secret),
        command(add, id="v", data="x", keyid="a", **secret),
        command(add, id="v", data="x", keyid="s", **secret),
        command(add, id="v", data="x", keyid="key32", **secret),
        command(add, id="v", data=3, **secret),
        command("object-del"),
        command("object-del", id="nope"),
        command("object-del", id="a"),
        command("object-del", id="a"),
        command(add, id="a", **anon),
        command("object-del", id="v"),
    ]  # fmt: skip


def test_objects_are_checked_alike(peers: Peers, tmp_path: Path) -> None:
    check(peers, objects(tmp_path))


def test_jobs_of_snapshots_fail_alike(peers: Peers) -> None:
    save: dict[str, Any] = {"tag": "t", "vmstate": "d", "devices": ["d", "e"]}
    verbs = ("cancel", "complete", "finalize", "pause", "resume")
    jobs: list[object] = [command("query-jobs")]
    for verb in (*verbs, "dismiss"):
        jobs += [command(f"job-{verb}"), command(f"job-{verb}", id="j")]
    jobs += [
        command("snapshot-save"),
        command("snapshot-save", job_id="j", **save),
    ]
    check(peers, jobs)
    wait_for_jobs(peers, 1)
    check(
        peers,
        [
            command("snapshot-save", job_id="j", **save),
            *(command("snapshot-save", job_id=name, **save) for name in ("1 bad", "", "a/b")),
            *(command(f"job-{verb}", id="j") for verb in verbs),
            command("snapshot-load", job_id="k", **save),
            command("snapshot-load", job_id="l", tag="t", vmstate="d", devices="d"),
            command("snapshot-delete", job_id="m", tag="t", devices=[]),
            command("snapshot-delete", job_id="n", tag="t", devices=[1]),
            command("snapshot-delete", job_id="o", tag="t", vmstate="d", devices=[]),
        ],
    )
    wait_for_jobs(peers, 3)
    check(peers, [*(command("job-dismiss", id=name) for name in "jkm"), command("query-jobs")])
    heard = [
        [event["data"] for event in peer.client.events if event["event"] == "JOB_STATUS_CHANGE"]
        for peer in peers
    ]
    assert list(unlike(heard[0], heard[1])) == []


def wait_for_jobs(peers: Peers, count: int) -> None:
    """Until so many jobs have concluded, at both, and their lists are alike."""
    for peer in peers:

        def concluded(client: Client = peer.client) -> bool:
            jobs = client.execute("query-jobs")["return"]
            return [job["status"] for job in jobs] == ["concluded"] * count

        assert eventually(concluded)
    check(peers, [command("query-jobs")])


# -- yank, announce, what is absent ----------------------------------------------------------------


def test_yank_without_a_migration(peers: Peers) -> None:
    instances: list[object] = [
        [],
        3,
        [3],
        [{}],
        [{"type": "nope"}],
        [{"type": 1}],
        [{"type": "migration"}],
        [{"type": "migration", "x": 1}],
        [{"type": "block-node"}],
        [{"type": "block-node", "node-name": "n"}],
        [{"type": "chardev", "id": "c"}],
    ]
    check(peers, [command("yank", instances=one) for one in instances])
    check(peers, [command("yank"), command("query-yank"), command("query-migrationthreads")])


def test_announcing_checks_types_and_nothing_else(peers: Peers) -> None:
    usual: dict[str, Any] = {"initial": 50, "max": 550, "rounds": 10, "step": 50}
    check(
        peers,
        [
            command("announce-self"),
            command("announce-self", **usual),
            command("announce-self", **dict.fromkeys(usual, 0)),
            command("announce-self", **dict.fromkeys(usual, -1)),
            *(command("announce-self", **usual | {name: 1_000_000}) for name in usual),
            *(command("announce-self", **usual | {name: "1"}) for name in usual),
            command("announce-self", interfaces=["a"], id="x", **usual),
            command("announce-self", interfaces=[1], **usual),
            command("announce-self", interfaces="a", **usual),
            command("announce-self", id=1, **usual),
        ],
    )


def test_what_neither_has_is_refused_alike(peers: Peers) -> None:
    where: dict[str, Any] = {"hostname": "h"}
    check(
        peers,
        [
            command("client_migrate_info"),
            *(
                command("client_migrate_info", protocol=name, **where)
                for name in ("spice", "vnc", "nope")
            ),
            command("client_migrate_info", protocol="spice", port="1", **where),
            command("client_migrate_info", protocol="spice", tls_port=1, **where),
            command("x-colo-lost-heartbeat"),
            command("x-colo-lost-heartbeat", x=1),
            command("query-colo-status"),
            command("xen-save-devices-state"),
            command("xen-save-devices-state", filename="/nonexistent/x"),
            command("xen-save-devices-state", filename="/nonexistent/x", live=1),
            command("xen-load-devices-state", filename="/nonexistent/x"),
            command("xen-set-global-dirty-log"),
            command("xen-set-global-dirty-log", enable=True),
            command("xen-set-global-dirty-log", enable=1),
            command("xen-set-replication", enable=False),
            command("xen-set-replication", enable=False, primary=True),
            command("query-xen-replication-status"),
            command("xen-colo-do-checkpoint"),
            command("xen-event-list"),
            command("xen-event-inject"),
            command("xen-event-inject", port=3),
        ],
    )


def test_bitmaps_of_devices_that_nobody_has_are_refused_alike(peers: Peers) -> None:
    one = {"node": "n", "name": "b"}
    wrong: list[dict[str, Any]] = [
        {}, {"node": "n"}, one, {"node": "", "name": ""}, {"node": 1}, one | {"x": 1},
    ]  # fmt: skip
    added: list[dict[str, Any]] = [
        {"granularity": 3}, {"granularity": -1}, {"granularity": 2**32}, {"granularity": "1"},
        {"granularity": 3, "name": ""}, {"persistent": 1}, {"disabled": True}, {"disabled": "x"},
    ]  # fmt: skip
    merged: list[Any] = [
        1, None, {}, [], ["a"], ["a", 1], [None], [[]], [{}], [{"node": "a"}], [one],
        [{"node": 1, "name": "b"}], [one | {"x": 1}],
    ]  # fmt: skip
    verbs = ("add", "remove", "clear", "enable", "disable")
    asked = [(verb, arguments) for verb in verbs for arguments in wrong]
    asked += [("add", one | more) for more in added]
    asked += [("merge", {"node": "n", "target": "t", "bitmaps": names}) for names in merged]
    asked.append(("merge", {}))
    check(
        peers,
        [
            {"execute": f"block-dirty-bitmap-{verb}", "arguments": arguments}
            for verb, arguments in asked
        ],
    )


def test_a_guest_that_does_not_sleep_is_not_woken(peers: Peers) -> None:
    check(peers, [command("system_wakeup"), command("system_wakeup", x=1)])


def test_name_and_uuid(peers: Peers) -> None:
    check(peers, [command("query-name"), command("query-uuid"), command("query-name", x=1)])


# -- introspection ---------------------------------------------------------------------------------

#: Section 1 of what a client of a migration engine uses, and what goes with it.
MIGRATION_COMMANDS: Final = (
    "migrate", "migrate-incoming", "migrate_cancel", "migrate-continue", "migrate-start-postcopy",
    "migrate-pause", "migrate-recover", "migrate-set-capabilities", "query-migrate-capabilities",
    "migrate-set-parameters", "query-migrate-parameters", "query-migrate", "calc-dirty-rate",
    "query-dirty-rate", "set-vcpu-dirty-limit", "cancel-vcpu-dirty-limit", "query-vcpu-dirty-limit",
    "snapshot-save", "snapshot-load", "snapshot-delete", "query-migrationthreads",
    "x-colo-lost-heartbeat", "query-colo-status", "xen-save-devices-state",
    "xen-load-devices-state", "xen-set-global-dirty-log", "xen-set-replication",
    "query-xen-replication-status", "xen-colo-do-checkpoint", "announce-self", "yank", "query-yank",
    "getfd", "closefd", "add-fd", "remove-fd", "query-fdsets", "object-add", "object-del", "stop",
    "cont", "query-status", "client_migrate_info", "query-jobs", "job-cancel", "job-dismiss",
    "query-name", "query-uuid", "query-version", "query-commands", "query-qmp-schema", "quit",
    "qmp_capabilities", "system_wakeup", "block-dirty-bitmap-add", "block-dirty-bitmap-remove",
    "block-dirty-bitmap-clear", "block-dirty-bitmap-enable", "block-dirty-bitmap-disable",
    "block-dirty-bitmap-merge",
)  # fmt: skip
#: QEMU's events that a guest here can have.
EVENTS: Final = (
    "JOB_STATUS_CHANGE", "MIGRATION", "MIGRATION_PASS", "RESUME", "STOP", "SUSPEND", "WAKEUP",
)  # fmt: skip


def schemas(peers: Peers) -> tuple[Schema, Schema]:
    qemu, ours = (Schema(peer.client.execute("query-qmp-schema")["return"]) for peer in peers)
    return qemu, ours


def test_the_schema_mentions_nothing_that_is_not_in_it(peers: Peers) -> None:
    for schema in schemas(peers):
        schema.check()


def test_capabilities_are_marked_as_qemu_marks_them(peers: Peers) -> None:
    """Deprecated ones, the old ones that only we keep, too; and what may change."""
    features = []
    for schema in schemas(peers):
        features.append(schema.features_of_values("migrate-set-capabilities"))
    theirs, own = features
    assert own.pop("compress") == ["deprecated"]
    assert own == theirs
    assert own["zero-blocks"] == ["deprecated"]


def test_every_migration_command_has_the_arguments_that_qemu_declares(peers: Peers) -> None:
    qemu, ours = schemas(peers)
    missing = set(MIGRATION_COMMANDS) - ours.names("command")
    assert missing == set()
    unexplained = []
    used: set[Difference] = set()
    for name in sorted(qemu.names("command") & ours.names("command")):
        for path, one, other in unlike(qemu.arguments(name), ours.arguments(name)):
            known = {
                difference
                for difference in SCHEMA_DIFFERENCES
                if difference.request == name and re.fullmatch(difference.member, path)
            }
            used |= known
            if not known:
                unexplained.append(f"{name} {path}: QEMU {one!r}, ours {other!r}")
        for feature in ("allow-oob", "features"):
            one, other = qemu.find(name).get(feature), ours.find(name).get(feature)
            if one != other and name in MIGRATION_COMMANDS:
                unexplained.append(f"{name} {feature}: QEMU {one!r}, ours {other!r}")
    assert unexplained == []
    assert used == set(SCHEMA_DIFFERENCES), "an explanation is stale"


@pytest.mark.parametrize(
    "name",
    [
        "query-dirty-rate", "query-vcpu-dirty-limit", "add-fd", "query-fdsets", "query-yank",
        "query-colo-status", "query-xen-replication-status", "query-migrationthreads",
        "query-name", "query-uuid", "query-version", "query-commands",
    ],
)  # fmt: skip
def test_an_answer_has_the_members_that_qemu_declares(peers: Peers, name: str) -> None:
    qemu, ours = schemas(peers)
    assert list(unlike(qemu.answer(name), ours.answer(name))) == []


def test_the_schema_declares_all_commands_and_events_and_no_others(peers: Peers) -> None:
    qemu, ours = schemas(peers)
    client = peers[1].client
    for query, meta_type in (("query-commands", "command"), ("query-events", "event")):
        listed = {one["name"] for one in client.execute(query)["return"]}
        assert listed == ours.names(meta_type)
    of_ours = {name for name in ours.names("event") if name.startswith("X_")}
    assert set(EVENTS) <= ours.names("event") - of_ours <= qemu.names("event")
    for name in ("MIGRATION_PASS", "RESUME", "STOP", "SUSPEND", "WAKEUP"):
        assert ours.arguments(name) == qemu.arguments(name)


def test_a_command_of_ours_that_qemu_lacks_is_marked_or_old(peers: Peers) -> None:
    qemu, ours = schemas(peers)
    old = {"query-events"}  # QEMU had it until 6.0
    added = ours.names("command") - qemu.names("command")
    assert old <= added
    for name in added - old:
        deprecated = "deprecated" in ours.find(name).get("features", [])
        assert name.startswith("x-") or deprecated, name
