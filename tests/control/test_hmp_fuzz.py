"""Thousands of byte streams that no sane client sends, into a real socket of the human monitor."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from engine.control import hmp
from engine.control.hmp.console import OUTPUT_CHARACTERS_MAX
from engine.control.hmp.server import PROMPT
from engine.control.process import ControlProcess
from engine.control.qmp.commands import build_registry
from engine.control.uri import Address
from engine.guest.spec import open_guest, parse_guest_spec

pytestmark = pytest.mark.process

STREAMS: Final = 5500
SEED: Final = 20250419
CLIENTS: Final = 8
ANSWER_WAIT_S: Final = 20.0
GROWTH_BYTES_MAX: Final = 32 * 1024 * 1024
LARGEST_STREAM: Final = 20_000

#: Nothing here reaches another host or leaves a file: what the mutations make of it neither.
LINES: Final = (
    b"help", b"?", b"help migrate", b"help info migrate", b"info", b"info migrate",
    b"info migrate -a", b"info migrate_capabilities", b"info migrate_parameters",
    b"info migrate_cache_size", b"info status", b"info version", b"info dirty_rate",
    b"info vcpu_dirty_limit", b"stop", b"cont", b"c", b"s",
    b"migrate -d unix:/nonexistent/x", b"migrate unix:/nonexistent/y", b"migrate_cancel",
    b'migrate -d -r "unix:/nonexistent/a b"', b"migrate_continue pre-switchover",
    b"migrate_pause", b"migrate_start_postcopy", b"x_colo_lost_heartbeat",
    b"migrate_set_capability events on", b"migrate_set_capability auto-converge off",
    b"migrate_set_parameter max-bandwidth 100M", b"migrate_set_parameter downtime-limit 0x10",
    b'migrate_set_parameter tls-creds "a \\"b\\" c"', b"migrate_set_parameter direct-io off",
    b"migrate_set_speed 100", b"migrate_set_downtime 30ms", b"migrate_set_cache_size 64M",
    b"calc_dirty_rate -b 0", b"calc_dirty_rate ((1+2)*3)/0", b"calc_dirty_rate '", b"nope",
    b"set_vcpu_dirty_limit 10 0", b"cancel_vcpu_dirty_limit", b"announce_self eth0 id",
    b"client_migrate_info spice host 1 2 subject", b"x_complete migrate_set_parameter mode ",
    b"x_once info status", b"x_once x_once x_once", b"quit",
)  # fmt: skip
ENDS: Final = (b"\n", b"\r\n", b"\r\0", b"\r", b"\n\n", b"\0\n", b"")
PIECES: Final = (
    b"\xff\xfb\x01", b"\xff\xfa\x18\x00xterm\xff\xf0", b"\xff\xfa", b"\xff", b"\xff\xff",
    b"\xff\xf4", b"\x03", b"\x08" * 9, b"\x7f", b"\0", b"\x1b[A", b"\xc3\x28", b"\xed\xa0\x80",
    "ß☃\U0001f600".encode(), b'"', b"\\", b"'", b"(" * 200, b"~" * 100, b"-" * 20, b" " * 300,
    b"9" * 400, b"0x" + b"f" * 99, b"x" * 5000, b"%s%n%x", b"|", b"/", b"\t\v\f",
)  # fmt: skip


def mutated(line: bytes, chance: random.Random) -> bytes:
    """A valid line with a few wounds."""
    data = bytearray(line)
    for _ in range(chance.randrange(4)):
        position = chance.randrange(len(data) + 1)
        end = min(len(data), position + chance.randrange(1, 8))
        match chance.randrange(6):
            case 0:
                data[position:position] = chance.choice(PIECES)
            case 1:
                del data[position:end]
            case 2 if position < len(data):
                data[position] ^= 1 << chance.randrange(8)
            case 3:
                data[position:position] = data[position:end] * chance.randrange(1, 50)
            case 4:
                data[position:] = chance.choice(LINES)[chance.randrange(3) :]
            case 5:
                data[position:position] = b" "
    return bytes(data)


def stream(chance: random.Random) -> bytes:
    """What one client sends, from its first byte to its last."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.randrange(1, 600)) + b"\n"
    parts = []
    for _ in range(chance.randrange(1, 6)):
        parts += [mutated(chance.choice(LINES), chance), chance.choice(ENDS)]
    return b"".join(parts)[:LARGEST_STREAM]


