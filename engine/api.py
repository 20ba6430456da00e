"""The library: control processes, migrations and statistics for scripts and notebooks.

Each `Control` is a `ramferry serve` process of its own, driven over QMP: what a script does is what
any QMP client can do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from qemu.qmp import ExecuteError, QMPClient, QMPError

from engine.control.status import ENDED, Status
from engine.errors import MigrationError, OutcomeUnknown, UsageError
from engine.guest.judgement import Verdict, verdict

START_WAIT_S: Final = 600.0  #: a large guest is filled first; its process has a tighter bound
ANSWER_WAIT_S: Final = 600.0  #: the slowest command reads all of RAM
END_WAIT_S: Final = 15.0
DRAIN_WAIT_S: Final = 1.0
POLL_S: Final = 0.05
STDERR_BYTES_MAX: Final = 64 * 1024


class MigrationFailed(MigrationError):
    """The migration ended as failed or cancelled; `statistics` has what is known."""

    def __init__(self, reason: str, statistics: Statistics) -> None:
        super().__init__(reason)
        self.statistics = statistics


@dataclass(frozen=True, slots=True)
class Statistics:
    """`query-migrate` with types; members that QEMU leaves out in a status are 0 or None.

    :ivar downtime_ms: real, None until completed.
    :ivar rounds: dirty bitmap syncs.
    :ivar phases_ns: where the downtime went.
    :ivar is_outcome_unknown: it failed in the handover; the guest may run at the destination, and
        stays stopped at the source.
    :ivar postcopy: empty until the guest runs at the destination without all its pages.
    :ivar raw: the answer as QMP gives it.
    """

    status: Status
    total_time_ms: int = 0
    setup_time_ms: int = 0
    expected_downtime_ms: int = 0
    downtime_ms: int | None = None
    rounds: int = 0
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    dirty_pages_per_s: int = 0
    throughput_bytes_per_s: float = 0.0
    throttle_percent: int = 0
    tracker: str = ""
    tracker_reason: str = ""
    placement: str = ""
    error: str | None = None
    is_outcome_unknown: bool = False
    phases_ns: Mapping[str, int] = field(default_factory=dict)
    channels: tuple[Mapping[str, int], ...] = ()
    compression: Mapping[str, Any] = field(default_factory=dict)
    postcopy: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Statistics:
        """From the answer to query-migrate."""
        ram = info.get("ram", {})
        return cls(
            status=Status(info.get("status", "none")),
            total_time_ms=info.get("total-time", 0),
            setup_time_ms=info.get("setup-time", 0),
            expected_downtime_ms=round(info.get("x-expected-downtime-ns", 0) / 1e6),
            downtime_ms=info.get("downtime"),
            rounds=ram.get("dirty-sync-count", 0),
            transferred_bytes=ram.get("transferred", 0),
            remaining_bytes=ram.get("remaining", 0),
            total_bytes=ram.get("total", 0),
            normal_pages=ram.get("normal", 0),
            zero_pages=ram.get("duplicate", 0),
            dirty_pages_per_s=ram.get("dirty-pages-rate", 0),
            throughput_bytes_per_s=ram.get("mbps", 0.0) * 1e6 / 8,
            throttle_percent=info.get("cpu-throttle-percentage", 0),
            tracker=info.get("x-tracker", ""),
            tracker_reason=info.get("x-tracker-reason", ""),
            placement=info.get("x-placement", ""),
            error=info.get("error-desc"),
            is_outcome_unknown=info.get("x-handover") == "unknown",
            phases_ns=info.get("x-downtime-phases", {}),
            channels=tuple(info.get("x-channels", ())),
            compression=info.get("x-compression", {}),
            postcopy=info.get("x-postcopy", {}),
            raw=dict(info),
        )


class Migration:
    """One migration that `Control.migrate` began."""

    def __init__(self, source: Control) -> None:
        self._source = source

    async def statistics(self) -> Statistics:
        """What is known now."""
        return Statistics.of(await self._source.execute("query-migrate"))

    async def progress(self, period_s: float = 0.1) -> AsyncIterator[Statistics]:
        """Statistics every `period_s` until the migration has ended; the last one is final."""
        while True:
            statistics = await self.statistics()
            yield statistics
            if statistics.status in ENDED:
                return
            await asyncio.sleep(period_s)

    async def result(self) -> Statistics:
        """Wait for the end.

        :raise MigrationFailed: failed or cancelled; the guest runs at the source as before.
        :raise OutcomeUnknown: failed in the handover; nobody here knows where the guest runs, and
            the source's stays stopped."""
        while (statistics := await self.statistics()).status not in ENDED:
            await asyncio.sleep(POLL_S)
        if statistics.is_outcome_unknown:
            raise OutcomeUnknown(
                "nobody here knows whether the destination took the guest; at the source it stays "
                f"stopped: {statistics.error}"
            )
        if statistics.status is not Status.COMPLETED:
            reason = statistics.error or f"the migration was {statistics.status.value}"
            raise MigrationFailed(reason, statistics)
        return statistics

    async def cancel(self) -> None:
        """Ask for the end; `result` then raises MigrationFailed.

        :raise UsageError: the guest runs at the destination and lacks pages."""
        await self._source.execute("migrate_cancel")

    async def start_postcopy(self) -> None:
        """Move the guest as soon as it can be, its missing pages after it. Both sides need the
        capability `postcopy-ram`.

        :raise UsageError: the capability is off."""
        await self._source.execute("migrate-start-postcopy")

    async def pause(self) -> None:
        """Break postcopy's connections off; the guest stands where it touches a missing page.

        :raise UsageError: it is not in postcopy."""
        await self._source.execute("migrate-pause")

    async def resume(self, destination: str | Control) -> None:
        """Go on with a paused postcopy at a destination that waits for it (`Control.recover`).

        :raise UsageError: it is not paused."""
        uri = await destination.address() if isinstance(destination, Control) else destination
        await self._source.execute("migrate", uri=uri, resume=True)


