"""Postcopy beside a real QEMU: what each status answers, and in which order statuses come."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pytest

from tests.conformance.compare import Difference, command, compare, compare_values
from tests.conformance.couples import Couple, members, settled_status
from tests.conformance.peers import WAIT_S, Client, peer
from tests.kernel import has_userfaultfd
from tests.support import eventually

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]

DIFFERENCES: Final = (
    Difference(
        r'"(migrate|migrate-recover)".*"(fd:nope|exec:true|file:/nonexistent/x)"',
        r"return|error|error\.desc",
        "A paused postcopy goes on over `tcp:` and `unix:` only, for a stream has no room for its "
        "channels.",
    ),
    Difference(
        "query-migrationthreads", r"return.*",
        "`query-migrationthreads` lists worker processes, `multifdsend_0` or `multifdrecv_0` and "
        "so on; the others of QEMU's threads have no counterpart.",
    ),
    Difference(
        "query-yank", r"return.*",
        "`query-yank` lists no monitors: only the migration can be yanked, from its begin to its "
        "end.",
        shown_by=[command("query-yank")],
    ),
    Difference(
        "paused.*", r"destination members.*",
        "A destination says in `error-desc` why its postcopy is paused.",
    ),
    Difference(
        "guest stopped", r"destination|destination status.*",
        "A guest that its user has stopped stands at the destination of a postcopy, too; QEMU's "
        "runs.",
    ),
    Difference(
        "command-line.*migrate_cancel", "return",
        "`migrate_cancel` of HMP says why a postcopy is not cancelled; QEMU's says nothing.",
    ),
    Difference(
        "", r"destination members.*completed",
        "`postcopy-latency`, `postcopy-latency-dist` and `postcopy-vcpu-latency` are there, as in "
        "newer QEMUs.",
    ),
)  # fmt: skip

#: Ours touches its memory slowly, for every touch brings a page.
WRITING: Final = ("--guest", "workload:size=64M,rate=1M,pattern=random")
POSTCOPY: Final = ("postcopy-ram", "postcopy-blocktime")
#: QEMU's guest has half a MB that is not zero.
SLOW: Final = {"max-bandwidth": 50_000, "downtime-limit": 1, "max-postcopy-bandwidth": 4096}
NOBODY: Final = "tcp:127.0.0.1:1"


@contextlib.contextmanager
def couple(engine: str, *capabilities: str, runs: bool = False) -> Iterator[Couple]:
    """Both sides of one engine; the source runs.

    :param runs: the guest, at the destination, too; QEMU's may answer nothing while a page that it
        touches is missing."""
    more = () if engine == "qemu" else WRITING
    with peer(engine, *more) as source, peer(engine, *more, incoming="defer") as destination:
        one = Couple(source, destination, *capabilities)
        one.source.execute("cont")
        one.destination.execute("cont" if runs else "stop")
        one.source.events.clear()
        one.set(SLOW)
        yield one


def status_of(client: Client) -> Any:
    return client.execute("query-migrate")["return"].get("status")


def until(client: Client, status: str) -> None:
    assert eventually(lambda: status_of(client) == status, WAIT_S), status_of(client)


def begin(couple: Couple) -> None:
    """The guest runs at the destination, and lacks pages."""
    couple.migrate()
    couple.source.wait_event("MIGRATION", status="active")
    assert couple.source.execute("migrate-start-postcopy") == {"return": {}}
    for one in (couple.source, couple.destination):
        until(one, "postcopy-active")


def pause(couple: Couple) -> None:
    assert couple.source.execute("migrate-pause") == {"return": {}}
    for one in (couple.source, couple.destination):
        until(one, "postcopy-paused")


def recover(couple: Couple) -> None:
    answer = couple.destination.execute("migrate-recover", uri="tcp:127.0.0.1:0")
    assert answer == {"return": {}}
    info = couple.destination.execute("query-migrate")["return"]
    couple.uri = f"tcp:127.0.0.1:{info['socket-address'][0]['port']}"
    assert couple.source.execute("migrate", uri=couple.uri, resume=True) == {"return": {}}
    for one in (couple.source, couple.destination):
        until(one, "postcopy-active")


def finish(couple: Couple) -> None:
    couple.set({"max-postcopy-bandwidth": 0})
    for one in (couple.source, couple.destination):
        one.wait_event("MIGRATION", status="completed")


# -- sequences -------------------------------------------------------------------------------------


def _plain(couple: Couple) -> dict[str, Any]:
    couple.set({"max-postcopy-bandwidth": 0})
    couple.migrate()
    couple.source.wait_event("MIGRATION", status="active")
    assert couple.source.execute("migrate-start-postcopy") == {"return": {}}
    finish(couple)
    return {}


def _at_once(couple: Couple) -> dict[str, Any]:
    """No answer is waited for between the two commands."""
    requests = (
        {"execute": "migrate", "arguments": {"uri": couple.uri}},
        {"execute": "migrate-start-postcopy"},
    )
    for request in requests:
        couple.source.send(request)
    seen = {"answers": [couple.source.answer() for _ in requests]}
    finish(couple)
    return seen


def _stopped(couple: Couple) -> dict[str, Any]:
    couple.source.execute("stop")
    return _plain(couple)


def _recovers(couple: Couple) -> dict[str, Any]:
    """Section 5.3's: pause, bad resume, good resume."""
    begin(couple)
    pause(couple)
    assert couple.source.execute("migrate", uri=NOBODY, resume=True) == {"return": {}}
    couple.source.wait_event("MIGRATION", status="postcopy-recover-setup")
    until(couple.source, "postcopy-paused")
    info = couple.source.execute("query-migrate")["return"]
    recover(couple)
    recovered = couple.source.execute("query-migrate")["return"]
    finish(couple)
    return {"bad": info["error-desc"], "recovered": members(recovered)}


