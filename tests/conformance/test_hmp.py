"""The human monitor beside QEMU's: the same lines, the same text, or a difference that is told."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from engine.control.parameters import PARAMETERS
from tests.conformance.compare import Difference, compare
from tests.conformance.peers import WAIT_S, Client, Peer, peer, settled_status
from tests.support import eventually

pytestmark = pytest.mark.guest

PROMPTS: Final = {"qemu": b"(qemu) ", "ramferry": b"(ramferry) "}


def human(line: str) -> dict[str, object]:
    """The line as a request of QMP."""
    return {"execute": "human-monitor-command", "arguments": {"command-line": line}}


DIFFERENCES: Final = (
    Difference(
        r'unterminated|\\\\q|migrate -"', "return",
        "The reason why a string in quotes is wrong is a line of the answer; QEMU prints it on its "
        "own stdout. A lone `-` does not cut the message.",
        shown_by=[human(line) for line in (
            'migrate -d "tcp:unterminated', 'migrate -d "tcp:127\\q"', 'migrate -"')],
    ),
    Difference(
        "info version", "return",
        "`info version` names ramferry as the package.",
        shown_by=[human("info version")],
    ),
    Difference(
        "help info migrate|info migrate -a|help info$", "return",
        "`info migrate -a` also prints what ramferry adds to `query-migrate`; QEMU 10.0 has no "
        "`-a`.",
        shown_by=[human(line) for line in (
            "help info migrate", "info migrate -a", "help info")],
    ),
    Difference(
        "migrate_set_(speed|downtime|cache_size)|migrate_cache_size", "return",
        "`migrate_set_speed`, `migrate_set_downtime`, `migrate_set_cache_size` and `info "
        "migrate_cache_size` work as they did until QEMU 6.0.",
        shown_by=[human(line) for line in (
            "migrate_set_speed 1", "migrate_set_downtime 1", "migrate_set_cache_size 4096",
            "info migrate_cache_size")],
    ),
    Difference(
        r"\({33}", "return",
        "An expression has at most 32 brackets and signs inside each other.",
        shown_by=[human("calc_dirty_rate " + "(" * 33)],
    ),
)  # fmt: skip

REFUSED_LINES: Final = (
    "", "   ", "nope", " nope x", "nope/x", "mi", "info nope", "info mig", "info help", "info /x",
    "/x", 'info "migrate"', '"info" migrate', "#foo",
    "help nope", "help info nope", "help -d", "help stop|s", "help a b c",
    "info migrate x", "info status x", "quit x", "stop x", "cont x", "migrate_pause x",
    "migrate", "migrate -x tcp:127.0.0.1:1", "migrate -d", "migrate -", "migrate -- foo",
    "migrate -d tcp:127.0.0.1:1 x", "migrate -dr foo:bar", "migrate -r -d foo:bar",
    'migrate -d "tcp:unterminated', 'migrate -d "tcp:127\\q"', 'migrate -d "a b" c',
    "migrate -d foo:bar", "migrate -d-r foo:bar", "migrate -d -r foo:bar", "migrate foo:bar",
    'migrate -d "foo:\\"bar\\""', "migrate -dfoo:bar", "migrate/foo:bar",
    "migrate -r tcp:127.0.0.1:1",
    "migrate_cancel", "migrate_cancel x",
    "migrate_continue", "migrate_continue nope", "migrate_continue a b",
    "migrate_incoming", "migrate_incoming tcp:127.0.0.1:0", 'migrate_incoming "a b" c',
    "migrate_set_capability", "migrate_set_capability foo", "migrate_set_capability foo on",
    "migrate_set_capability events x", "migrate_set_capability events",
    "migrate_set_capability events off x", "migrate_set_capability compress on",
    "migrate_set_parameter", "migrate_set_parameter foo", "migrate_set_parameter foo 1",
    "migrate_set_parameter max-bandwidth", "migrate_set_parameter max-bandwidth x",
    "migrate_set_parameter max-bandwidth -1", "migrate_set_parameter downtime-limit x",
    "migrate_set_parameter downtime-limit 9999999", "migrate_set_parameter multifd-channels 300",
    "migrate_set_parameter multifd-channels 0", "migrate_set_parameter mode nope",
    "migrate_set_parameter direct-io foo", "migrate_set_parameter multifd-compression foo",
    "migrate_set_parameter block-bitmap-mapping foo",
    "migrate_set_parameter xbzrle-cache-size 3", "migrate_set_parameter tls-creds a b",
    "migrate_set_parameter max_bandwidth 5", "migrate_set_parameter tls-creds",
    "calc_dirty_rate", "calc_dirty_rate x", "calc_dirty_rate 0", "calc_dirty_rate -r -b 1",
    "calc_dirty_rate -b -r 1", "calc_dirty_rate 1 512 4", "calc_dirty_rate -1",
    "calc_dirty_rate (1+1", "calc_dirty_rate 1/0", "calc_dirty_rate 1%0", "calc_dirty_rate 0x3c+",
    "calc_dirty_rate $rip", "calc_dirty_rate 'a", "calc_dirty_rate '",
    "calc_dirty_rate 99999999999999999999", "calc_dirty_rate 08", "calc_dirty_rate 1-1",
    "calc_dirty_rate 2&1+0", "calc_dirty_rate ~0+1", "calc_dirty_rate 7/8", "calc_dirty_rate 0x",
    "calc_dirty_rate " + "(" * 31, "calc_dirty_rate " + "(" * 33,
    "set_vcpu_dirty_limit", "set_vcpu_dirty_limit x", "cancel_vcpu_dirty_limit x",
    "announce_self eth0 id x", "client_migrate_info", "client_migrate_info spice host x",
    "client_migrate_info spice host 0x100000000", "x_colo_lost_heartbeat x",
    "savevm x y", "loadvm", "delvm",
)  # fmt: skip

HELPED: Final = (
    "announce_self", "calc_dirty_rate", "cancel_vcpu_dirty_limit", "client_migrate_info", "cont",
    "c", "delvm", "help", "?", "info dirty_rate", "info migrate_capabilities x",
    "info migrate_parameters", "info status", "info vcpu_dirty_limit", "info version", "loadvm",
    "migrate", "migrate foo", "migrate_cancel", "migrate_continue", "migrate_incoming",
    "migrate_pause", "migrate_recover", "migrate_set_capability", "migrate_set_parameter",
    "migrate_start_postcopy", "q", "quit", "s", "savevm", "set_vcpu_dirty_limit",
    "x_colo_lost_heartbeat",
)  # fmt: skip

#: Lines by the command of QMP that does the work.
BY_COMMAND: Final = {
    "migrate-recover": ("migrate_recover tcp:1",),
    "migrate-pause": ("migrate_pause",),
    "migrate-continue": ("migrate_continue pre-switchover", "migrate_continue completed"),
    "migrate-start-postcopy": ("migrate_start_postcopy",),
    "x-colo-lost-heartbeat": ("x_colo_lost_heartbeat",),
    "announce-self": ("announce_self", "announce_self eth0,eth1 id"),
    "client_migrate_info": (
        "client_migrate_info spice host", "client_migrate_info spice host 1 2 subj",
        "client_migrate_info vnc host",
    ),
    "calc-dirty-rate": ("calc_dirty_rate 100", "calc_dirty_rate -r 1", "calc_dirty_rate 1 1"),
    "query-dirty-rate": ("info dirty_rate",),
    "set-vcpu-dirty-limit": ("set_vcpu_dirty_limit 1", "set_vcpu_dirty_limit 1 5"),
    "cancel-vcpu-dirty-limit": ("cancel_vcpu_dirty_limit", "cancel_vcpu_dirty_limit 5"),
    "snapshot-save": ("savevm", "savevm x"),
    "snapshot-load": ("loadvm x",),
    "snapshot-delete": ("delvm x",),
    "query-vcpu-dirty-limit": ("info vcpu_dirty_limit",),
}  # fmt: skip


def said(client: Client, line: str) -> str:
    answer = client.ask(human(line))
    assert isinstance(answer["return"], str), answer
    return str(answer["return"])


def test_lines_that_are_refused_have_qemus_text(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare(map(human, REFUSED_LINES), qemu.client, ours.client, DIFFERENCES)


def test_help_is_qemus(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    lines = [f"{word} {name}" for name in HELPED for word in ("help", "?")]
    compare(map(human, lines), qemu.client, ours.client)


def test_help_lists_only_what_qemu_has_and_what_is_documented(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    for line, alike, added in (
        ("help", "?", {"x_complete [line]", "x_once line", "migrate_set_speed value",
                       "migrate_set_downtime value", "migrate_set_cache_size value"}),
        ("info", "help info", {"info migrate_cache_size", "info migrate [-a]"}),
    ):  # fmt: skip
        theirs = said(qemu.client, line).splitlines()
        own = said(ours.client, line).splitlines()
        assert said(ours.client, alike).splitlines() == own
        assert {text.partition(" --")[0].strip() for text in own if text not in theirs} == added
        assert [text for text in theirs if text in own] == [text for text in own if text in theirs]


@pytest.mark.parametrize("command", BY_COMMAND)
def test_a_line_answers_as_qemus_does(command: str, peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    names = {entry["name"] for entry in ours.client.execute("query-commands")["return"]}
    assert command in names
    compare(map(human, BY_COMMAND[command]), qemu.client, ours.client, DIFFERENCES)


def test_a_fresh_process_shows_the_same(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    lines = ("info migrate", "info  migrate", "info migrate_capabilities", "info version")
    compare(map(human, lines), qemu.client, ours.client, DIFFERENCES)
    assert parameters(ours.client) == parameters(qemu.client)


def parameters(client: Client) -> list[str]:
    """The lines of `info migrate_parameters`, without those of parameters that QEMU has not."""
    added = {one.name for one in PARAMETERS if one.is_ours or one.is_hidden}
    lines = said(client, "info migrate_parameters").split("\r\n")
    return [line for line in lines if line.partition(":")[0] not in added]


def test_parameters_and_capabilities_are_set_and_shown_alike(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    lines = [
        "migrate_set_parameter max-bandwidth 1", "migrate_set_parameter downtime-limit 0x10",
        "migrate_set_parameter avail-switchover-bandwidth 5", "migrate_set_parameter mode normal",
        "migrate_set_parameter max-postcopy-bandwidth 5", "migrate_set_parameter direct-io yes",
        'migrate_set_parameter tls-creds "foo bar"', "migrate_set_parameter announce-initial 5",
        "migrate_set_parameter vcpu-dirty-limit 5", "migrate_set_parameter xbzrle-cache-size 1M",
        "migrate_set_parameter x-checkpoint-delay 5", "migrate_set_parameter multifd-channels 3",
        "migrate_set_parameter zero-page-detection legacy",
        "migrate_set_parameter cpu-throttle-tailslow on",
        "migrate_set_capability events on", "migrate_set_capability auto-converge on",
        "migrate_set_capability events off", "info migrate_capabilities",
    ]  # fmt: skip
    compare(map(human, lines), qemu.client, ours.client)
    assert parameters(ours.client) == parameters(qemu.client)
    larger = "migrate_set_parameter max-bandwidth 1.5G"
    compare([human(larger)], qemu.client, ours.client)
    assert parameters(ours.client) == parameters(qemu.client)
    assert "max-bandwidth: 1610612736 bytes/second" in parameters(ours.client)


def test_stop_and_cont_and_status(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    lines = ["cont", "c", "info status", "stop", "s", "info status"]
    compare(map(human, lines), qemu.client, ours.client)


def test_after_a_failed_migration(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare([human("migrate tcp:127.0.0.1:1")], qemu.client, ours.client)
    for one in (qemu, ours):
        wait_status(one.client, "failed")
    lines = ("info migrate", "migrate_cancel", "info migrate")
    compare(map(human, lines), qemu.client, ours.client)


def test_a_destination_before_and_after_migrate_incoming(
    destinations: tuple[Peer, Peer],
) -> None:
    qemu, ours = destinations
    lines = ("info status", "info migrate", "migrate -d tcp:127.0.0.1:1", "migrate_incoming foo:x")
    compare(map(human, lines), qemu.client, ours.client)
    compare([human("migrate_incoming tcp:127.0.0.1:0")], qemu.client, ours.client)
    assert masked(said(ours.client, "info migrate")) == masked(said(qemu.client, "info migrate"))
    compare([human("migrate_incoming tcp:127.0.0.1:0")], qemu.client, ours.client)


def masked(text: str) -> list[str]:
    """Lines with N for every number."""
    return [re.sub(r"\d+(\.\d+)?", "N", line) for line in text.split("\r\n")]


def test_both_sides_of_a_completed_migration(
    peers: tuple[Peer, Peer], destinations: tuple[Peer, Peer]
) -> None:
    seen = []
    for source, destination in zip(peers, destinations, strict=True):
        source.client.execute("stop")
        assert said(destination.client, "migrate_incoming tcp:127.0.0.1:0") == ""
        listening = said(destination.client, "info migrate")
        address = re.search(r"\t(tcp:\S+)", listening)
        assert address, listening
        assert said(source.client, f"migrate -d {address[1]}") == ""
        for one in (source, destination):
            wait_status(one.client, "completed")
            settled_status(one.client)
        seen.append([masked(said(one.client, "info migrate")) for one in (source, destination)])
        seen[-1].append([said(one.client, "info status") for one in (source, destination)])
    theirs, own = seen
    assert own[0] == theirs[0]
    assert own[1] == theirs[1]
    assert own[2][0] == theirs[2][0] == "VM status: paused (postmigrate)\r\n"


def wait_status(client: Client, status: str) -> None:
    last: dict[str, Any] = {}

    def is_there() -> bool:
        last.update(client.execute("query-migrate")["return"])
        return last.get("status") == status

    assert eventually(is_there), last


# -- the socket --------------------------------------------------------------------------------


class Human:
    """A client of a human monitor's socket."""

    def __init__(self, path: Path, prompt: bytes) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S)
        assert eventually(path.exists)
        self.socket.connect(str(path))
        self._prompt = prompt
        self.banner = self.until_prompt()

    def until_prompt(self) -> bytes:
        """What comes before the next prompt, without what QEMU echoes."""
        data = b""
        while data != self._prompt and not data.endswith(b"\n" + self._prompt):
            more = self.socket.recv(65536)
            assert more, data
            data += more
        return self.without_echo(data[: -len(self._prompt)])

    def without_echo(self, data: bytes) -> bytes:
        """QEMU's line editor repeats every character with escape codes; ramferry's has none."""
        if b"\x1b[K" in data:
            return data.rpartition(b"\x1b[K")[2].partition(b"\r\n")[2]
        return data

    def ask(self, line: bytes) -> bytes:
        self.socket.sendall(line + b"\n")
        return self.until_prompt()