class Control:
    """A `ramferry serve` process; owns it and its private directory with the QMP socket.

    Use as `async with Control.start(...) as control`; at its end the process and its guest
    are gone, whatever happened inside.
    """

    def __init__(
        self,
        guest: str,
        incoming: str | None,
        settings: Iterable[str],
        uuid: str,
        state_dir: str | os.PathLike[str],
    ) -> None:
        self._guest, self._incoming, self._settings = guest, incoming, tuple(settings)
        self._uuid, self._state_dir = uuid, os.fspath(state_dir)
        self._directory = ""
        self._process: asyncio.subprocess.Process | None = None
        self._client = QMPClient("ramferry")
        self._stderr = bytearray()
        self._drain: asyncio.Task[None] | None = None
        self._guest_pidfd = -1  #: a guest outlives its control process when that one is killed

    @classmethod
    def start(
        cls,
        guest: str,
        incoming: str | None = None,
        settings: Iterable[str] = (),
        uuid: str = "",
        state_dir: str | os.PathLike[str] = "",
    ) -> Control:
        """Describe a control process; entering the context starts it.

        :param guest: a SPEC, like `workload:size=256M,rate=100M`.
        :param incoming: `tcp:HOST:0`, `unix:PATH` or `defer` for a destination.
        :param settings: `name=value` of migration parameters.
        :param uuid: the machine's, for `validate-uuid`; empty: it has none.
        :param state_dir: where it keeps a journal; started again there after it was killed, it
            takes its guest over. Empty: nowhere."""
        return cls(guest, incoming, settings, uuid, state_dir)

    async def __aenter__(self) -> Control:
        """:raise UsageError: the guest, URI or a setting is wrong.
        :raise MigrationError: the process did not start."""
        self._directory = tempfile.mkdtemp(prefix="ramferry-")
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _start(self) -> None:
        path = self.qmp_path
        command = ["serve", "--guest", self._guest, "--qmp", f"unix:{path}", "--set", "events=on"]
        command += ["--end-with", str(os.getpid())]
        if self._incoming is not None:
            command += ["--incoming", self._incoming]
        for setting in self._settings:
            command += ["--set", setting]
        if self._uuid:
            command += ["--uuid", self._uuid]
        if self._state_dir:
            command += ["--state-dir", self._state_dir]
        ours, theirs = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "engine.cli",
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=theirs,
                start_new_session=True,  # a Ctrl-C is the script's; `close` ends the process
            )
        finally:
            os.close(theirs)
            self._drain = asyncio.create_task(self._keep_stderr(ours))
        try:
            async with asyncio.timeout(START_WAIT_S):
                while not await self._connect(path):
                    if self._process.returncode is not None:
                        await self._end_drain()
                        raise self._start_error(self._process.returncode)
                    await asyncio.sleep(POLL_S / 5)
        except TimeoutError as exc:
            raise MigrationError(f"no monitor answered within {START_WAIT_S:.0f} s") from exc
        await self._hold_guest()

    async def _connect(self, path: str) -> bool:
        """Try to; a socket is there a moment before somebody listens on it."""
        if not Path(path).exists():
            return False
        client = QMPClient("ramferry")
        try:
            await client.connect(path)
        except QMPError:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await client.disconnect()
            return False
        self._client = client
        return True

    async def _hold_guest(self) -> None:
        """Remember the guest's process, so that `close` ends it even if control cannot any more."""
        pid = (await self.query_guest())["pid"]
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it died already; a query tells
                self._guest_pidfd = os.pidfd_open(pid)

    def _start_error(self, exit_code: int) -> MigrationError:
        lines = self.stderr.strip().splitlines()
        reason = lines[-1].removeprefix("ramferry: ") if lines else f"exit code {exit_code}"
        return UsageError(reason) if exit_code == 2 else MigrationError(reason)

    async def _keep_stderr(self, fd: int) -> None:
        """Take the pipe over, and read it until the last who holds the other end has ended."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
        )
        try:
            while data := await reader.read(4096):
                self._stderr += data
                del self._stderr[:-STDERR_BYTES_MAX]
        finally:
            transport.close()

    @property
    def qmp_path(self) -> str:
        """The QMP socket, for other clients; it is gone after the context."""
        return str(Path(self._directory) / "qmp")

    @property
    def stderr(self) -> str:
        """The end of what the process said to people."""
        return self._stderr.decode(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None, "start it first"
        return self._process.pid

    def kill(self) -> None:
        """kill -9 the process, for tests of what then happens; its guest may go on."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def wait(self) -> int:
        """Wait until the process has ended; return its exit code, negative for a signal."""
        assert self._process is not None, "start it first"
        return await self._process.wait()

    async def close(self) -> None:
        """End the process and its guest. Idempotent, never raises for what the process did."""
        is_quitting = False
        with contextlib.suppress(QMPError, TimeoutError):
            async with asyncio.timeout(END_WAIT_S):
                await self._client.execute("quit")
            is_quitting = True
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()
        if self._process is not None:
            await self._end_process(self._process, is_quitting)
        await self._end_guest()
        await self._end_drain()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    @staticmethod
    async def _end_process(process: asyncio.subprocess.Process, is_quitting: bool) -> None:
        for number in (None, signal.SIGTERM, signal.SIGKILL)[0 if is_quitting else 1 :]:
            if number is not None and process.returncode is None:
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_WAIT_S)
                return

    async def _end_guest(self) -> None:
        """End a guest that its control process left behind."""
        pidfd, self._guest_pidfd = self._guest_pidfd, -1
        if pidfd < 0:
            return
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
                if await _is_readable(pidfd, END_WAIT_S):
                    return
        finally:
            os.close(pidfd)

    async def _end_drain(self) -> None:
        """Stop to listen to the process; whoever else holds its stderr is not waited for."""
        if self._drain is not None:
            await asyncio.wait([self._drain], timeout=DRAIN_WAIT_S)
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)

    # -- what it can do --------------------------------------------------------------------------

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Any QMP command; `_` in argument names stands for `-`.

        :raise UsageError: the process refused, with its text.
        :raise MigrationError: the process is gone."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(ANSWER_WAIT_S):
                return await self._client.execute(command, named or None)
        except ExecuteError as exc:
            raise UsageError(str(exc)) from exc
        except TimeoutError as exc:
            raise MigrationError(f"no answer to {command} within {ANSWER_WAIT_S:.0f} s") from exc
        except QMPError as exc:
            raise MigrationError(f"the control process (pid {self.pid}) is gone") from exc

    async def give(self, name: str, fd: int) -> None:
        """Give the process a copy of a descriptor, for `migrate` and `migrate-incoming` with
        `fd:NAME`; `fd` stays the caller's.

        :raise UsageError: the process refused the name.
        :raise MigrationError: the process is gone."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as exc:
            raise MigrationError(f"the control process (pid {self.pid}) is gone") from exc
        await self.execute("getfd", fdname=name)

    @contextlib.contextmanager
    def listen(self) -> Iterator[AsyncIterator[dict[str, Any]]]:
        """QMP events from now on: STOP, RESUME, MIGRATION, MIGRATION_PASS.

        They wait until they are read; leave the block when no more are wanted."""
        with self._client.listener() as listener:
            yield (dict(event) async for event in listener)

    async def address(self) -> str:
        """The URI under which this destination can be reached."""
        info = await self.execute("query-migrate")
        if not info.get("socket-address"):
            raise UsageError("this process does not wait for a migration")
        socket = info["socket-address"][0]
        if socket["type"] == "unix":
            return f"unix:{socket['path']}"
        if socket["type"] == "vsock":
            return f"vsock:{socket['cid']}:{socket['port']}"
        host = f"[{socket['host']}]" if ":" in socket["host"] else socket["host"]
        return f"tcp:{host}:{socket['port']}"

    async def migrate(self, destination: str | Control, **parameters: Any) -> Migration:
        """Begin a migration to a URI or another `Control`.

        :param parameters: migration parameters, like `multifd_channels=4, max_bandwidth=0`.
        :raise UsageError: a parameter or the state does not allow it."""
        uri = await destination.address() if isinstance(destination, Control) else destination
        if parameters:
            await self.execute("migrate-set-parameters", **parameters)
        await self.execute("migrate", uri=uri)
        return Migration(self)

    async def recover(self, uri: str = "tcp:127.0.0.1:0") -> None:
        """Destination of a paused postcopy: wait for the source there.

        :raise UsageError: nothing is paused here, or it cannot listen there."""
        await self.execute("migrate-recover", uri=uri)

    async def query_guest(self) -> dict[str, Any]:
        """Kind, process, whether it runs, page writes so far, tracker, RAM blocks."""
        answer: dict[str, Any] = await self.execute("x-query-guest")
        return answer

    async def judge(self) -> dict[str, Any]:
        """Judge every page of a workload guest by itself."""
        answer: dict[str, Any] = await self.execute("x-judge")
        return answer


async def _is_readable(fd: int, wait_s: float) -> bool:
    """Wait until it is; a pidfd is when its process has ended."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), wait_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
    return True


async def verify(source: Control, destination: Control) -> Verdict:
    """Check every page of a migrated workload guest on both sides.

    Each page is judged by itself (index, checksum); no page may be older at the destination than at
    the source; and the destination's pages must show exactly as many writes as its vCPUs made.

    :raise GuestError: the two sides have different guests."""
    before, after = await asyncio.gather(source.judge(), destination.judge())
    return verdict(
        Path(before["counters-path"]),
        Path(after["counters-path"]),
        after["page-writes"],
        after["vcpu-writes"],
    )