def _paused_there(couple: Couple) -> dict[str, Any]:
    """The destination is told to pause; the source learns of it."""
    begin(couple)
    seen = {"pause": couple.destination.execute("migrate-pause")}
    for one in (couple.source, couple.destination):
        until(one, "postcopy-paused")
    recover(couple)
    finish(couple)
    return seen


def _twice(couple: Couple) -> dict[str, Any]:
    begin(couple)
    for _ in range(2):
        pause(couple)
        recover(couple)
    finish(couple)
    return {}


def _unanswered(couple: Couple) -> dict[str, Any]:
    """Who is reached does not speak; the source is told to pause."""
    begin(couple)
    pause(couple)
    with mute() as uri:
        assert couple.source.execute("migrate", uri=uri, resume=True) == {"return": {}}
        until(couple.source, "postcopy-recover")
        pause_again = couple.source.execute("migrate-pause")
        until(couple.source, "postcopy-paused")
    recover(couple)
    finish(couple)
    return {"pause": pause_again}


def _yanked(couple: Couple) -> dict[str, Any]:
    begin(couple)
    seen = {"yank": couple.source.execute("yank", instances=[{"type": "migration"}])}
    for one in (couple.source, couple.destination):
        until(one, "postcopy-paused")
    recover(couple)
    finish(couple)
    return seen


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """Somebody who takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"


Scenario = Callable[[Couple], dict[str, Any]]
#: The guest runs at the destination.
RUNNING: Final[dict[str, tuple[Scenario, tuple[str, ...]]]] = {
    "postcopy": (_plain, POSTCOPY),
    "postcopy without blocktime": (_plain, POSTCOPY[:1]),
    "postcopy with preempt": (_plain, (*POSTCOPY, "postcopy-preempt")),
    "postcopy at once": (_at_once, POSTCOPY),
    "postcopy, guest stopped": (_stopped, POSTCOPY),
}
STANDING: Final[dict[str, tuple[Scenario, tuple[str, ...]]]] = {
    "pause, bad resume, good resume": (_recovers, POSTCOPY),
    "pause, bad resume, good resume, with preempt": (_recovers, (*POSTCOPY, "postcopy-preempt")),
    "pause at the destination": (_paused_there, POSTCOPY),
    "two pauses": (_twice, POSTCOPY),
    "a resume that is not answered": (_unanswered, POSTCOPY),
    "yank": (_yanked, POSTCOPY),
}


@pytest.mark.parametrize("name", [*RUNNING, *STANDING])
def test_a_client_sees_what_it_sees_of_qemu(name: str) -> None:
    scenario, capabilities = (RUNNING | STANDING)[name]
    seen = []
    for engine in ("qemu", "ramferry"):
        with couple(engine, *capabilities, runs=name in RUNNING) as one:
            seen.append(scenario(one) | one.seen())

    theirs, own = map(by_name, seen)
    compare_values(name, theirs, own, DIFFERENCES)


def by_name(seen: dict[str, Any]) -> dict[str, Any]:
    """Lists of members as objects, so that a member more is one difference."""
    return {
        name: {f"{member} {seen['destination migration']}": True for member in value}
        if name.endswith("members")
        else value
        for name, value in seen.items()
    }


# -- answers in each status ------------------------------------------------------------------------


def request(command: str, **arguments: object) -> dict[str, object]:
    given = {name.replace("_", "-"): value for name, value in arguments.items()}
    return {"execute": command, "arguments": given}


def human(line: str) -> dict[str, object]:
    return request("human-monitor-command", command_line=line)


#: Nothing here changes a status.
LINES: Final = (
    "migrate_start_postcopy", "migrate_cancel", "migrate_continue active",
    "migrate_set_capability events on",
    "migrate_recover foo:1", "migrate_recover", "migrate -d -r foo:1", "info status",
)  # fmt: skip
ANYWHERE: Final = (
    request("migrate-start-postcopy"),
    request("migrate_cancel"),
    request("migrate-pause", x=1),
    request("migrate-recover"),
    request("migrate-recover", uri=1),
    request("migrate-recover", uri="foo:1"),
    request("migrate-recover", uri="foo:1", x=1),
    request("migrate", uri="foo:1", resume=True),
    request("migrate", resume=True),
    request("migrate-continue", state="postcopy-active"),
    request("migrate-continue", state="postcopy-paused"),
    request("migrate-continue", state="postcopy-recover"),
    request("migrate-continue", state="active"),
    request("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]),
    request("migrate-set-parameters", max_postcopy_bandwidth=4096),
    request("migrate-incoming", uri="tcp:127.0.0.1:0"),
    request("query-status"),
    request("query-yank"),
    request("query-migrationthreads"),
    *map(human, LINES),
)
AT_SOURCE: Final = (
    *ANYWHERE,
    request("cont"),
    human("cont"),
    request("migrate", uri=NOBODY),
    request("migrate", uri="foo:1"),
    human(f"migrate -d {NOBODY}"),
    request("stop"),
    request("query-status"),
)
NOT_PAUSED: Final = (request("migrate", uri=NOBODY, resume=True), human(f"migrate -d -r {NOBODY}"))
NOT_PAUSABLE: Final = (request("migrate-pause"), human("migrate_pause"))
#: Refused where a postcopy is paused, too.
RESUMES: Final = (
    request("migrate", uri="fd:nope", resume=True),
    request("migrate", uri="file:/nonexistent/x", resume=True),
    request(
        "migrate-set-capabilities", capabilities=[{"capability": "release-ram", "state": True}]
    ),
)
RECOVERIES: Final = tuple(
    request("migrate-recover", uri=uri)
    for uri in (
        "tcp", "", "fd:nope", "exec:true", "file:/nonexistent/x", "unix:/nonexistent/x",
        "tcp:127.0.0.1:0", "tcp:127.0.0.1:0",
    )
)  # fmt: skip


@contextlib.contextmanager
def couples(*capabilities: str) -> Iterator[tuple[Couple, Couple]]:
    with couple("qemu", *capabilities) as qemu, couple("ramferry", *capabilities) as ours:
        yield qemu, ours


class Both:
    """QEMU's couple and ours, in the same status."""

    def __init__(self, *both: Couple) -> None:
        self.both = both

    def do(self, step: Callable[[Couple], object]) -> None:
        for one in self.both:
            step(one)

    def compare(self, side: str, requests: Sequence[object]) -> None:
        qemu, ours = (getattr(one, side) for one in self.both)
        compare(requests, qemu, ours, DIFFERENCES)

    def shapes(self, name: str) -> None:
        """Members of query-migrate, and lines of HMP's `info migrate`, on both sides."""
        for side in ("source", "destination"):
            theirs, own = (shape(getattr(one, side), side) for one in self.both)
            compare_values(f"{name}: {side}", theirs, own, DIFFERENCES)


