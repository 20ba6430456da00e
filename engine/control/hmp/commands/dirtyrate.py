"""How fast the guest dirties its memory, and limits of that."""

from __future__ import annotations

from typing import Final

from engine.control.hmp import views
from engine.control.hmp.console import Console
from engine.control.hmp.context import Context
from engine.control.hmp.parser import Argument, Kind, Values, flag
from engine.control.hmp.table import HmpCommand

LOOK_AT_LIMITS: Final = "[Please use 'info vcpu_dirty_limit' to query dirty limit for virtual CPU]"


class DirtyRate:
    """Handlers; QMP's commands do the work."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def measure(self, console: Console, values: Values) -> None:
        second = values["second"]
        if not second:
            console.refuse("Incorrect period length specified!")
            return
        if values["dirty_ring"] and values["dirty_bitmap"]:
            console.refuse("Either dirty ring or dirty bitmap can be specified!")
            return
        mode = "page-sampling"
        if values["dirty_bitmap"]:
            mode = "dirty-bitmap"
        elif values["dirty_ring"]:
            mode = "dirty-ring"
        pages = values.get("sample_pages_per_GB", -1)
        await self._context.ask(
            "calc-dirty-rate",
            calc_time=second,
            sample_pages=None if pages == -1 else pages,
            mode=mode,
        )
        console.print(
            f"Starting dirty rate measurement with period {second} seconds",
            "[Please use 'info dirty_rate' to check results]",
        )

    async def limit(self, console: Console, values: Values) -> None:
        await self._context.ask(
            "set-vcpu-dirty-limit", dirty_rate=values["dirty_rate"], cpu_index=_vcpu(values)
        )
        console.print(LOOK_AT_LIMITS)

    async def cancel_limit(self, console: Console, values: Values) -> None:
        await self._context.ask("cancel-vcpu-dirty-limit", cpu_index=_vcpu(values))
        console.print(LOOK_AT_LIMITS)

    async def rate(self, console: Console, values: Values) -> None:
        console.print(*views.dirty_rate(await self._context.ask("query-dirty-rate")))

    async def limits(self, console: Console, values: Values) -> None:
        console.print(*views.vcpu_dirty_limits(await self._context.ask("query-vcpu-dirty-limit")))


def _vcpu(values: Values) -> object:
    """One vCPU; None, as -1 in QEMU: all of them."""
    index = values.get("cpu_index", -1)
    return None if index == -1 else index


def commands(context: Context) -> list[HmpCommand]:
    """This subject's commands, with QEMU's words of help."""
    does = DirtyRate(context)
    vcpu = Argument("cpu_index", Kind.INTEGER, True)
    return [
        HmpCommand(
            "calc_dirty_rate", does.measure,
            (
                flag("dirty_ring", "r"), flag("dirty_bitmap", "b"),
                Argument("second", Kind.INTEGER),
                Argument("sample_pages_per_GB", Kind.INTEGER, True),
            ),
            "[-r] [-b] second [sample_pages_per_GB]",
            "start a round of guest dirty rate measurement (using -r to\n"
            "\t\t\t specify dirty ring as the method of calculation and\n"
            "\t\t\t -b to specify dirty bitmap as method of calculation)",
        ),
        HmpCommand(
            "set_vcpu_dirty_limit", does.limit, (Argument("dirty_rate", Kind.INTEGER), vcpu),
            "dirty_rate [cpu_index]", "set dirty page rate limit, use cpu_index to set limit\n"
            "\t\t\t\t\t on a specified virtual cpu",
        ),
        HmpCommand(
            "cancel_vcpu_dirty_limit", does.cancel_limit, (vcpu,), "[cpu_index]",
            "cancel dirty page rate limit, use cpu_index to cancel\n"
            "\t\t\t\t\t limit on a specified virtual cpu",
        ),
    ]  # fmt: skip


def items(context: Context) -> list[HmpCommand]:
    """This subject's items of `info`."""
    does = DirtyRate(context)
    return [
        HmpCommand("dirty_rate", does.rate, help="show dirty rate information"),
        HmpCommand(
            "vcpu_dirty_limit", does.limits, help="show dirty page limit information of all vCPU"
        ),
    ]
