"""The human monitor: commands of QMP behind lines, and waiting for a migration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest

from engine.control.hmp.commands import build_monitor
from engine.control.hmp.console import OUTPUT_CHARACTERS_MAX, Console
from engine.control.hmp.held import HOLDING, Held
from engine.control.qmp.registry import CommandRegistry
from engine.control.status import ENDED, Status
from engine.errors import UsageError

WAIT_S: Final = 60.0


class Registry(CommandRegistry):
    """Commands that are written down, and answered from a table or a function."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name, answer in answers.items():
            self.add(name, self._handler(name, answer), None)

    def _handler(self, name: str, answer: Any) -> Callable[[Any], Any]:
        async def handler(given: Mapping[str, Any]) -> object:
            self.calls.append((name, dict(given)))
            if isinstance(answer, Exception):
                raise answer
            return await answer() if callable(answer) else answer

        return handler


class FakeMigration:
    """A migration whose status the test sets."""

    def __init__(self) -> None:
        self.status = Status.ACTIVE
        self.ended = asyncio.Event()

    def end(self, status: Status) -> None:
        self.status = status
        self.ended.set()


async def run_line(
    line: str, answers: Mapping[str, Any], migration: FakeMigration | None = None
) -> tuple[Console, list[tuple[str, dict[str, Any]]]]:
    registry = Registry(answers)
    monitor = build_monitor(registry, Held(lambda: migration))
    console = Console(can_wait=migration is not None)
    await monitor.run(line, console)
    return console, registry.calls


TIMING: Final = {
    "announce-initial": 1, "announce-max": 2, "announce-rounds": 3, "announce-step": 4,
    "xbzrle-cache-size": 65536,
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        ("migrate -d -r tcp:a:1", [("migrate", {"uri": "tcp:a:1", "resume": True})]),
        ("migrate_cancel", [("migrate_cancel", {})]),
        ("migrate_continue device", [("migrate-continue", {"state": "device"})]),
        ("migrate_incoming u", [("migrate-incoming", {"uri": "u", "exit-on-error": False})]),
        ("migrate_recover u", [("migrate-recover", {"uri": "u"})]),
        ("migrate_pause", [("migrate-pause", {})]),
        ("migrate_start_postcopy", [("migrate-start-postcopy", {})]),
        ("x_colo_lost_heartbeat", [("x-colo-lost-heartbeat", {})]),
        (
            "announce_self eth0,eth1 me",
            [("query-migrate-parameters", {}),
             ("announce-self", {"initial": 1, "max": 2, "rounds": 3, "step": 4,
                                "interfaces": ["eth0", "eth1"], "id": "me"})],
        ),
        (
            "announce_self",
            [("query-migrate-parameters", {}),
             ("announce-self", {"initial": 1, "max": 2, "rounds": 3, "step": 4})],
        ),
        (
            "client_migrate_info spice h 1 2 s",
            [("client_migrate_info", {"protocol": "spice", "hostname": "h", "port": 1,
                                      "tls-port": 2, "cert-subject": "s"})],
        ),
        (
            "migrate_set_capability multifd on",
            [("query-migrate-capabilities", {}),
             ("migrate-set-capabilities", {"capabilities": [{"capability": "multifd",
                                                             "state": True}]})],
        ),
        (
            "migrate_set_parameter max-bandwidth 2",
            [("migrate-set-parameters", {"max-bandwidth": 2 * 2**20})],
        ),
        (
            "migrate_set_parameter downtime-limit 2",
            [("migrate-set-parameters", {"downtime-limit": 2})],
        ),
        ("migrate_set_speed 3", [("migrate_set_speed", {"value": 3 * 2**20})]),
        ("migrate_set_downtime 0.25", [("migrate_set_downtime", {"value": 0.25})]),
        ("migrate_set_downtime 30ms", [("migrate_set_downtime", {"value": 0.03})]),
        (
            "migrate_set_cache_size 100000B",
            [("migrate-set-cache-size", {"value": 65536})],
        ),
        (
            "calc_dirty_rate 2",
            [("calc-dirty-rate", {"calc-time": 2, "mode": "page-sampling"})],
        ),
        (
            "calc_dirty_rate -b 2 512",
            [("calc-dirty-rate", {"calc-time": 2, "sample-pages": 512, "mode": "dirty-bitmap"})],
        ),
        ("calc_dirty_rate -r 2", [("calc-dirty-rate", {"calc-time": 2, "mode": "dirty-ring"})]),
        ("set_vcpu_dirty_limit 9", [("set-vcpu-dirty-limit", {"dirty-rate": 9})]),
        (
            "set_vcpu_dirty_limit 9 1",
            [("set-vcpu-dirty-limit", {"dirty-rate": 9, "cpu-index": 1})],
        ),
        ("cancel_vcpu_dirty_limit 0", [("cancel-vcpu-dirty-limit", {"cpu-index": 0})]),
        ("stop", [("stop", {})]), ("s", [("stop", {})]), ("c", [("cont", {})]),
        ("q", [("quit", {})]),
    ],
)  # fmt: skip
def test_a_line_is_a_command_of_qmp(line: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    answers: dict[str, Any] = {name: {} for name, _ in calls}
    answers["query-migrate-parameters"] = TIMING
    answers["query-migrate-capabilities"] = [{"capability": "multifd", "state": False}]
    console, done = asyncio.run(run_line(line, answers))
    assert done == calls
    assert not console.is_error
    assert console.is_over is (line == "q")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("migrate -d u", "Error: no\r\n"),
        ("migrate_pause", "Error: The command migrate-pause has not been found\r\n"),
        ("migrate_continue nope", "Error: invalid parameter value: nope\r\n"),
        ("migrate_set_capability nope on", "Error: invalid parameter value: nope\r\n"),
        ("stop\0nope", "unknown command: 'stop\\x00nope'\r\n"),
        ("calc_dirty_rate 0", "Incorrect period length specified!\r\n"),
        ("nope", "unknown command: 'nope'\r\n"),
        ("x_once x_once stop", "Error: x_once takes another command\r\n"),
        ("stop\x1b[2J", "unknown command: 'stop\\x1b[2J'\r\n"),
        ("x" * 4096, "Error: a line may have 4095 bytes\r\n"),
        ("nope" * 1000, f"unknown command: '{('nope' * 25)}...'\r\n"),
    ],
)  # fmt: skip
def test_a_refusal_is_text_and_an_error(line: str, text: str) -> None:
    answers = {"migrate": UsageError("no"), "query-migrate-capabilities": []}
    console, _ = asyncio.run(run_line(line, answers))
    assert (console.text, console.is_error) == (text, True)


