"""`--state-dir`: what a control process was doing when it was killed, for the one that comes next.

Lines of JSON, appended before the thing is done. They survive the process (kill -9), which is all
that matters: with the host, the guest's memory is gone too, so nothing waits for a disk.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

from engine.control.notifiers import Change, Moment, Side
from engine.control.status import Status
from engine.errors import NotHandedOver, UsageError, shown

log = logging.getLogger("ramferry.control")

JOURNAL_BYTES_MAX: Final = 4 * 1024 * 1024
COMPACT_RECORDS: Final = 1000

Session = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{32})?$")]  #: in hex, or empty


class Record(msgspec.Struct, frozen=True, tag_field="record", rename="kebab"):
    """Root of everything in the file; unknown members are another version's, and ignored."""


class Began(Record, frozen=True, tag="began"):
    """A control process has its guest.

    :ivar guest_started: clock ticks since boot, with which a pid is never another process's."""

    pid: int
    guest_kind: str
    guest_pid: int | None
    guest_started: int | None
    rundir: str
    incoming: bool


class Moved(Record, frozen=True, tag="moved"):
    """A status is about to be entered."""

    side: Side
    status: Status


class Promised(Record, frozen=True, tag="promised"):
    """From here on the other side may have the right to run (source), or this one (destination).

    :ivar session: of a postcopy: if it has moved, the destination lacks pages; else empty."""

    side: Side
    session: Session = ""


class Postcopy(Record, frozen=True, tag="postcopy"):
    """The right to run has moved, and the destination lacks pages, until `completed` or `failed`;
    with the session the migration can be resumed."""

    side: Side
    session: Session


class Settled(Record, frozen=True, tag="settled"):
    """The right to run is this process's again, or the other side's for ever, whatever was
    promised; `completed` says the same."""

    side: Side


class Stood(Record, frozen=True, tag="stood"):
    """Its user has stopped the guest, or let it run again."""

    by_user: bool


class Closed(Record, frozen=True, tag="closed"):
    """It ended in order, and its guest with it."""


_DECODER: Final = msgspec.json.Decoder(
    Began | Moved | Promised | Postcopy | Settled | Stood | Closed
)


@dataclass(slots=True)
class Found:
    """What the last control process left: how far each side had come, and its guest.

    :ivar source_session: of a postcopy from here that had not ended; of a promise, if it is one.
    :ivar destination_session: of one to here."""

    began: Began
    source: Status = Status.NONE
    destination: Status = Status.NONE
    promised: Side | None = None
    is_stopped: bool = False  #: by its user
    source_session: bytes | None = None
    destination_session: bytes | None = None

    def set_session(self, side: Side, session: bytes | None) -> None:
        """Of that side's postcopy; None: there is none any more."""
        if side is Side.SOURCE:
            self.source_session = session
        else:
            self.destination_session = session

    @property
    def is_at_destination(self) -> bool:
        """The guest was given away, and that was confirmed."""
        return self.source is Status.COMPLETED

    @property
    def is_unknown(self) -> bool:
        """It was killed while the right to run was on its way to or from it."""
        return self.promised is not None

    @property
    def story(self) -> str:
        """For people: what it was doing."""
        doing = "no migration was going on"
        if self.source not in (Status.NONE, Status.FAILED, Status.CANCELLED):
            doing = f"as source it was in '{self.source.value}'"
        elif self.destination not in (Status.NONE, Status.FAILED, Status.COMPLETED):
            doing = f"as destination it was in '{self.destination.value}'"
        elif self.source_session is not None or self.destination_session is not None:
            doing = "nobody had resumed its postcopy"
        return f"the control process before this one (pid {self.began.pid}) was killed; {doing}"


