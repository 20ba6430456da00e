"""What belongs to one client beside its connection: the descriptors that it sent."""

from __future__ import annotations

import os
from collections import deque
from contextvars import ContextVar
from typing import Final

#: Received and not named yet; more are closed at once.
RECEIVED_MAX: Final = 16
NAMED_MAX: Final = 32
NAME_CHARACTERS_MAX: Final = 255


class Monitor:
    """One client's descriptors; owns them until they are taken or the client leaves.

    :ivar received: came by SCM_RIGHTS and have no name yet, oldest first.
    :ivar named: `getfd` gave them a name.
    """

    def __init__(self) -> None:
        self.received: deque[int] = deque()
        self.named: dict[str, int] = {}

    def receive(self, fd: int) -> None:
        """Keep a descriptor that came; close it when too many wait."""
        if len(self.received) >= RECEIVED_MAX:
            os.close(fd)
        else:
            self.received.append(fd)

    def close_received(self) -> None:
        """Give those back that nobody took, as when others come."""
        while self.received:
            os.close(self.received.popleft())

    def close(self) -> None:
        """Give all back. Idempotent."""
        self.close_received()
        while self.named:
            os.close(self.named.popitem()[1])


#: Whose command is being executed; None where it is nobody's (library, tests).
current_monitor: ContextVar[Monitor | None] = ContextVar("current_monitor", default=None)
