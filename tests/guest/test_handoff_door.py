"""The socket at which VMMs come in, when this process is short of everything."""

from __future__ import annotations

import asyncio
import resource
import socket
import tempfile
from pathlib import Path

import pytest

from engine.guest.handoff_door import NO_ROOM_WAIT_S, Door
from tests.guest.support import run
from tests.support import WAIT_S


@pytest.mark.process
def test_who_comes_when_no_descriptor_is_left_waits_and_is_heard() -> None:
    async def scenario(path: str) -> bytes:
        door = Door(path)
        coming = asyncio.create_task(door.next())
        with socket.socket(socket.AF_UNIX) as vmm:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
            try:
                vmm.connect(path)
                vmm.send(b"{}\n")
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(coming), 2 * NO_ROOM_WAIT_S)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            async with asyncio.timeout(WAIT_S):
                visitor = await coming
        visitor.close()
        await door.close()
        return visitor.text

    with tempfile.TemporaryDirectory() as name:
        assert run(scenario(str(Path(name) / "door"))) == b"{}\n"