def is_harmless(data: bytes) -> bool:
    """It asks for no connection and no listener but at the paths above, and for no file."""
    lowered = bytes(byte for byte in data.lower() if 0x20 < byte < 0x7F)
    schemes = re.findall(rb"(?:tcp|exec|file|fd|vsock|rdma):|unix:(?!/nonexistent/)", lowered)
    return not schemes and b"vm" not in lowered.replace(b"nonexistent", b"")


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[hmp.HmpServer]:
    """The real commands over a real guest; `quit` ends nothing here."""
    guest = await open_guest(parse_guest_spec("ram:size=1M"), incoming=False)
    process = ControlProcess(guest, incoming=False)
    registry = build_registry(process)
    server = hmp.HmpServer(hmp.register(registry, process))
    try:
        await server.listen(Address(path=str(path)))
        yield server
    finally:
        await server.close()
        await process.close()


async def exchange(path: Path, data: bytes, cut: int) -> bytes:
    """All that the server says to a client that sends this in two pieces and ends its input."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    received = bytearray()
    try:
        async with asyncio.timeout(ANSWER_WAIT_S):
            with contextlib.suppress(ConnectionError):
                writer.write(data[:cut])
                await writer.drain()
                writer.write(data[cut:])
                writer.write_eof()
            with contextlib.suppress(ConnectionError):
                while more := await reader.read(65536):
                    received += more
    except TimeoutError:
        pytest.fail(f"no end of the answers to {data!r}; so far {bytes(received[-300:])!r}")
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return bytes(received)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def send_all(path: Path, streams: list[bytes], chance: random.Random) -> None:
    """CLIENTS at a time; each is answered, greeted first, and within the bounds."""
    waiting = [(data, chance.randrange(len(data) + 1)) for data in streams]

    async def one_client() -> None:
        while waiting:
            data, cut = waiting.pop()
            received = await exchange(path, data, cut)
            lines = 1 + len(re.findall(rb"[\r\n]", data))
            assert received.startswith(b"ramferry "), data
            assert PROMPT in received, data
            assert received.count(PROMPT) <= 1 + lines, data
            assert len(received) <= (1 + lines) * (OUTPUT_CHARACTERS_MAX + 300), data
            assert b"internal error" not in received, data

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(one_client())


def test_no_stream_of_bytes_breaks_blocks_or_bloats_the_monitor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(SEED)
    streams: list[bytes] = []
    while len(streams) < STREAMS:
        if is_harmless(data := stream(chance)):
            streams.append(data)

    async def scenario() -> int:
        path = tmp_path / "hmp"
        async with serving(path) as server:
            await send_all(path, streams[:500], chance)
            before = resident_bytes()
            await send_all(path, streams[500:], chance)
            growth = resident_bytes() - before
            answer = await exchange(path, b"info version\n", 0)
            assert b"10.0.2" in answer
            while server.clients:
                await asyncio.sleep(0)
        return growth

    assert asyncio.run(scenario()) < GROWTH_BYTES_MAX
    assert "internal error" not in caplog.text
    assert "Traceback" not in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_mutator_reaches_both_the_commands_and_the_refusals() -> None:
    chance = random.Random(SEED)
    streams = [stream(chance) for _ in range(2000)]
    assert sum(map(is_harmless, streams)) > 1500
    whole = sum(any(line in LINES for line in data.split(b"\n")) for data in streams)
    assert 200 < whole < 1800
    assert sum(b"\xff\xfa" in data for data in streams) > 10
    assert sum(len(line) > 4095 for data in streams for line in data.split(b"\n")) > 10
