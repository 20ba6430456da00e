"""`ramferry monitor`: single commands, lines from a pipe, and a person at a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil
import pytest

from engine.errors import MigrationError, UsageError
from engine.monitor.connection import Connection, parse_address
from engine.monitor.history import BYTES_MAX, LINES_MAX, HistoryFile, history_path
from engine.monitor.run import Conversation
from tests.support import eventually

pytestmark = pytest.mark.process

WAIT_S: Final = 60.0
PROMPT: Final = "(ramferry)"  #: the space behind it may be a movement of the cursor
READY: Final = "<ready>"  #: for what prompt_toolkit writes when it has begun to read keys
GUEST: Final = "ram:size=1M"
ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


@contextlib.contextmanager
def serve(path: Path, *more: str, guest: str = GUEST) -> Iterator[subprocess.Popen[bytes]]:
    """A control process with a human monitor at `path`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.cli", "serve", "--guest", guest, "--hmp", f"unix:{path}",
         *more],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert eventually(lambda: somebody_listens(path) or process.poll() is not None)
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_S)


def somebody_listens(path: Path) -> bool:
    """The file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def monitor(
    *arguments: str | Path, stdin: str = "", without: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the client; `without` is a package that cannot be imported there."""
    return subprocess.run(
        [*client_command(without), *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip


def client_command(without: str = "") -> list[str]:
    if not without:
        return [sys.executable, "-m", "engine.cli", "monitor"]
    script = f"import sys; sys.modules[{without!r}] = None; from engine.cli import main; main()"
    return [sys.executable, "-c", script, "monitor"]


@contextlib.contextmanager
def for_ever(directory: Path) -> Iterator[tuple[Path, str]]:
    """A monitor, and where to migrate to: it goes on until it is cancelled, for the guest writes
    faster than may be sent."""
    path, there, guest = directory / "hmp", directory / "there", "workload:size=16M"
    with (
        serve(path, guest=f"{guest},rate=1M"),
        serve(there, "--incoming", "tcp:127.0.0.1:0", guest=guest),
    ):
        uri = re.search(r"tcp:127\.0\.0\.1:\d+", monitor(there, "-c", "info migrate").stdout)
        assert uri
        slow = "migrate_set_parameter max-bandwidth 100K"
        assert monitor(path, "-c", slow).returncode == 0
        yield path, uri[0]


# -- single commands -----------------------------------------------------------------------------


def test_one_command_prints_its_answer_and_says_how_it_went(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with serve(path) as server:
        good = monitor(path, "-c", "info status", "-c", "info version")
        assert (good.returncode, good.stderr) == (0, "")
        assert re.fullmatch(r"VM status: running\n10\.0\.2\S+\n", good.stdout)

        wrong = monitor(f"unix:{path}", "-c", "nope", "-c", "info status")
        assert (wrong.returncode, wrong.stderr) == (1, "")
        assert wrong.stdout == "unknown command: 'nope'\n"

        refused = monitor(path, "-c", "migrate -r tcp:127.0.0.1:1")
        assert (refused.returncode, refused.stdout) == (
            1, "Error: Cannot resume if there is no paused migration\n",
        )  # fmt: skip

        long = monitor(path, "-c", "x" * 5000)
        assert (long.returncode, long.stdout) == (1, "Error: a line may have 4095 bytes\n")

        downtime = monitor(
            path, "-c", "migrate_set_downtime 0.5", "-c", "migrate_set_downtime 2001"
        )
        assert (downtime.returncode, downtime.stdout) == (
            1, "Error: Parameter 'downtime_limit' expects an integer in the range of "
            "0 to 2000 seconds\n",
        )  # fmt: skip
        assert "downtime-limit: 500 ms\n" in monitor(path, "-c", "info migrate_parameters").stdout

        two_lines = monitor(path, "-c", "stop\ncont")
        assert (two_lines.returncode, two_lines.stdout) == (2, "")
        assert two_lines.stderr == "ramferry: a command is one line\n"

        nothing = monitor(path, "-c", "  ")
        assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")

        end = monitor(path, "-c", "quit")
        assert (end.returncode, end.stdout, end.stderr) == (0, "", "")
        assert server.wait(WAIT_S) == 0


def test_only_migratable_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with serve(path, "--only-migratable"):
        assert "only-migratable: on\n" in monitor(path, "-c", "info migrate").stdout


def test_a_command_never_waits_for_a_migration(tmp_path: Path) -> None:
    with for_ever(tmp_path) as (path, uri):
        done = monitor(path, "-c", f"migrate {uri}")
        assert done.stdout == (
            "terminal does not allow synchronous migration, continuing detached\n"
        )
        assert done.returncode == 0
        now = monitor(path, "-c", "info migrate").stdout
        assert re.search("Migration status: (setup|active)", now)
        assert monitor(path, "-c", "migrate_cancel").returncode == 0


def test_over_tcp(tmp_path: Path) -> None:
    path, ports = tmp_path / "hmp", set[int]()
    with serve(path, "--hmp", "tcp:127.0.0.1:0") as server:

        def has_port() -> bool:
            found = psutil.Process(server.pid).net_connections("tcp4")
            ports.update(one.laddr.port for one in found if one.status == psutil.CONN_LISTEN)
            return bool(ports)

        assert eventually(has_port)
        (port,) = ports
        assert monitor(f"tcp:127.0.0.1:{port}", "-c", "info status").returncode == 0


def test_lines_from_a_pipe_wait_for_a_migration(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with serve(path):
        done = monitor(path, stdin="migrate tcp:127.0.0.1:1\ninfo status\r\n\nnope")
        assert done.stdout == (
            "Error: Failed to connect to '127.0.0.1:1': Connection refused\n"
            "VM status: running\nunknown command: 'nope'\n"
        )
        assert (done.returncode, done.stderr) == (0, "")
        done = monitor(path, stdin="quit\ninfo status\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- what the world does -------------------------------------------------------------------------


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


@contextlib.contextmanager
def saying(path: Path, *pieces: bytes, close: bool = True) -> Iterator[None]:
    """Something else that listens: says the first piece, and another after each line it gets."""

    def talk() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(pieces[0])
            for piece in pieces[1:]:
                connection.recv(65536)
                connection.sendall(piece)
            if not close:
                connection.recv(65536)

    listener = listen(path)
    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        listener.close()
        thread.join(WAIT_S)
        path.unlink()


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nothing", "there is no socket at"),
        ("file", "it is not a socket"),
        ("dead", "nobody listens there"),
        ("tcp:127.0.0.1", "tcp:HOST:PORT"),
        ("tcp:127.0.0.1:1", "nobody listens there"),
        ("", "is empty or too long"),
        ("x" * 200, "is empty or too long"),
        ("tcp:no-such-host.invalid:1", "cannot connect to"),
    ],
)
def test_nobody_to_talk_to_is_one_line(tmp_path: Path, where: str, says: str) -> None:
    (tmp_path / "file").write_text("")
    listen(tmp_path / "dead").close()
    is_path = where in ("nothing", "file", "dead")
    for more in (["-c", "info status"], []):
        done = monitor(tmp_path / where if is_path else where, *more)
        assert done.returncode == 2, done
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    (tmp_path / "dead").unlink()


def test_a_socket_that_may_not_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UsageError, match=r"cannot connect to '.*': Permission denied"):
        Connection(parse_address(str(tmp_path / "hmp")))


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        (b'{"QMP": {"version": {}}}\r\n', "it speaks QMP; the socket of --hmp is wanted"),
        (b"220 mail\r\n", "is no human monitor of ramferry"),
        (b"", "is no human monitor of ramferry"),
        (b"Error: 16 clients are connected\r\n", "Error: 16 clients are connected"),
        (b"QEMU 10.0.2 monitor\r\n(ramferry) ", "is no human monitor of ramferry"),
        (b"QEMU 10.0.2 monitor\r\n(qemu) ", "it is QEMU's own; the socket of --hmp is wanted"),
        (b"x" * 1_100_000, "has no end"),
    ],
)
def test_who_is_no_human_monitor_is_told_apart(tmp_path: Path, greeting: bytes, says: str) -> None:
    path = tmp_path / "other"
    with saying(path, greeting):
        done = monitor(path, "-c", "info status")
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_who_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.monitor.connection.CONNECT_WAIT_S", 0.05)
    path = tmp_path / "other"
    with (
        saying(path, b"", close=False),
        pytest.raises(UsageError, match="did not answer within"),
    ):
        Connection(parse_address(str(path)))