def test_a_bug_is_text_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    console, _ = asyncio.run(run_line("stop", {"stop": KeyError("ours")}))
    assert console.text == "Error: internal error: KeyError('ours')\r\n"
    assert "internal error" in caplog.text


def test_what_is_printed_has_a_limit() -> None:
    console = Console(can_wait=False)
    console.print("x" * (2 * OUTPUT_CHARACTERS_MAX))
    assert len(console.text) < OUTPUT_CHARACTERS_MAX + 10


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("x_complete migrate_set_c", ["migrate_set_cache_size", "migrate_set_capability"]),
        ("x_complete info migrate_c", ["migrate_cache_size", "migrate_capabilities"]),
        ("x_complete help info st", ["status"]),
        ("x_complete migrate_set_capability postcopy-r", ["postcopy-ram"]),
        ("x_complete migrate_set_capability multifd ", ["off", "on"]),
        ("x_complete migrate_set_parameter downtime-", ["downtime-limit"]),
        ("x_complete migrate_set_parameter zero-page-detection l", ["legacy"]),
        ("x_complete migrate_set_parameter direct-io ", ["off", "on"]),
        (
            "x_complete migrate_set_parameter multifd-compression ",
            ["auto", "lz4", "none", "zlib", "zstd"],
        ),
        ("x_complete migrate_set_parameter multifd-compression l", ["lz4"]),
        ("x_complete migrate_set_parameter multifd-compression a", ["auto"]),
        ("x_complete migrate_set_parameter multifd-l", ["multifd-lz4-acceleration"]),
        ("x_complete migrate_set_parameter x-compress", ["x-compress-cpu-percent"]),
        ("x_complete migrate_set_parameter multifd-lz4-acceleration ", []),
        ("x_complete migrate_continue pre", ["pre-switchover"]),
        ("x_complete x_once info ver", ["version"]),
        ("x_complete " + "? " * 2000 + "info ver", ["version"]),
        ("x_complete migrate tcp:", []),
        ("x_complete nope ", []),
    ],
)
def test_completion(line: str, candidates: list[str]) -> None:
    console, _ = asyncio.run(run_line(line, {}))
    assert console.text.split("\r\n")[:-1] == candidates


