"""The token: how the right to run goes from one guest to the other, whichever process dies.

The destination listens, the source connects during setup. Each message is 24 bytes: magic, version,
kind, session. The source's side of the conversation:

    HELLO -> WAITING               during setup: somebody is there
    TAKE  -> TAKEN | REFUSED       the source has already given up its right when it sends this
    ASK   -> TAKEN | VOID          after a TAKE whose answer was lost, on a new connection
    CONFIRM                        TAKEN has arrived: nobody will ask again

A session is void for ever once the destination has said so, or was disarmed; one that stops
listening says VOID to those who greeted it. Who has never met a session says nothing of it: an
agent that listened there before may have taken it. So an answer other than TAKEN means that this
session's token was not and never will be taken. A refused connection means the same where only the
kernel of this very host can have refused it: the destination listens from TAKEN until CONFIRM has
come.
Across a network a firewall, or another owner of the address, may have refused. Without a proof the
outcome is unknown: the source stays stopped, and asks once more before anybody makes it run.

Here are the messages and the decisions, without a socket; the endpoints are in handover.py.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import Final

from engine.errors import GuestError, WireError
from engine.guest.base import Handover

MAGIC: Final = b"rfho"
VERSION: Final = 1
MESSAGE: Final = struct.Struct("<4sHH16s")
SESSION_BYTES: Final = 16
SESSIONS_MAX: Final = 1024  #: that are known, of strangers, too; others get no promise


class Kind(enum.IntEnum):
    """What a message says; 0 says nothing."""

    HELLO = 1
    WAITING = 2
    TAKE = 3
    TAKEN = 4
    REFUSED = 5
    ASK = 6
    VOID = 7
    CONFIRM = 8


def encode(kind: Kind, session: bytes) -> bytes:
    """One message."""
    return MESSAGE.pack(MAGIC, VERSION, kind, session)


def decode(message: bytes) -> tuple[Kind, bytes]:
    """:raise WireError: not a message of this protocol; names what was wrong."""
    if len(message) != MESSAGE.size:
        raise WireError(f"handover message of {len(message)} bytes, {MESSAGE.size} expected")
    magic, version, kind, session = MESSAGE.unpack(message)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"handover magic {magic!r} version {version}, {MAGIC!r} {VERSION} expected")
    if kind not in Kind.__members__.values() or session == bytes(SESSION_BYTES):
        raise WireError(f"handover message kind {kind} or session is not allowed")
    return Kind(kind), session


@dataclass(slots=True)
class DestinationToken:
    """The destination's half. `taken` is the session that made this guest the one that runs."""

    armed: bytes | None = None
    taken: bytes | None = None
    confirmed: bool = False  #: the source knows that it was taken
    voided: set[bytes] = field(default_factory=set)
    #: Its source has greeted, or has sent the token: that it was not taken is known here alone.
    known: set[bytes] = field(default_factory=set)

    def arm(self, session: bytes) -> None:
        """Take the token of `session` when it comes.

        :raise GuestError: another was taken, or this one was voided; nothing changes."""
        if self.taken is not None:
            raise GuestError("this guest has taken over already; it cannot be armed again")
        if session in self.voided:
            raise GuestError("the source was told that this session is void; begin a new migration")
        if len(session) != SESSION_BYTES or session == bytes(SESSION_BYTES):
            raise GuestError(f"a session is {SESSION_BYTES} bytes and not zero")
        self.known.add(session)
        self.armed = session

    def disarm(self) -> bool:
        """Void the armed session; False when the token was taken before."""
        if self.taken is not None:
            return False
        if self.armed is not None:
            self.voided.add(self.armed)
            self.armed = None
        return True

    def answer(self, kind: Kind, session: bytes) -> Kind | None:
        """Take a message in; None: no answer, the connection ends (or goes on after CONFIRM)."""
        if kind in (Kind.HELLO, Kind.TAKE) and len(self.known) < SESSIONS_MAX:
            self.known.add(session)
        match kind:
            case Kind.HELLO:
                return Kind.WAITING
            case Kind.TAKE if self.armed == session and session not in self.voided:
                self.armed, self.taken = None, session
                return Kind.TAKEN
            case Kind.TAKE | Kind.ASK if self.taken == session:
                return Kind.TAKEN
            case Kind.TAKE | Kind.ASK if self.void(session):
                return Kind.REFUSED if kind is Kind.TAKE else Kind.VOID
            case Kind.CONFIRM if self.taken == session:
                self.confirmed = True
        return None

    def void(self, session: bytes) -> bool:
        """Promise never to take `session`; False when it was taken, or may have been taken by who
        listened here before."""
        if session == self.taken or session not in self.known:
            return False
        self.voided.add(session)
        if session == self.armed:
            self.armed = None
        return True


@dataclass(slots=True)
class SourceToken:
    """The source's half, for one session."""

    is_sent: bool = False  #: TAKE may have left: only an answer tells who has the token

    def next_message(self) -> Kind:
        """What to send on a fresh or idle connection; the answer may be lost from here on."""
        kind = Kind.ASK if self.is_sent else Kind.TAKE
        self.is_sent = True
        return kind

    def answered(self, kind: Kind) -> Handover:
        """:raise WireError: no answer to what was sent; ask again."""
        if kind is Kind.TAKEN:
            return Handover.TAKEN
        if kind in (Kind.REFUSED, Kind.VOID):
            return Handover.REFUSED
        raise WireError(f"handover answered with {kind.name}")

    def nobody_listens(self) -> Handover:
        """This host's own kernel says so: a guest that had taken the token would listen."""
        return Handover.REFUSED

    def gave_up(self) -> Handover:
        """The deadline has passed, or a far host refuses: no proof of anything."""
        return Handover.UNKNOWN if self.is_sent else Handover.REFUSED
