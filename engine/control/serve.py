"""`ramferry serve`: one control process from its options to its exit code."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from engine.control.process import ControlProcess
from engine.control.qmp.commands import build_registry
from engine.control.qmp.server import QmpServer
from engine.control.uri import Address, parse_listen_address, parse_uri
from engine.guest.spec import open_guest, parse_guest_spec
from engine.memory.blocks import check_page_size

log = logging.getLogger("ramferry")

EXIT_BY_SIGNAL: Final = 128
STARTING_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of `serve`, texts as the user wrote them.

    :ivar guest: a SPEC.
    :ivar qmp: where monitors listen, `unix:PATH` or `tcp:HOST:PORT`.
    :ivar incoming: a URI, `defer`, or None for a source.
    :ivar settings: `name=value` of migration parameters and capabilities.
    """

    guest: str
    qmp: tuple[str, ...]
    incoming: str | None = None
    settings: tuple[str, ...] = ()


def run(options: ServeOptions) -> int:
    """Serve until `quit`, a signal, or a failed incoming migration; return the exit code.

    :raise UsageError: an option is wrong; nothing was started.
    :raise MigrationError: the guest or a monitor could not be started; all was given back."""
    logging.basicConfig(format="ramferry: %(message)s", stream=sys.stderr, level=logging.INFO)
    return asyncio.run(_serve(options))


async def _serve(options: ServeOptions) -> int:
    loop, starting = asyncio.get_running_loop(), asyncio.current_task()
    assert starting is not None
    _give_up_on_signals(loop, starting)  # a guest that is started now ends with us
    check_page_size()
    spec = parse_guest_spec(options.guest)
    monitors = [parse_listen_address(text) for text in options.qmp]
    is_incoming = options.incoming is not None
    address: Address | None = None
    if options.incoming not in (None, "defer"):
        address = parse_uri(str(options.incoming))
    async with AsyncExitStack() as stack:
        guest = await open_guest(spec, incoming=is_incoming)
        stack.push_async_callback(guest.quit)
        process = ControlProcess(guest, incoming=is_incoming)
        stack.push_async_callback(process.close)
        for setting in options.settings:
            process.set(setting)
        server = QmpServer(build_registry(process))
        process.send_event = server.emit
        stack.push_async_callback(server.close)
        for monitor in monitors:
            await server.listen(monitor)
        if address is not None:
            await process.migrate_incoming(address, True)
        _stop_on_signals(process)
        return await process.over


def _give_up_on_signals(loop: asyncio.AbstractEventLoop, starting: asyncio.Task[int]) -> None:
    """The first signal ends the start; later ones do not end the cleaning up."""

    def give_up() -> None:
        for number in STARTING_SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        starting.cancel()

    for number in STARTING_SIGNALS:
        loop.add_signal_handler(number, give_up)


def _stop_on_signals(process: ControlProcess) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, process.quit, EXIT_BY_SIGNAL + number)
