"""savevm, loadvm, delvm: QMP's jobs, waited for."""

from __future__ import annotations

import itertools
import time
from typing import Final

from engine.control.hmp.console import Console
from engine.control.hmp.context import Context
from engine.control.hmp.parser import Argument, Values
from engine.control.hmp.table import HmpCommand
from engine.errors import UsageError

CONCLUDED: Final = "concluded"
#: QMP wants devices to be named, HMP takes all there are; of none QMP and HMP say this.
NO_DEVICES: Final = "At least one device is required for snapshot"
NO_DEVICES_HERE: Final = "no block device can store vmstate for snapshot"


class Snapshots:
    """Handlers; QMP's commands do the work."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._numbers = itertools.count()

    async def save(self, console: Console, values: Values) -> None:
        """Without a tag, QEMU's: the time of day."""
        tag = values.get("tag", time.strftime("vm-%Y%m%d%H%M%S"))
        await self._run("snapshot-save", tag=tag, vmstate="", devices=[])

    async def load(self, console: Console, values: Values) -> None:
        await self._run("snapshot-load", tag=values["tag"], vmstate="", devices=[])

    async def delete(self, console: Console, values: Values) -> None:
        """Nothing to do where no device could have one, as in QEMU."""
        try:
            await self._run("snapshot-delete", tag=values["tag"], devices=[])
        except UsageError as exc:
            if str(exc) != NO_DEVICES_HERE:
                raise

    async def _run(self, command: str, **arguments: object) -> None:
        """Start the job and wait for its end; nothing is left of it.

        :raise MigrationError: it could not begin, or what it failed with."""
        job = f"hmp-{command}-{next(self._numbers)}"
        ask = self._context.ask
        await ask(command, job_id=job, **arguments)
        while found := [one for one in await ask("query-jobs") if one["id"] == job]:
            if found[0]["status"] == CONCLUDED:
                await ask("job-dismiss", id=job)
                if error := found[0].get("error"):
                    raise UsageError(NO_DEVICES_HERE if error == NO_DEVICES else error)
                return
            await self._context.held.news()


def commands(context: Context) -> list[HmpCommand]:
    """This subject's commands, with QEMU's words of help."""
    does = Snapshots(context)
    tag = Argument("tag")
    return [
        HmpCommand(
            "savevm", does.save, (Argument("tag", is_optional=True),), "tag",
            "save a VM snapshot. If no tag is provided, a new snapshot is created",
        ),
        HmpCommand("loadvm", does.load, (tag,), "tag", "restore a VM snapshot from its tag"),
        HmpCommand("delvm", does.delete, (tag,), "tag", "delete a VM snapshot from its tag"),
    ]  # fmt: skip


def items(context: Context) -> list[HmpCommand]:
    """This subject's items of `info`: none."""
    return []
