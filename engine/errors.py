"""Every error that ramferry raises on purpose, as one tree.

    MigrationError
    |-- UsageError        the caller asked for something that is not allowed
    |-- StateError        an event that the state machine does not allow; carries the story
    |-- MemoryRefused     RAM cannot be had, mapped, tracked or placed
    |-- WireError         bytes from a peer were wrong
    |   `-- CodecError    a payload does not decode to what its header says
    |-- ChannelError      a channel to the peer failed
    |-- WorkerLost        a worker process died or did not answer
    |-- GuestError        the guest refused, died or did not answer
    |   `-- NotHandedOver the right to run never left it
    |-- PeerRefused       the other side said no, and why
    `-- OutcomeUnknown    nobody here knows on which side the guest runs

A class exists only where some caller acts differently on it. Messages are one line: what was wrong,
what is allowed, what to do. All arguments are plain data, so errors can cross processes.
"""

from __future__ import annotations

from typing import Final

ECHO_CHARACTERS_MAX: Final = 100


class MigrationError(Exception):
    """Root: anything that went wrong with a migration, not with our code."""


class UsageError(MigrationError):
    """The request is not allowed; nothing was changed."""


class StateError(MigrationError):
    """`event` is not allowed in `status`; `story` tells the last steps, oldest first."""

    def __init__(self, status: str, event: str, story: tuple[str, ...] = ()) -> None:
        super().__init__(status, event, story)
        self.status, self.event, self.story = status, event, story

    def __str__(self) -> str:
        return f"event {self.event} is not allowed in status '{self.status}'"


class MemoryRefused(MigrationError):
    """RAM cannot be had, mapped, tracked or placed; `__cause__` holds the system's error."""


class WireError(MigrationError):
    """Bytes from a peer were wrong; the connection they came on is given up, the guest is not."""


class CodecError(WireError):
    """A payload does not decode to what its header says."""


class ChannelError(MigrationError):
    """Channel `index` failed while `doing`; `__cause__` holds the socket's error."""

    def __init__(self, index: int, doing: str) -> None:
        super().__init__(index, doing)
        self.index, self.doing = index, doing

    def __str__(self) -> str:
        return f"multifd channel {self.index} failed while {self.doing}"


class WorkerLost(MigrationError):
    """A worker process died or did not answer in time."""

    def __init__(self, role: str, index: int, reason: str) -> None:
        super().__init__(role, index, reason)
        self.role, self.index, self.reason = role, index, reason

    def __str__(self) -> str:
        return f"{self.role} {self.index} is lost: {self.reason}"


class GuestError(MigrationError):
    """The guest refused, died or did not answer in time."""


class NotHandedOver(GuestError):
    """The guest cannot be handed over as it is; the right to run never left it."""


class PeerRefused(MigrationError):
    """The other side refused; the message is its reason."""


class OutcomeUnknown(MigrationError):
    """The migration failed while it handed over the guest, and nobody here knows whether the
    destination took it. The source's guest stays stopped: two that run would be worse than none.
    Look at the destination before you resume either."""


def text_of(exc: BaseException) -> str:
    """A failure in one line."""
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    return f"{exc}: {exc.__cause__}" if exc.__cause__ else str(exc)


def shown(given: object) -> str:
    """What somebody gave us, as a message may repeat it: one line, printable, not long."""
    text = str(given)
    end = "..." if len(text) > ECHO_CHARACTERS_MAX else ""
    characters = (
        character if character.isprintable() else ascii(character)[1:-1]
        for character in text[:ECHO_CHARACTERS_MAX]
    )
    return "".join(characters) + end
