"""The way of a migration to its destination, as its source sees it: parallel channels beside a main
one (`Conversation`), or a single stream (`streams.source.StreamRoute`)."""

from __future__ import annotations

from typing import Protocol

from engine import wire
from engine.control.agreement import Agreement
from engine.control.host import Host
from engine.control.senders import SenderGroup
from engine.guest.base import Guest, Handover


class Route(Protocol):
    """One migration's; owns its connections until `close`."""

    @property
    def can_heal(self) -> bool:
        """A lost channel can be made anew."""
        ...

    @property
    def is_one_way(self) -> bool:
        """Nobody answers: `completed` says that everything was taken, not that the guest runs."""
        ...

    @property
    def sent_bytes(self) -> int:
        """By control, beside the senders."""
        ...

    def open(self) -> None:
        """What can be done, and can fail, before `migrate` returns.

        :raise MigrationError: the migration has failed."""
        ...

    async def connect(self, host: Host, session: bytes) -> Agreement:
        """Reach the destination and agree, its guest's handover included.

        :raise MigrationError: it is not there, or does not fit.
        :raise TimeoutError: it does not answer."""
        ...

    async def listen(self, senders: SenderGroup) -> None:
        """Take what the destination says, as long as it may say something.

        :raise MigrationError: it failed, or is gone."""
        ...

    async def reopen(self, index: int, incarnation: int) -> str:
        """A fresh endpoint of a channel; never asked for where nothing can heal."""
        ...

    async def round_sent(self) -> None:
        """A round has left the senders: see to it that it cannot come back.

        :raise MigrationError: it was not taken."""
        ...

    async def check(self, guest: Guest) -> None:
        """Before the guest is stopped: is somebody there to take it?

        :raise MigrationError: no."""
        ...

    async def arm(self, senders: SenderGroup, state: bytes, rounds: int, runs: bool) -> None:
        """After the last round: send the device state; wait until the destination keeps every
        promise, if it can say so.

        :raise TimeoutError: no answer."""
        ...

    async def hand_over(self, guest: Guest, *, keeps_ram: bool) -> tuple[Handover, str]:
        """Pass the right to run; return what became of it, and the reason where it was not taken.

        :param keeps_ram: pages of the guest will still be read here (postcopy).
        :raise NotHandedOver: it never left the guest."""
        ...

    def stop_waiting(self) -> None:
        """Whoever waits for it wants an end: wait no more for somebody who may never be done.
        Idempotent."""
        ...

    async def break_off(self, last_word: wire.Abort | None) -> None:
        """Let the destination know that nothing more comes. Idempotent."""
        ...

    async def close(self) -> None:
        """Give everything back, once no sender is left. Idempotent."""
        ...