BANNER: Final = b"ramferry 1 monitor\r\n(ramferry) "


@pytest.mark.parametrize("more", [["-c", "info status"], []])
@pytest.mark.parametrize(
    ("answer", "says"), [(b"", "the monitor"), (b"ok\r\nVM sta", "the monitor")]
)
def test_a_server_that_goes_away_in_the_middle_is_one_line(
    tmp_path: Path, more: Sequence[str], answer: bytes, says: str
) -> None:
    path = tmp_path / "hmp"
    with saying(path, BANNER, answer):
        done = monitor(path, *more, stdin="info status\n")
    assert done.returncode == 1, done
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_killed_server_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with serve(path) as server:
        connection = Connection(parse_address(str(path)))
        try:
            server.kill()
            server.wait(WAIT_S)
            with pytest.raises(MigrationError, match="the monitor is gone"):
                connection.ask("info status")
        finally:
            connection.close()
    path.unlink()


def test_escape_codes_in_an_answer_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with saying(path, BANNER, b"ok\r\nx: '\x1b[2J'\r\n(ramferry) "):
        done = monitor(path, "-c", "info migrate_parameters")
    assert (done.returncode, done.stdout) == (0, "x: '\\x1b[2J'\n")


# -- a terminal ----------------------------------------------------------------------------------