@contextlib.contextmanager
def human_peers(directory: Path) -> Iterator[tuple[tuple[Peer, Human], tuple[Peer, Human]]]:
    """Both with their human monitors' sockets."""
    qemu_path, our_path = directory / "q", directory / "r"
    with (
        peer("qemu", "-monitor", f"unix:{qemu_path},server=on,wait=off") as qemu,
        peer("ramferry", "--hmp", f"unix:{our_path}") as ours,
        contextlib.ExitStack() as stack,
    ):
        pair = []
        for one, path in ((qemu, qemu_path), (ours, our_path)):
            client = Human(path, PROMPTS[one.name])
            stack.callback(client.socket.close)
            pair.append((one, client))
        yield pair[0], pair[1]


def test_banner_and_answers_on_a_socket(tmp_path: Path) -> None:
    with human_peers(tmp_path) as ((_, qemu), (_, ours)):
        end = b" monitor - type 'help' for more information\r\n"
        assert qemu.banner.startswith(b"QEMU ")
        assert qemu.banner.endswith(end)
        assert ours.banner.startswith(b"ramferry ")
        assert ours.banner.endswith(end)
        for line in (b"nope", b"help migrate", b"info migrate", b"migrate -x", b"stop"):
            assert ours.ask(line) == qemu.ask(line)


def test_a_client_that_waits_for_its_migration_has_no_prompt_until_it_ends(
    tmp_path: Path,
) -> None:
    with socket.socket() as silent, human_peers(tmp_path) as both:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"tcp:127.0.0.1:{silent.getsockname()[1]}"
        answers: list[Sequence[bytes]] = []
        for one, client in both:
            one.client.execute("migrate-set-parameters", **{"max-bandwidth": 4096})
            client.socket.sendall(f"migrate {uri}\nhelp migrate_cancel\n".encode())
            assert eventually(lambda: "status" in one.client.execute("query-migrate")["return"])  # noqa: B023
            one.client.execute("query-status")  # whoever answers this has read what came before
            client.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                early = client.socket.recv(65536)
                assert PROMPTS[one.name] not in early
                assert b"cancel the current" not in early
            client.socket.settimeout(WAIT_S)
            one.client.execute("migrate_cancel")
            wait_status(one.client, "cancelled")
            first = client.until_prompt()
            answers.append((first, client.ask(b"info status")))
        assert b"cancel the current VM migration\r\n" in answers[1][0] + answers[1][1]
