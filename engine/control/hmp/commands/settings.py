"""Parameters and capabilities, and the commands for them that QEMU had until 6.0."""

from __future__ import annotations

from typing import Final

from engine.control.hmp import views
from engine.control.hmp.console import Console
from engine.control.hmp.context import Context
from engine.control.hmp.parser import Argument, Kind, Values
from engine.control.hmp.table import HmpCommand
from engine.control.parameters import hmp_lines, parse_hmp_value
from engine.errors import UsageError, shown

KIB: Final = 1024


class Settings:
    """Handlers; QMP's commands do the work."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def set_capability(self, console: Console, values: Values) -> None:
        name = values["capability"]
        known = await self._context.ask("query-migrate-capabilities")
        if all(entry["capability"] != name for entry in known):
            raise UsageError(f"invalid parameter value: {shown(name)}")
        change = {"capability": name, "state": values["state"]}
        await self._context.ask("migrate-set-capabilities", capabilities=[change])

    async def set_parameter(self, console: Console, values: Values) -> None:
        name = str(values["parameter"])
        value = parse_hmp_value(name, str(values["value"]))
        await self._context.ask("migrate-set-parameters", **{name: value})

    async def capabilities(self, console: Console, values: Values) -> None:
        console.print(*views.capabilities(await self._context.ask("query-migrate-capabilities")))

    async def parameters(self, console: Console, values: Values) -> None:
        console.print(*hmp_lines(await self._context.ask("query-migrate-parameters")))

    # -- until QEMU 6.0 --------------------------------------------------------------------------

    async def set_speed(self, console: Console, values: Values) -> None:
        await self._context.ask("migrate_set_speed", value=values["value"])

    async def set_downtime(self, console: Console, values: Values) -> None:
        await self._context.ask("migrate_set_downtime", value=values["value"])

    async def set_cache_size(self, console: Console, values: Values) -> None:
        """Rounded down to a power of two, as it was then."""
        size = int(values["value"])
        rounded = 1 << size.bit_length() - 1 if size else 0
        await self._context.ask("migrate-set-cache-size", value=rounded)

    async def cache_size(self, console: Console, values: Values) -> None:
        size = await self._context.ask("query-migrate-cache-size")
        console.print(f"xbzrel cache size: {size // KIB} kbytes")


def commands(context: Context) -> list[HmpCommand]:
    """This subject's commands, with QEMU's words of help."""
    does = Settings(context)
    return [
        HmpCommand(
            "migrate_set_capability", does.set_capability,
            (Argument("capability"), Argument("state", Kind.SWITCH)), "capability state",
            "Enable/Disable the usage of a capability for migration",
        ),
        HmpCommand(
            "migrate_set_parameter", does.set_parameter,
            (Argument("parameter"), Argument("value")), "parameter value",
            "Set the parameter for migration",
        ),
        HmpCommand(
            "migrate_set_speed", does.set_speed, (Argument("value", Kind.SIZE),), "value",
            "set maximum speed (in bytes) for migrations. Defaults to MB if no size suffix is "
            "specified, ie. B/K/M/G/T",
        ),
        HmpCommand(
            "migrate_set_downtime", does.set_downtime, (Argument("value", Kind.SECONDS),), "value",
            "set maximum tolerated downtime (in seconds) for migrations",
        ),
        HmpCommand(
            "migrate_set_cache_size", does.set_cache_size, (Argument("value", Kind.SIZE),),
            "value", "set cache size (in bytes) for XBZRLE migrations, rounded down to the "
            "nearest power of 2",
        ),
    ]  # fmt: skip


def items(context: Context) -> list[HmpCommand]:
    """This subject's items of `info`."""
    does = Settings(context)
    return [
        HmpCommand(
            "migrate_capabilities", does.capabilities, help="show current migration capabilities"
        ),
        HmpCommand("migrate_parameters", does.parameters, help="show current migration parameters"),
        HmpCommand(
            "migrate_cache_size", does.cache_size, help="show current migration xbzrle cache size"
        ),
    ]
