"""What every monitor has: run state, version, the end."""

from __future__ import annotations

from engine.control.hmp import views
from engine.control.hmp.console import Console
from engine.control.hmp.context import Context
from engine.control.hmp.parser import Values
from engine.control.hmp.table import HmpCommand


class General:
    """Handlers; QMP's commands do the work."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def stop(self, console: Console, values: Values) -> None:
        await self._context.ask("stop")

    async def cont(self, console: Console, values: Values) -> None:
        await self._context.ask("cont")

    async def quit(self, console: Console, values: Values) -> None:
        await self._context.ask("quit")
        console.is_over = True

    async def status(self, console: Console, values: Values) -> None:
        console.print(views.run_state(await self._context.ask("query-status")))

    async def version(self, console: Console, values: Values) -> None:
        console.print(views.version(await self._context.ask("query-version")))


def commands(context: Context) -> list[HmpCommand]:
    """This subject's commands, with QEMU's words of help."""
    does = General(context)
    return [
        HmpCommand("stop|s", does.stop, help="stop emulation"),
        HmpCommand("cont|c", does.cont, help="resume emulation"),
        HmpCommand("quit|q", does.quit, help="quit the emulator"),
    ]


def items(context: Context) -> list[HmpCommand]:
    """This subject's items of `info`."""
    does = General(context)
    return [
        HmpCommand("status", does.status, help="show the current VM status (running|paused)"),
        HmpCommand("version", does.version, help="show the version of QEMU"),
    ]