class Journal:
    """One directory's; owns its lock and its file until `close`."""

    def __init__(self, directory: str) -> None:
        """Take the directory, which is made if it is missing.

        :raise UsageError: it cannot be used, is not this user's alone, or another process has
            it; nothing was changed."""
        self._path = Path(directory) / "journal"
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise UsageError(
                f"state directory '{shown(directory)}' cannot be used: {exc.strerror}"
            ) from exc
        self._fd, self._written = -1, 0
        self._records: list[Record] = []  #: of this life, as far as they still matter
        try:
            self._lock(directory)
            self.found = self._read()
        except UsageError:
            os.close(self._directory)
            raise

    def _lock(self, directory: str) -> None:
        found = os.fstat(self._directory)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise UsageError(
                f"state directory '{shown(directory)}' is not this user's alone; its mode must be "
                "0700"
            )
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"state directory '{shown(directory)}' belongs to another control process that "
                "lives; give each its own"
            ) from None

    def _read(self) -> Found | None:
        """What the last `Began` and the records after it say; None where it was closed in order.

        A last line that was cut by the death of its writer was not said."""
        try:
            with self._path.open("rb") as file:
                data = file.read(JOURNAL_BYTES_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise UsageError(f"'{self._path}' cannot be read: {exc.strerror}") from exc
        if len(data) > JOURNAL_BYTES_MAX:
            raise UsageError(f"'{self._path}' is no journal: longer than {JOURNAL_BYTES_MAX} bytes")
        found: Found | None = None
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                found = _after(found, _DECODER.decode(line))
            except msgspec.MsgspecError as exc:
                raise UsageError(f"'{self._path}' line {number} is no record: {exc}") from exc
        return found

    def begin(
        self,
        record: Began,
        promised: Side | None = None,
        postcopy: tuple[Side, bytes] | None = None,
        *,
        is_stopped: bool = False,
    ) -> None:
        """From now on the records are this process's; what was found is forgotten.

        :param promised: a promise of the process before this one that nobody has settled yet.
        :param postcopy: side and session of one that goes on.
        :param is_stopped: the guest stands, as its user wants it.
        :raise UsageError: the journal cannot be written."""
        self._records = [record]
        if postcopy is not None:
            self._records.append(Postcopy(postcopy[0], postcopy[1].hex()))
        if promised is not None:
            self._records.append(Promised(promised))
        if is_stopped:
            self._records.append(Stood(by_user=True))
        try:
            self._rewrite()
        except OSError as exc:
            raise UsageError(f"'{self._path}' cannot be written: {exc.strerror}") from exc

    def _rewrite(self) -> None:
        """Begin the file anew with what still matters; whoever reads sees the old or the new.

        :raise OSError: it cannot be written; the old one is still there."""
        fresh = self._path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(fresh, flags, 0o600)
        try:
            _write_whole(fd, b"".join(map(_line, self._records)))
            os.replace(fresh, self._path)
        except OSError:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._written = fd, 0

    def moved(self, change: Change) -> None:
        """A notifier: every change is on record before it is told."""
        if change.moment is Moment.BEFORE:
            self._write(Moved(change.side, change.status))

    def promised(self, side: Side, session: bytes = b"") -> None:
        """The right to run may move from now on.

        :param session: in postcopy: so that it can be resumed, should we be killed before we know.
        :raise NotHandedOver: it cannot be put on record, so it must not move."""
        if not self._write(Promised(side, session.hex())):
            raise NotHandedOver("the journal cannot be written, so the guest is not handed over")

    def postcopy(self, side: Side, session: bytes) -> None:
        """It is known that the right to run has moved, and the destination lacks pages."""
        self._write(Postcopy(side, session.hex()))

    def settled(self, side: Side) -> None:
        """It is known who has the right to run, and no postcopy goes on."""
        self._write(Settled(side))

    def stood(self, *, by_user: bool) -> None:
        """The guest's user has stopped it, or let it run."""
        self._write(Stood(by_user))

    def _write(self, record: Record) -> bool:
        """Append; False, and a line in the log, where that cannot be done."""
        self._records = [r for r in self._records if not _is_superseded(r, record)]
        self._records.append(record)
        try:
            _write_whole(self._fd, _line(record))
        except OSError as exc:
            log.error("the journal '%s' cannot be written: %s", self._path, exc.strerror)
            return False
        self._written += 1
        if self._written > COMPACT_RECORDS:
            try:
                self._rewrite()
            except OSError as exc:  # the old one is whole; the next record tries again
                log.warning("the journal '%s' grows: %s", self._path, exc.strerror)
        return True

    @property
    def _is_promised(self) -> bool:
        """Nobody has settled the last promise."""
        found: Found | None = None
        for record in self._records:
            found = _after(found, record)
        return found is not None and found.is_unknown

    def close(self, *, in_order: bool) -> None:
        """Give the directory back. Idempotent.

        :param in_order: the guest has ended with its control process, nothing is to be found,
            unless it may run on the other side."""
        if self._fd >= 0:
            if in_order and not self._is_promised:
                self._write(Closed())
            os.close(self._fd)
            self._fd = -1
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def _write_whole(fd: int, data: bytes) -> None:
    """All of it, or nothing.

    :raise OSError: nothing was written."""
    written = os.write(fd, data)
    if written < len(data):
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _is_superseded(old: Record, new: Record) -> bool:
    """A new migration forgets the one before it, on the same side."""
    if not isinstance(new, Moved):
        return isinstance(old, Stood) and isinstance(new, Stood)
    if isinstance(old, Moved):
        return old.side is new.side
    is_of_side = isinstance(old, Promised | Postcopy | Settled) and old.side is new.side
    return is_of_side and new.status is Status.SETUP


def _move(found: Found, side: Side, status: Status) -> None:
    """A side has entered a status."""
    if side is Side.SOURCE:
        found.source = status
    else:
        found.destination = status
    if status in (Status.SETUP, Status.COMPLETED):
        found.promised = None
    if status in (Status.SETUP, Status.COMPLETED, Status.FAILED):
        found.set_session(side, None)


def _after(found: Found | None, record: Record) -> Found | None:
    match record:
        case Began():
            return Found(record)
        case Closed():
            return None
        case Moved(side, status) if found is not None:
            _move(found, side, status)
        case Stood(by_user) if found is not None:
            found.is_stopped = by_user
        case Promised(side, session) if found is not None:
            found.promised = side
            if session:
                found.set_session(side, bytes.fromhex(session))
        case Postcopy(side, session) if found is not None:
            found.promised = None
            found.set_session(side, bytes.fromhex(session))
        case Settled(side) if found is not None:
            found.promised = None
            found.set_session(side, None)
            if side is Side.SOURCE and found.source is Status.COMPLETED:
                found.source = Status.NONE  # nobody had confirmed, and its user has let it run here
    return found


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc_pid_stat(5)); None: it has ended,
    whether somebody has waited for it or not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])
