"""Whether a migration comes to its end: when the guest may be stopped, and what if never."""

from __future__ import annotations

import logging
import time
from typing import Final

from engine.control import policy
from engine.control.host import Host
from engine.control.stall import OnStall, StallDetector, describe
from engine.control.statistics import MigrationNumbers

log = logging.getLogger("ramferry.source")

HELPS: Final = 0.75  #: a round that leaves more of what it sent brings the end no nearer


class Convergence:
    """One migration's estimates, learnt of its rounds."""

    def __init__(self, host: Host, numbers: MigrationNumbers) -> None:
        self._host, self._numbers = host, numbers
        self._model = policy.PauseModel()
        self._stall = StallDetector()
        self._sent_bytes = 0  #: of RAM, by the last round
        self.looks_ahead = False  #: the last round left about as much dirty as it sent
        self.is_forced = False  #: the switchover comes now, however long it takes
        self.is_pause_final = False  #: the guest cannot go on and be tracked: a pause is not undone

    def learn(self, done: policy.Round) -> None:
        """A round was acknowledged."""
        self._model.learn(done)
        self._sent_bytes = done.sent_bytes

    def left(self, dirty_bytes: int) -> None:
        """So much was dirty after that round."""
        self.looks_ahead = dirty_bytes > self._sent_bytes * HELPS

    def may_pause(self, dirty_bytes: int) -> bool:
        """Stopping the guest now ends inside the limit; `expected-downtime` is set."""
        settings = self._host.parameters
        predicted_ns = self._model.pause_ns(dirty_bytes, settings.avail_switchover_bandwidth)
        self._numbers.expected_downtime_ns = predicted_ns
        return policy.may_pause(
            predicted_ns,
            settings.downtime_limit * 1_000_000,
            is_running=self._host.guest.is_running,
            dirty_bytes=dirty_bytes,
        )

    def may_finish(self, stood_ns: int, dirty_bytes: int, *, is_running: bool) -> bool:
        """The guest stands for `stood_ns`: what is left still ends inside the limit."""
        settings = self._host.parameters
        left_ns = self._model.send_ns(dirty_bytes, settings.avail_switchover_bandwidth)
        fits = (
            self.is_forced
            or self.is_pause_final
            or policy.may_finish(
                stood_ns,
                left_ns + policy.HANDOVER_NS_DEFAULT,
                settings.downtime_limit * 1_000_000,
                is_running=is_running,
            )
        )
        self.looks_ahead = self.looks_ahead and fits  #: what was seen there did not last
        return fits

    def stalls(self, dirty_bytes: int) -> OnStall | None:
        """What `x-on-stall` wants, in the round in which a stall begins; the event says so."""
        if not self._stall.after_round(dirty_bytes, time.monotonic_ns()):
            return None
        action = OnStall(self._host.parameters.x_on_stall)
        log.warning("the rounds do not shrink any more; x-on-stall: %s", action.value)
        expected_ns, rounds = self._numbers.expected_downtime_ns, self._numbers.rounds
        self._host.emit("X_MIGRATION_STALLED", describe(action, dirty_bytes, expected_ns, rounds))
        return action