def test_completion_of_nothing_lists_the_commands() -> None:
    console, _ = asyncio.run(run_line("x_complete", {}))
    names = console.text.split("\r\n")[:-1]
    assert names == sorted(names)
    assert {"?", "c", "cont", "info", "migrate", "x_once"} <= set(names)


def test_once_says_first_whether_it_went_well() -> None:
    console, _ = asyncio.run(run_line("x_once nope", {}))
    assert console.text == "error\r\nunknown command: 'nope'\r\n"
    console, _ = asyncio.run(run_line("x_once quit", {"quit": {}}))
    assert (console.text, console.is_over) == ("ok\r\n", True)


@pytest.mark.parametrize("error", [None, "disk full"])
def test_savevm_waits_for_its_job_and_dismisses_it(error: str | None) -> None:
    states = iter(["running", "concluded"])

    async def jobs() -> object:
        job = {"id": "hmp-snapshot-save-0", "status": next(states)}
        return [{"id": "another", "status": "running"}, job | ({"error": error} if error else {})]

    async def scenario() -> tuple[Console, list[tuple[str, dict[str, Any]]]]:
        registry = Registry({"snapshot-save": {}, "query-jobs": jobs, "job-dismiss": {}})
        held = Held(lambda: None)
        console = Console(can_wait=True)
        running = asyncio.ensure_future(build_monitor(registry, held).run("savevm x", console))
        while len(registry.calls) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        held.notify("JOB_STATUS_CHANGE")
        async with asyncio.timeout(WAIT_S):
            await running
        return console, registry.calls

    console, calls = asyncio.run(scenario())
    assert [name for name, _ in calls] == ["snapshot-save", *["query-jobs"] * 2, "job-dismiss"]
    assert calls[0][1]["tag"] == "x"
    assert console.text == (f"Error: {error}\r\n" if error else "")


# -- waiting for a migration ---------------------------------------------------------------------


def test_migrate_that_cannot_wait_says_so_and_goes_on() -> None:
    console, calls = asyncio.run(run_line("migrate u", {"migrate": {}}))
    text = "terminal does not allow synchronous migration, continuing detached\r\n"
    assert (console.text, console.is_error) == (text, False)
    assert calls == [("migrate", {"uri": "u", "resume": False})]


def test_what_is_held_is_what_goes_on_by_itself() -> None:
    assert set() == HOLDING & ENDED
    assert HOLDING.isdisjoint(
        {Status.PRE_SWITCHOVER, Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED}
    )


@pytest.mark.parametrize(
    ("status", "info", "text"),
    [
        (Status.COMPLETED, {"status": "completed"}, ""),
        (Status.FAILED, {"status": "failed", "error-desc": "why"}, "Error: why\r\n"),
        (Status.PRE_SWITCHOVER, {"status": "pre-switchover"}, ""),
        (
            Status.POSTCOPY_PAUSED,
            {"status": "postcopy-paused", "error-desc": "why"},
            "Error: why\r\n",
        ),
        (Status.POSTCOPY_ACTIVE, {"status": "postcopy-active"}, ""),
    ],
)
def test_migrate_waits_until_it_needs_no_more_waiting_for(
    status: Status, info: Mapping[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.control.hmp.held.LOOK_S", 3600.0)  # an event must tell

    async def scenario() -> tuple[str, bool]:
        migration = FakeMigration()
        held = Held(lambda: migration)
        monitor = build_monitor(Registry({"migrate": {}, "query-migrate": info}), held)
        console = Console(can_wait=True)
        waiting = asyncio.ensure_future(monitor.run("migrate u", console))
        recovery = (Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER)
        for waits in (Status.SETUP, Status.ACTIVE, Status.DEVICE, *recovery):
            migration.status = waits
            held.notify("MIGRATION")
            for _ in range(10):
                await asyncio.sleep(0)
            assert not waiting.done()
        migration.status = status
        held.notify("MIGRATION") if status not in ENDED else migration.end(status)
        async with asyncio.timeout(WAIT_S):
            await waiting
        return console.text, console.is_error

    assert asyncio.run(scenario()) == (text, bool(text))


def test_without_an_event_the_status_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.control.hmp.held.LOOK_S", 0.01)

    async def scenario() -> None:
        migration = FakeMigration()
        waiting = asyncio.ensure_future(Held(lambda: migration).migration())
        await asyncio.sleep(0)
        migration.status = Status.POSTCOPY_ACTIVE
        async with asyncio.timeout(WAIT_S):
            await waiting

    asyncio.run(scenario())
