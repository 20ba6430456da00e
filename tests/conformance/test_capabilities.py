"""Every migration capability against a real QEMU: the same requests, the same answers."""
# ruff: noqa: E501

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final

from engine.control.capabilities import CAPABILITIES, DIRTY_LIMIT_CONFLICT
from tests.conformance.compare import Difference, command, compare
from tests.conformance.peers import WAIT_S, Peer, peer
from tests.support import eventually

QUERY: Final = {"execute": "query-migrate-capabilities"}
NAMES: Final = [one.name for one in CAPABILITIES if not one.is_hidden]
REFUSED: Final = [one.name for one in CAPABILITIES if one.refusal]
#: Whether QEMU takes them is up to the host's kernel.
BY_HOST: Final = ("background-snapshot", "postcopy-ram")


def _turn_on(*names: str) -> dict[str, object]:
    wanted = [{"capability": name, "state": True} for name in names]
    return command("migrate-set-capabilities", capabilities=wanted)


LACKS: Final = Difference(
    f'"({"|".join(REFUSED)})", "state": true',
    "return|error",
    "Capabilities that this build has not are refused, after QEMU's checks.",
    shown_by=[_turn_on(name) for name in REFUSED if name not in BY_HOST],
)
SNAPSHOT: Final = Difference(
    '"background-snapshot", "state": true',
    r"error|return|error\.desc",
    "QEMU asks the host's kernel and the guest's memory about background-snapshot.",
)
POSTCOPY: Final = Difference(
    '"postcopy-ram", "state": true',
    r"error|return|error\.desc",
    "QEMU asks the destination's kernel about postcopy-ram.",
)
COMPRESS: Final = Difference(
    '"compress"',
    r"error|return|error\.desc",
    "The capability `compress` of older QEMUs is kept, and shown once it was set.",
    shown_by=[_turn_on("compress")],
)
LONG: Final = Difference(
    "~{200}", r"error\.desc", "A message repeats at most 100 characters of what was given.",
    shown_by=[_turn_on("~" * 200)],
)  # fmt: skip
DIFFERENCES: Final = (LACKS, SNAPSHOT, POSTCOPY, COMPRESS, LONG)


def entries(given: object) -> dict[str, object]:
    return {"execute": "migrate-set-capabilities", "arguments": {"capabilities": given}}


def one_entry(capability: object, state: object = True, **more: object) -> dict[str, object]:
    return {"capability": capability, "state": state, **more}


def turn(names: Iterable[str], state: bool = True) -> dict[str, object]:
    return entries([one_entry(name, state) for name in names])


ALL_OFF: Final = turn(NAMES, False)


def exactly(names: Iterable[str]) -> dict[str, object]:
    """These on and all others off, so that no request depends on the one before."""
    wanted = set(names)
    return entries([one_entry(name, name in wanted) for name in NAMES])


def known(qemu: Peer) -> Sequence[Difference]:
    """What may differ on this host: where its kernel refuses background snapshots to QEMU, no
    conflict of theirs can be compared."""
    refused = "error" in qemu.client.ask(turn(["background-snapshot"]))
    qemu.client.ask(ALL_OFF)
    return (LACKS, SNAPSHOT) if refused else (LACKS,)


