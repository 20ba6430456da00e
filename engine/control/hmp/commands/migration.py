"""The migration itself: begin, end, look."""

from __future__ import annotations

from engine.control.hmp import views
from engine.control.hmp.console import Console
from engine.control.hmp.context import Context
from engine.control.hmp.parser import Argument, Kind, Values, flag
from engine.control.hmp.table import HmpCommand
from engine.control.status import Status
from engine.errors import UsageError, shown

NOT_HELD = "terminal does not allow synchronous migration, continuing detached"


class Migration:
    """Handlers; QMP's commands do the work."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def migrate(self, console: Console, values: Values) -> None:
        """Without -d: return, with the reason of a failure, when the migration needs no more
        waiting for."""
        ask = self._context.ask
        await ask("migrate", uri=values["uri"], resume=values["resume"])
        if values["detach"]:
            return
        if not console.can_wait:
            console.print(NOT_HELD)
            return
        await self._context.held.migration()
        info = await ask("query-migrate")
        if "error-desc" in info:
            raise UsageError(info["error-desc"])

    async def cancel(self, console: Console, values: Values) -> None:
        await self._context.ask("migrate_cancel")

    async def go_on(self, console: Console, values: Values) -> None:
        state = values["state"]
        if state not in {status.value for status in Status}:
            raise UsageError(f"invalid parameter value: {shown(state)}")
        await self._context.ask("migrate-continue", state=state)

    async def incoming(self, console: Console, values: Values) -> None:
        """As in QEMU, a migration that fails does not end a process that was told to by hand."""
        await self._context.ask("migrate-incoming", uri=values["uri"], exit_on_error=False)

    async def recover(self, console: Console, values: Values) -> None:
        await self._context.ask("migrate-recover", uri=values["uri"])

    async def pause(self, console: Console, values: Values) -> None:
        await self._context.ask("migrate-pause")

    async def start_postcopy(self, console: Console, values: Values) -> None:
        await self._context.ask("migrate-start-postcopy")

    async def heartbeat_lost(self, console: Console, values: Values) -> None:
        await self._context.ask("x-colo-lost-heartbeat")

    async def announce_self(self, console: Console, values: Values) -> None:
        """Timing is that of the migration's parameters."""
        parameters = await self._context.ask("query-migrate-parameters")
        timing = {name: parameters[f"announce-{name}"] for name in ("initial", "max", "rounds")}
        interfaces = values.get("interfaces")
        await self._context.ask(
            "announce-self",
            **timing,
            step=parameters["announce-step"],
            interfaces=interfaces.split(",") if isinstance(interfaces, str) else None,
            id=values.get("id"),
        )

    async def client_info(self, console: Console, values: Values) -> None:
        await self._context.ask("client_migrate_info", **values)

    async def info(self, console: Console, values: Values) -> None:
        answer = await self._context.ask("query-migrate")
        only_migratable = self._context.is_only_migratable()
        console.print(*views.migration(answer, only_migratable=only_migratable))
        if values["all"]:
            console.print(*views.extensions(answer))


def commands(context: Context) -> list[HmpCommand]:
    """This subject's commands, with QEMU's words of help."""
    does = Migration(context)
    uri = Argument("uri")
    return [
        HmpCommand(
            "migrate", does.migrate, (flag("detach", "d"), flag("resume", "r"), uri),
            "[-d] [-r] uri", "migrate to URI (using -d to not wait for completion)\n"
            "\t\t\t -r to resume a paused postcopy migration",
        ),
        HmpCommand("migrate_cancel", does.cancel, help="cancel the current VM migration"),
        HmpCommand(
            "migrate_continue", does.go_on, (Argument("state"),), "state",
            "Continue migration from the given paused state",
        ),
        HmpCommand(
            "migrate_incoming", does.incoming, (uri,), "uri",
            "Continue an incoming migration from an -incoming defer",
        ),
        HmpCommand(
            "migrate_recover", does.recover, (uri,), "uri",
            "Continue a paused incoming postcopy migration",
        ),
        HmpCommand(
            "migrate_pause", does.pause, help="Pause an ongoing migration (postcopy-only)"
        ),
        HmpCommand(
            "migrate_start_postcopy", does.start_postcopy,
            help="Followup to a migration command to switch the migration to postcopy mode. "
            "The postcopy-ram capability must be set on both source and destination before the "
            "original migration command .",
        ),
        HmpCommand(
            "x_colo_lost_heartbeat", does.heartbeat_lost,
            help="Tell COLO that heartbeat is lost,\n\t\t\ta failover or takeover is needed.",
        ),
        HmpCommand(
            "announce_self", does.announce_self,
            (Argument("interfaces", is_optional=True), Argument("id", is_optional=True)),
            "[interfaces] [id]", "Trigger GARP/RARP announcements",
        ),
        HmpCommand(
            "client_migrate_info", does.client_info,
            (
                Argument("protocol"), Argument("hostname"),
                Argument("port", Kind.INTEGER32, True), Argument("tls-port", Kind.INTEGER32, True),
                Argument("cert-subject", is_optional=True),
            ),
            "protocol hostname port tls-port cert-subject",
            "set migration information for remote display",
        ),
    ]  # fmt: skip


def items(context: Context) -> list[HmpCommand]:
    """This subject's items of `info`."""
    does = Migration(context)
    return [
        HmpCommand(
            "migrate", does.info, (flag("all", "a"),), "[-a]",
            "show migration status (-a: also what ramferry adds to it)",
        ),
    ]  # fmt: skip
