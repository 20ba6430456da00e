"""Decisions about rounds: when to stop the guest, how much to throttle it. Plain functions and
data.

Predicting the pause: QEMU divides the dirty bytes by the bandwidth of the last 100 ms. Over
loopback and with small remainders the fixed costs decide instead, so a round is modelled as `fixed
+ bytes / rate` and both parts are measured on the rounds of this migration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

#: A round must carry so much before its speed says something about the channel.
RATE_BYTES_MIN: Final = 4 * 1024 * 1024
#: Arm, token and resume, until they have been measured.
HANDOVER_NS_DEFAULT: Final = 3_000_000
#: A pause is entered only when its prediction leaves this part of the limit free.
MARGIN: Final = 0.8


@dataclass(frozen=True, slots=True)
class Round:
    """One acknowledged round.

    :ivar harvest_ns: collecting the dirty bits before it.
    :ivar send_ns: from the order to the last acknowledgement.
    :ivar sent_bytes: of RAM, however few they became on the wire.
    :ivar wire_bytes: payload and headers.
    """

    harvest_ns: int
    send_ns: int
    sent_bytes: int
    wire_bytes: int


@dataclass(slots=True)
class PauseModel:
    """What this migration has shown so far about its own speed; starts knowing nothing."""

    rate_bytes_per_s: float = 0.0  #: of RAM
    left: float = 1.0  #: on the wire of a byte of RAM
    fixed_ns: float = 5_000_000.0
    harvest_ns: float = 2_000_000.0

    def learn(self, done: Round) -> None:
        """Take one round into account: large ones tell the rate, small ones the fixed cost."""
        self.harvest_ns = 0.5 * self.harvest_ns + 0.5 * done.harvest_ns
        if done.sent_bytes >= RATE_BYTES_MIN or self.rate_bytes_per_s == 0.0:
            rate = done.sent_bytes * 1e9 / max(1, done.send_ns)
            known = self.rate_bytes_per_s or rate
            self.rate_bytes_per_s = 0.5 * known + 0.5 * rate
            if done.sent_bytes >= RATE_BYTES_MIN:
                self.left = 0.5 * self.left + 0.5 * done.wire_bytes / done.sent_bytes
            return
        fixed = done.send_ns - done.sent_bytes * 1e9 / max(1.0, self.rate_bytes_per_s)
        self.fixed_ns = 0.5 * self.fixed_ns + 0.5 * max(0.0, fixed)

    def send_ns(self, dirty_bytes: int, switchover_bytes_per_s: int) -> int:
        """Predict a round: `switchover_bytes_per_s` (avail-switchover-bandwidth, on the wire)
        replaces the measured rate when it is not 0."""
        rate = switchover_bytes_per_s / max(self.left, 1e-3) or self.rate_bytes_per_s
        if dirty_bytes and not rate:
            return 2**62
        return int(self.fixed_ns + (dirty_bytes * 1e9 / rate if dirty_bytes else 0))

    def pause_ns(self, dirty_bytes: int, switchover_bytes_per_s: int) -> int:
        """Predict the downtime if the guest were stopped now."""
        send_ns = self.send_ns(dirty_bytes, switchover_bytes_per_s)
        return int(self.harvest_ns) + send_ns + HANDOVER_NS_DEFAULT


def may_pause(predicted_ns: int, limit_ns: int, *, is_running: bool, dirty_bytes: int) -> bool:
    """Stop the guest now? A stopped guest loses nothing; a limit of 0 waits for nothing dirty."""
    if not is_running:
        return True
    if limit_ns == 0:
        return dirty_bytes == 0
    return predicted_ns <= limit_ns * MARGIN


def may_finish(spent_ns: int, predicted_ns: int, limit_ns: int, *, is_running: bool) -> bool:
    """The guest stands and the last harvest is in: go on, or let it run and try again?

    :param spent_ns: since the guest stood.
    :param predicted_ns: what is still to come.
    """
    return not is_running or limit_ns == 0 or spent_ns + predicted_ns <= limit_ns


@dataclass(frozen=True, slots=True)
class ThrottleSettings:
    """The `auto-converge` capability and its parameters (percent)."""

    is_on: bool
    trigger_threshold: int
    initial: int
    increment: int
    maximum: int
    tailslow: bool


@dataclass(slots=True)
class Trigger:
    """When the guest dirties too much: two rounds, not only one (migration_trigger_throttle)."""

    _high_rounds: int = 0

    def after_round(self, dirtied_bytes: int, sent_bytes: int, threshold_percent: int) -> bool:
        """True when more than `threshold_percent` of what was sent became dirty again, for the
        second time since it was last true."""
        if dirtied_bytes * 100 <= sent_bytes * threshold_percent:
            return False
        self._high_rounds = (self._high_rounds + 1) % 2
        return self._high_rounds == 0

    def reset(self) -> None:
        """Begin to count anew."""
        self._high_rounds = 0


@dataclass(slots=True)
class Throttle:
    """Auto-converge as QEMU does it (migration_trigger_throttle, mig_throttle_guest_down)."""

    percent: int = 0
    _trigger: Trigger = field(default_factory=Trigger)

    def after_round(self, dirtied_bytes: int, sent_bytes: int, settings: ThrottleSettings) -> int:
        """Take one round; return the percentage from now on.

        Two rounds in which more than `trigger_threshold` percent of what was sent became dirty
        again start or raise the throttle."""
        if not settings.is_on:
            self.percent = 0
            self._trigger.reset()
            return 0
        if not self._trigger.after_round(dirtied_bytes, sent_bytes, settings.trigger_threshold):
            return self.percent
        self.percent = min(settings.maximum, self._next(dirtied_bytes, sent_bytes, settings))
        return self.percent

    def _next(self, dirtied_bytes: int, sent_bytes: int, settings: ThrottleSettings) -> int:
        if self.percent == 0:
            return settings.initial
        if not settings.tailslow:
            return self.percent + settings.increment
        cpu_now = 100 - self.percent
        threshold = sent_bytes * settings.trigger_threshold / 100
        cpu_ideal = cpu_now * threshold / max(1, dirtied_bytes)
        return self.percent + max(1, min(int(cpu_now - cpu_ideal), settings.increment))
