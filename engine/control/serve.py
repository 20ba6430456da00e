"""`ramferry serve`: one control process from its options to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from engine.control import hmp
from engine.control.journal import Began, Journal, start_time
from engine.control.notifiers import Side
from engine.control.process import ControlProcess, Emit
from engine.control.qmp.commands import build_registry
from engine.control.qmp.server import QmpServer
from engine.control.restart import paused_of, plan
from engine.control.status import RunState
from engine.control.uri import parse_listen_address, parse_uri
from engine.guest.agentguest import AgentGuest
from engine.guest.base import Guest
from engine.guest.rundir import default_rundir
from engine.guest.spec import GuestSpec, RamSpec, WorkloadSpec, open_guest, parse_guest_spec
from engine.memory.blocks import check_page_size
from engine.worker import answer_promptly

log = logging.getLogger("ramferry")

EXIT_BY_SIGNAL: Final = 128
DESCRIPTORS_WANTED: Final = 16384
STARTING_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of `serve`, texts as the user wrote them.

    :ivar guest: a SPEC.
    :ivar qmp: where monitors listen, `unix:PATH` or `tcp:HOST:PORT`.
    :ivar hmp: where human monitors listen, in the same form.
    :ivar incoming: a URI, `defer`, or None for a source.
    :ivar settings: `name=value` of migration parameters and capabilities.
    :ivar uuid: the machine's, or empty.
    :ivar state_dir: where a journal is kept; empty: nowhere.
    :ivar only_migratable: nothing may block a migration.
    """

    guest: str
    qmp: tuple[str, ...]
    incoming: str | None = None
    settings: tuple[str, ...] = ()
    hmp: tuple[str, ...] = ()
    uuid: str = ""
    state_dir: str = ""
    only_migratable: bool = False


def run(options: ServeOptions) -> int:
    """Serve until `quit`, a signal, or a failed incoming migration; return the exit code.

    :raise UsageError: an option is wrong; nothing was started.
    :raise MigrationError: the guest or a monitor could not be started; all was given back."""
    logging.basicConfig(format="ramferry: %(message)s", stream=sys.stderr, level=logging.INFO)
    _allow_descriptors()
    answer_promptly()
    inherited = _inherited()
    return asyncio.run(_serve(options, inherited))


def _inherited() -> frozenset[int]:
    """Descriptors that whoever started us left open for us: stdin and all behind stderr. Programs
    that we start get none of them."""
    with os.scandir("/proc/self/fd") as entries:
        numbers = {int(entry.name) for entry in entries} - {1, 2}
    found = set()
    for number in numbers:
        with contextlib.suppress(OSError):  # the one that listed the directory
            if number and os.get_inheritable(number):
                found.add(number)
                os.set_inheritable(number, False)
    return frozenset(found | ({0} & numbers))


async def _serve(options: ServeOptions, inherited: frozenset[int]) -> int:
    loop, starting = asyncio.get_running_loop(), asyncio.current_task()
    assert starting is not None
    _give_up_on_signals(loop, starting)  # a guest that is started now ends with us
    check_page_size()
    spec = parse_guest_spec(options.guest)
    monitors = [parse_listen_address(text) for text in options.qmp]
    human_monitors = [parse_listen_address(text) for text in options.hmp]
    is_incoming = options.incoming is not None
    is_deferred = options.incoming in (None, "defer")
    address = None if is_deferred else parse_uri(str(options.incoming))
    async with AsyncExitStack() as stack:
        journal = Journal(options.state_dir) if options.state_dir else None
        if journal is not None:
            stack.callback(journal.close, in_order=False)
        start = await plan(journal.found if journal else None, spec, incoming=is_incoming)
        if start.text:
            log.warning("%s", start.text)
        guest = await open_guest(
            start.spec, incoming=start.incoming, run=start.runs, given_up=start.given_up
        )
        paused, advice = paused_of(start, guest)
        if advice:
            log.warning("%s", advice)
        is_adopted = not isinstance(start.spec, RamSpec) and start.spec.socket is not None
        is_unknown = start.is_unknown or (
            isinstance(guest, AgentGuest) and guest.is_outcome_unknown
        )
        process = ControlProcess(
            guest,
            incoming=start.incoming,
            uuid=options.uuid,
            journal=journal,
            is_unknown=is_unknown,
            paused=paused,
            inherited=inherited,
        )
        process.leaves_guest = is_adopted  # a mistake in what follows is not the guest's end
        process.blockers.only_migratable = options.only_migratable
        if journal is not None:
            stack.callback(lambda: journal.close(in_order=not process.leaves_guest))
        stack.push_async_callback(process.close)
        if journal is not None:
            _begin(journal, process, _record(guest, spec, incoming=start.incoming))
        if start.is_whole:
            await guest.close_missing()
        for setting in options.settings:
            process.set(setting)
        registry = build_registry(process)
        human_monitor = hmp.register(registry, process)
        if paused is not None:
            process.postcopy.take_up(paused)
        server, human_server = QmpServer(registry), hmp.HmpServer(human_monitor)
        process.send_event = _to_all(server.emit, human_monitor.held.notify)
        stack.push_async_callback(server.close)
        stack.push_async_callback(human_server.close)
        for monitor in monitors:
            await server.listen(monitor)
        for monitor in human_monitors:
            await human_server.listen(monitor)
        if address is not None and start.incoming:
            await process.migrate_incoming(address, True)
        _stop_on_signals(process)
        process.leaves_guest = False
        return await process.over


def _allow_descriptors() -> None:
    """Clients may hold descriptors (64 x 48, and 256 in sets); none must be missing to steer a
    migration. Each is bounded, so the hard limit may be used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _begin(journal: Journal, process: ControlProcess, record: Began) -> None:
    """Put on record what this process begins with."""
    promised = Side.SOURCE if process.inherits_unknown else None
    paused = process.paused
    postcopy = (paused.side, paused.session) if paused is not None else None
    is_stopped = process.run_state is RunState.PAUSED
    journal.begin(record, promised, postcopy, is_stopped=is_stopped)


def _record(guest: Guest, spec: GuestSpec, *, incoming: bool) -> Began:
    """What another process must know to find this guest again."""
    pid, rundir = None, ""
    if isinstance(guest, AgentGuest):
        pid = guest.agent_pid
        rundir = (isinstance(spec, WorkloadSpec) and spec.rundir) or default_rundir()
    started = start_time(pid) if pid is not None else None
    return Began(os.getpid(), guest.kind, pid, started, rundir, incoming)


def _to_all(*listeners: Emit) -> Emit:
    """Every event to each of them."""

    def emit(event: str, data: dict[str, object] | None = None) -> None:
        for listener in listeners:
            listener(event, data)

    return emit


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
