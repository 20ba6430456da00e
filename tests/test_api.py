"""The library drives real control processes: the README's example, failures, and what is left."""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

import engine

pytestmark = pytest.mark.process

ROOT = Path(__file__).parent.parent
TINY = "workload:size=16M"


def test_the_example_in_the_readme_runs_and_is_right() -> None:
    done = subprocess.run(
        [sys.executable, "-c", example("README.md")],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("right: True")


def example(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_example_of_callbacks_hears_each_change_twice() -> None:
    done = subprocess.run(
        [sys.executable, "-c", example("docs/library.md")],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    statuses = ("setup", "active", "device", "completed")
    moments = [(moment, status) for status in statuses for moment in ("before", "after")]
    assert done.stdout.split("\n")[:-1] == [f"source {m} {status}" for m, status in moments]


def test_a_hosted_guest_is_gone_when_a_callback_refuses_the_migration() -> None:
    def refuse(change: engine.Change) -> None:
        raise engine.MigrationError("not today")

    async def scenario() -> int:
        async with engine.hosted(f"{TINY},rate=5M", settings=["max-bandwidth=1M"]) as source:
            assert source.parameters.max_bandwidth == 2**20
            source.notifiers.add(refuse)
            await source.migrate(engine.parse_uri("tcp:127.0.0.1:9"), resume=False)
            assert source.outgoing is not None
            await source.outgoing.ended.wait()
            assert source.outgoing.status is engine.Status.FAILED
            assert source.outgoing.machine.error == "not today"
            assert source.guest.is_running
            return int(source.guest.pid)  # type: ignore[attr-defined]

    with pytest.raises(ProcessLookupError):
        os.kill(asyncio.run(scenario()), 0)


def test_a_hosted_guest_with_a_wrong_setting_leaves_nothing() -> None:
    async def scenario() -> None:
        async with engine.hosted(TINY, settings=["max-bandwidth=much"]):
            raise AssertionError("it began")

    with pytest.raises(engine.UsageError, match="much"):
        asyncio.run(scenario())


def test_qmp_shell_drives_a_migration_as_the_readme_says() -> None:
    def shell(control: engine.Control, *lines: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name("qmp-shell"), control.qmp_path],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout

    async def scenario() -> tuple[str, str]:
        source = engine.Control.start(f"{TINY},rate=5M")
        destination = engine.Control.start(TINY, incoming="tcp:127.0.0.1:0")
        async with source, destination:
            uri = await destination.address()
            lines = ("migrate-set-parameters max-bandwidth=0", f"migrate uri={uri}")
            said = await asyncio.to_thread(shell, source, *lines)
            await engine.Migration(source).result()
            async with asyncio.timeout(60):  # its guest tells the source, and then its own control
                while not (await destination.execute("query-status"))["running"]:
                    await asyncio.sleep(0.01)
            return said, await asyncio.to_thread(shell, destination, "query-status", "x-judge")

    at_source, at_destination = asyncio.run(scenario())
    assert at_source.count('{"return": {}}') == 2
    assert '"status": "running"' in at_destination
    assert '"wrong-pages": 0' in at_destination


#: Its arguments are a program that joins stdin and stdout to the monitor, as socat does.
SCRIPT: Final = r"""
coproc "$@"
printf '%s\n' '{"execute":"qmp_capabilities"}' \
    '{"execute":"migrate-set-capabilities","arguments":{"capabilities":[
        {"capability":"events","state":true}]}}' \
    '{"execute":"migrate","arguments":{"uri":"'"$URI"'"}}' >&"${COPROC[1]}"
while read -r line <&"${COPROC[0]}"; do
    echo "$line"
    case "$line" in
        *'"status":"completed"'*) exit 0 ;;
        *'"status":"failed"'* | *'"error"'*) exit 1 ;;
    esac
done
exit 2
"""
#: socat, for machines that have none.
JOIN: Final = """
import os, socket, sys, threading
there = socket.socket(socket.AF_UNIX)
there.connect(sys.argv[1])
def answers():
    while data := there.recv(65536):
        os.write(1, data)
threading.Thread(target=answers, daemon=True).start()
while data := os.read(0, 65536):
    there.sendall(data)
"""


def test_a_plain_script_with_socat_drives_a_migration() -> None:
    def script(control: engine.Control, uri: str) -> list[str]:
        join = [sys.executable, "-c", JOIN, control.qmp_path]
        if socat := shutil.which("socat"):
            join = [socat, "-", f"UNIX-CONNECT:{control.qmp_path}"]
        done = subprocess.run(
            ["bash", "-c", SCRIPT, "script", *join], env={**os.environ, "URI": uri},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    async def scenario() -> tuple[list[str], engine.Verdict]:
        source = engine.Control.start(f"{TINY},rate=5M")
        destination = engine.Control.start(TINY, incoming="tcp:127.0.0.1:0")
        async with source, destination:
            said = await asyncio.to_thread(script, source, await destination.address())
            return said, await engine.verify(source, destination)

    said, verdict = asyncio.run(scenario())
    assert said[0].startswith('{"QMP":')
    assert said.count('{"return":{}}') == 3
    assert verdict.is_right


def test_statistics_are_typed_and_add_up() -> None:
    async def scenario() -> tuple[engine.Statistics, engine.Verdict]:
        source = engine.Control.start(f"{TINY},rate=5M,pattern=random")
        destination = engine.Control.start(TINY, incoming="tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(destination, multifd_channels=3, max_bandwidth=0)
            return await migration.result(), await engine.verify(source, destination)

    result, verdict = asyncio.run(scenario())
    assert result.status is engine.Status.COMPLETED
    assert verdict.is_right
    assert verdict.verified_pages == 4096
    assert result.downtime_ms is not None
    assert abs(sum(result.phases_ns.values()) / 1e6 - result.downtime_ms) <= 1
    assert len(result.channels) == 3
    assert sum(channel["pages"] for channel in result.channels) == result.normal_pages
    assert result.transferred_bytes > result.normal_pages * 4096
    assert result.total_bytes == 16 * 1024 * 1024


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_both_families_of_addresses_work(host: str) -> None:
    async def scenario() -> engine.Verdict:
        source = engine.Control.start(TINY)
        destination = engine.Control.start(TINY, incoming=f"tcp:{host}:0")
        async with source, destination:
            await (await source.migrate(destination, max_bandwidth=0)).result()
            return await engine.verify(source, destination)

    assert asyncio.run(scenario()).is_right


def test_every_extension_is_documented() -> None:
    async def scenario() -> set[str]:
        source = engine.Control.start(TINY)
        destination = engine.Control.start(TINY, incoming="tcp:127.0.0.1:0")
        async with source, destination:
            names = {command["name"] for command in await source.execute("query-commands")}
            names |= set(await source.execute("query-migrate-parameters"))
            capabilities = await source.execute("query-migrate-capabilities")
            result = await (await source.migrate(destination)).result()
            names |= {each["capability"] for each in capabilities} | set(result.raw)
            return names | set(await source.query_guest()) | set(await source.judge())

    qemu_has_them = {"x-checkpoint-delay", "x-colo", "x-ignore-shared", "x-vcpu-dirty-limit-period"}
    ours_only = {"kind", "pid", "writes", "tracker", "blocks", "first-wrong", "counters-path"}
    names = asyncio.run(scenario())
    ours = {name for name in names if name.startswith("x-")} - qemu_has_them | ours_only
    documented = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "extensions.md").read_text()))
    assert ours_only <= names
    assert ours <= documented, ours - documented


def test_a_unix_path_works_and_leaves_no_file(tmp_path: Path) -> None:
    async def scenario() -> engine.Verdict:
        source = engine.Control.start(f"{TINY},rate=5M")
        destination = engine.Control.start(TINY, incoming=f"unix:{tmp_path}/in")
        async with source, destination:
            await (await source.migrate(destination, max_bandwidth=0)).result()
            return await engine.verify(source, destination)

    assert asyncio.run(scenario()).is_right
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tracker", ["uffd-wp", "guest-bitmap", "content-hash"])
def test_every_tracker_that_works_here_moves_a_writing_guest(tracker: str) -> None:
    async def scenario() -> tuple[engine.Statistics, engine.Verdict]:
        source = engine.Control.start(f"{TINY},rate=20M,pattern=random")
        destination = engine.Control.start(TINY, incoming="tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(
                destination, max_bandwidth=40_000_000, x_tracker=tracker
            )
            return await migration.result(), await engine.verify(source, destination)

    result, verdict = asyncio.run(scenario())
    assert result.tracker == tracker
    assert verdict.is_right


def test_a_failed_migration_raises_with_the_reason_and_the_guest_runs() -> None:
    async def scenario() -> tuple[str, bool]:
        async with engine.Control.start(f"{TINY},rate=5M") as source:
            migration = await source.migrate("tcp:127.0.0.1:9")
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            return str(failed.value), (await source.query_guest())["running"]

    assert asyncio.run(scenario()) == (
        "Failed to connect to '127.0.0.1:9': Connection refused",
        True,
    )


class Answers:
    """In place of a control process: answers query-migrate."""

    def __init__(self, **answer: Any) -> None:
        self.answer = answer

    async def execute(self, command: str) -> Any:
        assert command == "query-migrate"
        return self.answer


def test_a_handover_whose_outcome_is_unknown_is_an_error_of_its_own() -> None:
    lost: Any = Answers(**{"status": "failed", "error-desc": "no answer", "x-handover": "unknown"})

    with pytest.raises(engine.OutcomeUnknown, match="it stays stopped: no answer") as unknown:
        asyncio.run(engine.Migration(lost).result())

    assert not isinstance(unknown.value, engine.MigrationFailed)
    assert isinstance(unknown.value, engine.MigrationError)
    assert engine.Statistics.of(lost.answer).is_outcome_unknown


def test_a_wrong_guest_is_a_usage_error_in_one_line() -> None:
    async def scenario() -> None:
        async with engine.Control.start("workload:size=1"):
            pass

    with pytest.raises(engine.UsageError, match="multiple of 4096") as refused:
        asyncio.run(scenario())
    assert "\n" not in str(refused.value)


def test_leaving_the_block_by_an_exception_ends_the_process() -> None:
    pids = []

    async def scenario() -> None:
        async with engine.Control.start(TINY) as control:
            pids.append(control.pid)
            raise KeyError("the script's own")

    with pytest.raises(KeyError):
        asyncio.run(scenario())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


async def ask_for_ever(control: engine.Control) -> None:
    while True:
        await control.query_guest()


def test_the_control_process_goes_first_but_not_what_it_starts() -> None:
    async def scenario() -> tuple[int, set[int]]:
        async with engine.Control.start(TINY) as control:
            pid = control.pid
            started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            assert started
            nice = {os.getpriority(os.PRIO_PROCESS, int(child)) for child in started}
            return os.getpriority(os.PRIO_PROCESS, pid), nice

    ours = os.getpriority(os.PRIO_PROCESS, 0)
    first = -20 if os.geteuid() == ours == 0 else ours
    assert asyncio.run(scenario()) == (first, {ours})


@pytest.mark.skipif(os.geteuid() != 0, reason="others than root do not go first at all")
@pytest.mark.parametrize(
    "before", ["os.nice(5)", "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))"]
)
def test_who_was_scheduled_by_its_operator_stays_so(before: str) -> None:
    look = "(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))"
    program = (
        f"import os; from engine.worker import answer_promptly; {before}; was = {look}; "
        f"answer_promptly(); print(was == {look})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"True\n"


def test_closing_ends_a_guest_whose_control_process_was_killed() -> None:
    async def scenario() -> tuple[bool, int]:
        async with engine.Control.start(f"{TINY},rate=5M") as control:
            guest = (await control.query_guest())["pid"]
            pidfd = os.pidfd_open(guest)
            os.kill(control.pid, signal.SIGKILL)
            with pytest.raises(engine.MigrationError, match="is gone"):
                await asyncio.wait_for(ask_for_ever(control), 60)
            runs_on = not select.select([pidfd], [], [], 0)[0]
        return runs_on, pidfd

    runs_on, pidfd = asyncio.run(scenario())
    is_ended = bool(select.select([pidfd], [], [], 0)[0])
    os.close(pidfd)
    assert runs_on
    assert is_ended


def test_a_cancelled_script_ends_its_processes() -> None:
    pids = []

    async def scenario() -> None:
        async with engine.Control.start(TINY) as control:
            pids.append(control.pid)
            await asyncio.get_running_loop().create_future()

    async def cancelled() -> None:
        task = asyncio.create_task(scenario())
        while not pids:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(0.3), engine.Control.start("workload:size=256M"):
            await asyncio.get_running_loop().create_future()

    with pytest.raises(TimeoutError):
        asyncio.run(scenario())


def test_a_cancelled_migration_raises_and_the_guest_runs() -> None:
    async def scenario() -> tuple[engine.Status, bool]:
        source = engine.Control.start(f"{TINY},rate=5M")
        destination = engine.Control.start(TINY, incoming="tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(destination, max_bandwidth=1_000_000)
            await migration.cancel()
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            return failed.value.statistics.status, (await source.query_guest())["running"]

    assert asyncio.run(scenario()) == (engine.Status.CANCELLED, True)


def test_events_tell_the_story_of_a_migration_in_order() -> None:
    async def scenario() -> list[str]:
        story = []
        source = engine.Control.start(TINY)
        destination = engine.Control.start(TINY, incoming="tcp:127.0.0.1:0")
        async with source, destination:
            with source.listen() as events:
                await source.migrate(destination, max_bandwidth=0)
                async for event in events:
                    status = event.get("data", {}).get("status", "")
                    story.append(f"{event['event']} {status}".strip())
                    if status == "completed":
                        break
        return [line for line in story if line != "MIGRATION_PASS"]

    assert asyncio.run(scenario()) == [
        "MIGRATION setup",
        "MIGRATION active",
        "STOP",
        "MIGRATION device",
        "MIGRATION completed",
    ]


def test_before_a_migration_its_statistics_are_empty() -> None:
    assert engine.Statistics.of({}) == engine.Statistics(engine.Status.NONE)


def test_max_bandwidth_can_be_changed_while_it_runs() -> None:
    async def scenario() -> tuple[int, engine.Statistics]:
        source = engine.Control.start("workload:size=64M,contents=random")
        destination = engine.Control.start("workload:size=64M,contents=random", "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(destination, max_bandwidth=1_000_000)
            async for progress in migration.progress():
                if progress.transferred_bytes > 500_000:
                    slow = progress.remaining_bytes
                    break
            await source.execute("migrate-set-parameters", max_bandwidth=0)
            return slow, await migration.result()

    slow, result = asyncio.run(scenario())
    assert slow > 60_000_000  # the limit held: at 1 MB/s it would have taken a minute
    assert result.total_time_ms < 60_000