class Terminal:
    """A client at a pseudo-terminal, and what it has shown so far."""

    def __init__(self, path: Path, state: Path, without: str = "") -> None:
        self.master, slave = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            [*client_command(without), str(path)],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self.master, False)
        self.shown = ""
        self._ready = PROMPT if without else READY
        self._position = 0

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C while the client reads nothing: the terminal sends a signal."""
        self.process.send_signal(signal.SIGINT)

    def wait_for_prompt(self) -> None:
        """Wait until the client reads keys: before that Ctrl-D and Ctrl-C mean something else."""
        self.wait_for(self._ready)

    def wait_for(self, text: str) -> str:
        """What was shown from where the last wait ended until `text`."""
        assert eventually(lambda: text in self._read()[self._position :], WAIT_S), self.shown
        begin = self._position
        self._position = self.shown.index(text, begin) + len(text)
        return self.shown[begin : self._position]

    def _read(self) -> str:
        with contextlib.suppress(BlockingIOError, OSError):  # EIO: the client is gone
            data = os.read(self.master, 65536).decode(errors="replace")
            if "\x1b[6n" in data:  # "where is the cursor?"
                os.write(self.master, b"\x1b[1;1R")
            self.shown += ESCAPES.sub("", data.replace("\x1b[?2004h", READY))
        return self.shown

    def end(self) -> int:
        deadline = time.monotonic() + WAIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read()  # a terminal that nobody reads would block it
            time.sleep(0.005)
        assert self.process.returncode is not None, self.shown
        return self.process.returncode


@contextlib.contextmanager
def terminal(path: Path, state: Path, without: str = "") -> Iterator[Terminal]:
    one = Terminal(path, state, without)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


def test_a_person_completes_and_the_lines_are_remembered(tmp_path: Path) -> None:
    path, state = tmp_path / "hmp", tmp_path / "state"
    with serve(path):
        with terminal(path, state) as one:
            one.wait_for_prompt()
            one.type("info st\t")
            one.wait_for("atus")
            one.type("\r")
            one.wait_for("VM status: running")
            one.wait_for_prompt()
            one.type("migrate_set_parameter x-tr\t")
            one.wait_for("acker")
            one.type(" content\t")
            one.wait_for("-hash")
            one.type("\r")
            one.wait_for_prompt()
            one.type("\x03")  # not this line
            one.wait_for_prompt()
            one.type("\x04")
            assert one.end() == 0
        kept = state / "ramferry" / "monitor-history"
        assert kept.read_text().splitlines() == [
            "info status", "migrate_set_parameter x-tracker content-hash",
        ]  # fmt: skip
        assert kept.stat().st_mode & 0o777 == 0o600
        tracker = monitor(path, "-c", "info migrate_parameters").stdout
        assert "x-tracker: content-hash\n" in tracker
        with terminal(path, state) as one:
            one.wait_for_prompt()
            one.type("\x1b[A\x1b[A\r")
            one.wait_for("VM status: running")
            one.wait_for_prompt()
            one.type("quit\r")
            assert one.end() == 0


@pytest.mark.parametrize("without", ["", "prompt_toolkit"])
def test_ctrl_c_leaves_a_migration_alone_and_says_so(tmp_path: Path, without: str) -> None:
    with for_ever(tmp_path) as (path, uri):
        with terminal(path, tmp_path / "state", without) as one:
            if without:
                one.wait_for("pip install 'ramferry[monitor]'")
            one.wait_for_prompt()
            one.type(f"migrate {uri}\r")
            status = "Migration status: active"
            assert eventually(lambda: status in monitor(path, "-c", "info migrate").stdout, WAIT_S)
            one.interrupt()
            one.wait_for("detached: the migration goes on; 'info migrate' shows it")
            one.wait_for_prompt()
            one.type("info migrate\r")
            one.wait_for(status)
            one.wait_for_prompt()
            one.type("migrate_cancel\r")
            one.wait_for_prompt()
            one.type("\x04")
            assert one.end() == 0
        assert eventually(lambda: "cancelled" in monitor(path, "-c", "info migrate").stdout, WAIT_S)


def test_a_server_that_ends_while_a_person_thinks(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with serve(path) as server, terminal(path, tmp_path / "state") as one:
        one.wait_for_prompt()
        server.terminate()
        server.wait(WAIT_S)
        one.type("info st\t\r")
        one.wait_for("ramferry: ")
        assert one.end() == 1
        assert "Traceback" not in one.shown


def test_only_candidates_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.monitor.run.COMPLETE_WAIT_S", WAIT_S)
    path = tmp_path / "hmp"
    with serve(path):
        conversation = Conversation(parse_address(str(path)), is_terminal=False)
        try:
            assert conversation.complete("info st") == ["status"]
            assert conversation.complete("x" * 4090) == []
            assert conversation.complete("info ver") == ["version"]
        finally:
            conversation.close()


# -- history -------------------------------------------------------------------------------------


def test_a_history_that_cannot_be_used_is_empty(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for path in (None, blocked / "below", tmp_path):
        history = HistoryFile(path)
        history.append("stop")
        assert history.load() == []


def test_a_history_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "history"
    line = "x" * (BYTES_MAX // LINES_MAX)
    path.write_text("".join(f"{line}{number}\n" for number in range(2 * LINES_MAX)))
    lines = HistoryFile(path).load()
    assert lines == [f"{line}{number}" for number in range(LINES_MAX, 2 * LINES_MAX)]
    assert len(path.read_text().splitlines()) == LINES_MAX


def test_where_the_history_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "ramferry" / "monitor-history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local/state/ramferry/monitor-history"