#: What is there only if it is not zero.
OPTIONAL: Final = ("dirty pages rate", "postcopy request count", "precopy ram", "downtime ram",
                   "postcopy ram")  # fmt: skip


def shape(client: Client, side: str) -> dict[str, Any]:
    info = client.execute("query-migrate")["return"]
    text = client.ask(human("info migrate"))["return"]
    lines = [re.sub(r"[0-9.]+", "N", line) for line in text.splitlines()]
    ram = info.get("ram", {})
    return {
        f"{side} members": dict.fromkeys(members(info), True),
        "status": info["status"],
        "ram": sorted(ram),
        "lines": [line for line in lines if not line.startswith(OPTIONAL)],
        "error": info.get("error-desc") if side == "source" else None,
    }


def test_every_status_answers_as_qemus_does() -> None:
    with couples(*POSTCOPY) as pair:
        both = Both(*pair)
        for side in ("source", "destination"):
            both.compare(side, [request("migrate-start-postcopy"), *NOT_PAUSABLE, *NOT_PAUSED[:1]])
        both.do(begin)
        both.shapes("active")
        both.compare("source", [*AT_SOURCE, *NOT_PAUSED])
        both.compare("destination", ANYWHERE)
        both.do(pause)
        both.shapes("paused")
        both.compare("source", [*AT_SOURCE, *NOT_PAUSABLE, *RESUMES])
        both.compare("destination", [*ANYWHERE, *NOT_PAUSABLE])
        with mute() as busy:
            both.compare("destination", [request("migrate-recover", uri=busy), *RECOVERIES])
        both.shapes("paused, listening")
        with mute() as uri:
            both.compare("source", [request("migrate", uri=uri, resume=True)])
            both.do(lambda one: until(one.source, "postcopy-recover"))
            both.shapes("paused, recovering")
            both.compare("source", [*AT_SOURCE, *NOT_PAUSED, human("migrate_pause")])
            both.do(lambda one: until(one.source, "postcopy-paused"))
        with unreachable() as uri:
            both.compare("source", [human(f"migrate -d -r {uri}")])
            both.do(lambda one: until(one.source, "postcopy-recover-setup"))
            both.shapes("paused, reconnecting")
            both.compare("source", [*AT_SOURCE, *NOT_PAUSED, *NOT_PAUSABLE])
        both.do(lambda one: until(one.source, "postcopy-paused"))
        both.do(recover)
        both.shapes("recovered")
        both.do(finish)
        both.do(lambda one: settled_status(one.source))
        both.shapes("completed")
        for side in ("source", "destination"):
            both.compare(side, [request("migrate-start-postcopy"), *NOT_PAUSABLE, *NOT_PAUSED[:1],
                                request("migrate_cancel"), request("query-status"),
                                request("migrate-recover", uri="foo:1")])  # fmt: skip


@contextlib.contextmanager
def unreachable() -> Iterator[str]:
    """Somebody who is too busy to take a connection, until it closes."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"


def test_a_stream_has_no_room_for_preempt_nor_for_what_is_paused() -> None:
    with couples(*POSTCOPY, "postcopy-preempt") as pair:
        both = Both(*pair)
        both.do(begin)
        both.do(pause)
        both.compare("source", [*RESUMES[:2], request("migrate", uri="exec:true", resume=True)])
        both.compare("destination", RECOVERIES)


def test_without_the_capability_postcopy_is_refused() -> None:
    with couples() as pair:
        both = Both(*pair)
        both.compare("source", [request("migrate-start-postcopy")])
        both.do(lambda one: one.migrate())
        both.do(lambda one: one.source.wait_event("MIGRATION", status="active"))
        both.compare("source", [request("migrate-start-postcopy"), *NOT_PAUSABLE])
        both.compare("destination", [request("migrate-recover", uri="foo:1"), *NOT_PAUSABLE])
