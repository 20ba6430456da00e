"""The token protocol under any order of loss, delay, reset, disarming and death.

The network of the model delivers, loses or delays each message; an answer arrives only on the
connection that its question came on. Nothing else than the two token classes decides.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import GuestError
from engine.guest.base import Handover
from engine.guest.token import DestinationToken, Kind, SourceToken

OURS = b"o" * 16
STRANGERS = [bytes([i]) * 16 for i in range(1, 4)]


class TokenMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.source = SourceToken()
        self.destination = DestinationToken()
        self.is_alive = True  # the destination guest
        self.is_closed = False  # its control process asked to close the listener
        self.is_another = False  # which never met our source, and what it took before lives on
        self.was_taken = False  # by the one before
        self.outcome: Handover | None = None
        self.connection = 0
        self.questions: list[tuple[int, Kind]] = []
        self.answers: list[tuple[int, Kind]] = []
        self.confirmed_by_source = False

    @property
    def is_listening(self) -> bool:
        """As DestinationEnd.close does it."""
        if not self.is_alive:
            return False
        asked_for = self.destination.taken is not None and not self.destination.confirmed
        return not self.is_closed or asked_for

    # -- the source's steps

    @precondition(lambda self: self.outcome is None and self.is_listening)
    @rule()
    def the_source_sends(self) -> None:
        self.questions.append((self.connection, self.source.next_message()))

    @precondition(lambda self: self.outcome is None)
    @rule()
    def the_source_makes_a_new_connection(self) -> None:
        self.connection += 1
        if not self.is_listening and not self.is_another:
            self.outcome = self.source.nobody_listens()

    @precondition(lambda self: self.outcome is None and self.answers)
    @rule(data=st.data())
    def an_answer_arrives(self, data: st.DataObject) -> None:
        connection, kind = self.answers.pop(
            data.draw(st.integers(min_value=0, max_value=len(self.answers) - 1))
        )
        if connection == self.connection:
            self.outcome = self.source.answered(kind)
            if self.outcome is Handover.TAKEN:
                self.questions.append((connection, Kind.CONFIRM))

    @precondition(lambda self: self.outcome is None)
    @rule()
    def the_deadline_passes(self) -> None:
        self.outcome = self.source.gave_up()

    # -- the network and strangers

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), is_lost=st.booleans())
    def a_question_arrives_or_is_lost(self, data: st.DataObject, is_lost: bool) -> None:
        connection, kind = self.questions.pop(
            data.draw(st.integers(min_value=0, max_value=len(self.questions) - 1))
        )
        if is_lost or not self.is_listening:
            return
        answer = self.destination.answer(kind, OURS)
        if answer is not None:
            self.answers.append((connection, answer))

    @precondition(lambda self: self.is_listening)
    @rule(kind=st.sampled_from(list(Kind)), session=st.sampled_from(STRANGERS))
    def a_stranger_speaks(self, kind: Kind, session: bytes) -> None:
        if kind is not Kind.TAKE or self.destination.armed != session:
            self.destination.answer(kind, session)

    # -- the destination's steps

    @precondition(lambda self: self.is_alive and not self.is_closed and not self.is_another)
    @rule()
    def it_is_armed(self) -> None:
        try:
            self.destination.arm(OURS)
        except GuestError:
            assert self.destination.taken is not None or OURS in self.destination.voided

    @precondition(lambda self: self.is_alive)
    @rule()
    def it_is_disarmed(self) -> None:
        assert self.destination.disarm() is (self.destination.taken is None)

    @precondition(lambda self: self.is_alive)
    @rule()
    def it_closes(self) -> None:
        self.destination.disarm()
        self.is_closed = True

    @rule()
    def it_dies(self) -> None:
        self.is_alive = False

    @precondition(lambda self: self.is_alive and self.outcome is None)
    @rule()
    def another_agent_listens_in_its_place(self) -> None:
        """A process that knows nothing of us outlives its agent."""
        self.was_taken = self.was_taken or self.destination.taken == OURS
        self.destination, self.is_another, self.is_closed = DestinationToken(), True, False
        self.questions.clear()

    # -- what must hold

    @invariant()
    def never_two_owners(self) -> None:
        source_owns = self.outcome is Handover.REFUSED or not self.source.is_sent
        assert not (source_owns and self.is_alive and self.destination.taken == OURS)
        assert not (source_owns and self.was_taken)

    @invariant()
    def never_none_unless_unknown_or_under_way_or_the_owner_died(self) -> None:
        if self.outcome is Handover.TAKEN:
            assert self.destination.taken == OURS or self.was_taken

    @invariant()
    def what_was_refused_is_never_taken_later(self) -> None:
        if self.outcome is Handover.REFUSED and self.is_listening:
            probe = DestinationToken(
                self.destination.armed,
                self.destination.taken,
                self.destination.confirmed,
                set(self.destination.voided),
                set(self.destination.known),
            )
            if not self.source.is_sent:
                return  # TAKE was never sent and never will be
            assert probe.answer(Kind.TAKE, OURS) is Kind.REFUSED


TestTokenMachine = TokenMachine.TestCase
TestTokenMachine.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


def test_a_flood_of_strangers_neither_fills_memory_nor_harms_the_right_session() -> None:
    token = DestinationToken()
    token.arm(OURS)
    for number in range(1, 5000):
        token.answer(Kind.HELLO, number.to_bytes(16, "big"))
        token.answer(Kind.ASK, number.to_bytes(16, "big"))

    assert len(token.voided) <= 1024
    assert len(token.known) <= 1024
    assert token.answer(Kind.ASK, bytes(15) + b"\xff") is Kind.VOID  # an old promise stands
    assert token.answer(Kind.ASK, b"\xff" * 16) is None  # no new one is given
    assert token.answer(Kind.TAKE, OURS) is Kind.TAKEN


def test_who_never_met_a_session_promises_nothing() -> None:
    """Another agent, which listened there before, may have taken it."""
    token = DestinationToken()

    assert token.answer(Kind.ASK, OURS) is None
    assert not token.void(OURS)
    assert token.answer(Kind.TAKE, OURS) is Kind.REFUSED  # it is sent once
    assert token.answer(Kind.ASK, OURS) is Kind.VOID