def test_a_fresh_process_shows_qemus_capabilities_in_qemus_order(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare([QUERY], qemu.client, ours.client)
    assert [one["capability"] for one in qemu.client.ask(QUERY)["return"]] == NAMES


def test_each_alone_is_set_shown_and_taken_back(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    for name in NAMES:
        compare([turn([name])], qemu.client, ours.client, known(qemu))
        if name not in REFUSED:
            compare([QUERY], qemu.client, ours.client)
        compare([turn([name], False), QUERY], qemu.client, ours.client)


def test_what_this_build_has_not_is_refused_in_one_line(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    before = ours.client.ask(QUERY)
    for name in REFUSED:
        request = turn(["events", name])
        compare([request, ALL_OFF], qemu.client, ours.client, known(qemu))
        assert "ramferry" in ours.client.ask(request)["error"]["desc"]
        assert ours.client.ask(QUERY) == before


def test_every_pair_conflicts_as_in_qemu(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    pairs = [exactly(pair) for pair in itertools.combinations(NAMES, 2)]
    compare(pairs, qemu.client, ours.client, known(qemu))


def test_where_qemu_sees_no_conflict_we_refuse_in_our_own_words(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    refusals = {one.refusal for one in CAPABILITIES if one.refusal}
    for name, other in itertools.product(REFUSED, NAMES):
        request = exactly([name, other])
        if "return" in qemu.client.ask(request):
            assert ours.client.ask(request)["error"]["desc"] in refusals, (name, other)


def test_every_three_conflict_in_qemus_order(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    names = [name for name in NAMES if name not in ("events", "zero-blocks")]  # in no conflict
    triples = [exactly(triple) for triple in itertools.combinations(names, 3)]
    compare(triples, qemu.client, ours.client, known(qemu))


def test_one_after_the_other_conflicts_and_changes_nothing(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    possible = [name for name in NAMES if name not in REFUSED]
    for first, second in itertools.permutations(possible, 2):
        requests = [turn([first]), turn([second]), QUERY, ALL_OFF]
        compare(requests, qemu.client, ours.client)


def test_conflicts_with_all_others_at_once(peers: tuple[Peer, Peer]) -> None:
    """From the full set, what conflicts first is taken away: every check is reached in turn."""
    qemu, ours = peers
    gone: list[str] = []
    steps = ("postcopy-ram", "background-snapshot", "postcopy-preempt", "zero-copy-send",
             "switchover-ack", "auto-converge", "dirty-limit", "multifd", "xbzrle")  # fmt: skip
    for name in ("", *steps):
        gone.append(name)
        names = [one for one in NAMES if one not in gone]
        compare([turn(names), ALL_OFF], qemu.client, ours.client, known(qemu))


def test_entries_of_every_wrong_shape(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    good = one_entry("events")
    lists: list[Any] = [
        None, 1, "x", True, {}, [], [1], [None], ["events"], [[]], [{}], [{"state": True}],
        [{"capability": "events"}], [one_entry(1)], [one_entry(None)], [one_entry(True)], [one_entry([])],
        [one_entry("events", 1)], [one_entry("events", "on")], [one_entry("events", None)],
        [one_entry("events", x=1)], [one_entry("nope")], [one_entry("")], [one_entry("nope", 1)],
        [one_entry("nope", x=1)], [one_entry("Events")], [one_entry("block")], [one_entry("nope", False)],
        [good, {}], [good, 1], [good, one_entry("nope")], [one_entry("events", x=1), one_entry("nope")],
        [one_entry("events", 1), 1], [good, one_entry("multifd"), one_entry("xbzrle", None)],
    ]  # fmt: skip
    requests: list[object] = [entries(given) for given in lists]
    requests += [
        {"execute": "migrate-set-capabilities"},
        {"execute": "migrate-set-capabilities", "arguments": {}},
        {"execute": "migrate-set-capabilities", "arguments": {"x": 1}},
        {"execute": "migrate-set-capabilities", "arguments": {"capabilities": [], "x": 1}},
        {"execute": "migrate-set-capabilities", "arguments": {"capabilities": 1, "x": 1}},
        {"execute": "query-migrate-capabilities", "arguments": {"x": 1}},
    ]
    for request in requests:
        compare([request, QUERY], qemu.client, ours.client)
    compare([entries([one_entry("~" * 200)]), QUERY], qemu.client, ours.client, [LONG])


def test_of_two_entries_for_one_capability_the_later_counts(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    on, off = one_entry("xbzrle"), one_entry("xbzrle", False)
    requests = []
    for given in ([on, off], [off, on], [one_entry("multifd"), on, off], [on, off, on]):
        requests += [entries(given), QUERY, ALL_OFF]
    compare(requests, qemu.client, ours.client)


def test_zero_copy_looks_at_compression_and_tls(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    plain, tls = (
        {"execute": "migrate-set-parameters", "arguments": {"tls-creds": value}}
        for value in ("", "a")
    )
    both = turn(["multifd", "zero-copy-send"])
    requests = [tls, both, QUERY, plain, both, QUERY, turn(["multifd"], False), QUERY]
    compare(requests, qemu.client, ours.client)


def test_a_destination_that_listens_takes_no_multifd_any_more(
    destinations: tuple[Peer, Peer],
) -> None:
    qemu, ours = destinations
    incoming = {"execute": "migrate-incoming", "arguments": {"uri": "tcp:127.0.0.1:0"}}
    requests = [
        turn(["events"]),
        turn(["multifd"]),
        incoming,
        turn(["return-path"]),  # a destination in setup is no migration in progress
        turn(["multifd"]),  # it is on already
        turn(["multifd", "xbzrle"]),
        QUERY,
        turn(["multifd"], False),
        turn(["multifd"]),
        turn(["multifd", "xbzrle"]),
        turn(["multifd", "zero-copy-send"]),
        turn(["multifd", "zero-copy-send", "xbzrle"]),
        turn(["multifd", "switchover-ack"]),
        turn(["postcopy-preempt"]),
        turn(["events", "multifd"], False),
        QUERY,
    ]
    compare(requests, qemu.client, ours.client)
    preempt = turn(["postcopy-ram", "postcopy-preempt"])
    compare([turn(["postcopy-ram"]), ALL_OFF], qemu.client, ours.client, [LACKS, POSTCOPY])
    answer = qemu.client.ask(preempt)["error"]["desc"]
    if not answer.startswith("Postcopy is not supported"):  # as kernels without userfaultfd say
        compare([preempt], qemu.client, ours.client)
    assert ours.client.ask(preempt)["error"]["desc"] == (
        "Postcopy preempt must be set before incoming starts"
    )


def test_nothing_is_set_while_a_migration_runs(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # it takes connections, says nothing
        uri = f"tcp:127.0.0.1:{nobody.getsockname()[1]}"
        migrate = {"execute": "migrate", "arguments": {"uri": uri}}
        # QEMU stays in pre-switchover; ramferry waits for the other side's first message
        compare([turn(["pause-before-switchover"]), migrate], qemu.client, ours.client)

        def status(one: Peer) -> Any:
            return one.client.execute("query-migrate")["return"].get("status")

        assert eventually(lambda: status(qemu) == "pre-switchover", WAIT_S)
        assert status(ours) == "setup"
        requests = [
            entries([]),
            turn(["events"]),
            turn(["events"], False),
            turn(["multifd", "xbzrle"]),
            entries([one_entry("nope")]),
            entries([one_entry("events", 1)]),
            QUERY,
        ]
        compare(requests, qemu.client, ours.client)
        compare([{"execute": "migrate_cancel"}], qemu.client, ours.client)
        assert eventually(lambda: {status(qemu), status(ours)} == {"cancelled"}, WAIT_S)
        compare([turn(["events"]), QUERY], qemu.client, ours.client)


def test_the_old_compression_is_kept_and_shown_once_it_was_set(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare([turn(["compress"])], qemu.client, ours.client, [COMPRESS])
    assert ours.client.ask(QUERY)["return"][-1] == {"capability": "compress", "state": True}
    for other, text in {
        "multifd": "Multifd is not compatible with compress",
        "xbzrle": "Compression is not compatible with xbzrle",
        "mapped-ram": "Mapped-ram migration is incompatible with compression",
    }.items():
        assert ours.client.ask(turn([other]))["error"]["desc"] == text
    compare([turn(["compress"], False)], qemu.client, ours.client, [COMPRESS])
    assert ours.client.ask(QUERY)["return"][-1] == {"capability": "compress", "state": False}


def test_dirty_limit_is_refused_as_in_qemu_or_works_where_the_guest_can() -> None:
    """The guest of the other tests has no vCPUs, as QEMU's here has no dirty ring."""
    with peer("ramferry", "--guest", "workload:size=16M") as ours:
        assert ours.client.ask(turn(["dirty-limit"])) == {"return": {}}
        answer = ours.client.ask(turn(["auto-converge"]))
        assert answer["error"]["desc"] == DIRTY_LIMIT_CONFLICT
        assert one_entry("dirty-limit") in ours.client.ask(QUERY)["return"]
