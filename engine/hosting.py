"""A control process's work inside the caller's own process, for programs that want to be called at
each change of a migration's status (`notifiers`), not only to watch it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

from engine.control.process import ControlProcess
from engine.control.uri import parse_uri
from engine.guest.spec import open_guest, parse_guest_spec
from engine.memory.blocks import check_page_size


@contextlib.asynccontextmanager
async def hosted(
    guest: str, incoming: str | None = None, settings: Iterable[str] = ()
) -> AsyncIterator[ControlProcess]:
    """A guest and its migrations, in this event loop; without monitors and without a journal.

    The arguments are those of `Control.start`. When the block ends, however it does, migrations
    are cancelled and the guest is gone; workers are processes of their own here, too.

    :raise UsageError: the guest, the address or a setting is wrong; nothing is left.
    :raise MigrationError: the guest cannot be had, or `incoming` not be listened at; nothing is
        left."""
    check_page_size()
    spec = parse_guest_spec(guest)
    address = None if incoming in (None, "defer") else parse_uri(str(incoming))
    process = ControlProcess(
        await open_guest(spec, incoming=incoming is not None), incoming=incoming is not None
    )
    try:
        for setting in settings:
            process.set(setting)
        if address is not None:
            await process.migrate_incoming(address, False)
        yield process
    finally:
        await process.close()
