"""Cut bytes into the tokens of JSON, as QEMU's lexer does, however their writer split them.

QEMU's JSON is RFC 8259 with strings in single quotes besides. A byte that no token can have is a
mistake, and ends the token that had begun; what follows is skipped until a byte that makes a new
beginning likely: a bracket, a brace, a colon, a comma, a control character but tab, 0xFE or 0xFF.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from engine.control.qmp import utf8
from engine.errors import WireError

TOKEN_BYTES_MAX: Final = 256 * 1024
ECHO_BYTES_MAX: Final = 1023  #: what QEMU's message of a mistake holds


class JsonError(WireError):
    """What came is no JSON, or more than is allowed; the text is QEMU's."""


class Mistake(JsonError):
    """It breaks the grammar."""

    def __init__(self, what: str) -> None:
        super().__init__(f"JSON parse error, {what}")


class LimitExceeded(JsonError):
    """It is too much of something."""

    def __init__(self, what: str) -> None:
        super().__init__(f"JSON {what} limit exceeded")


def quoted(what: str, token: bytes) -> str:
    """`what 'token'`, as much of it as a message holds; QEMU's end at a NUL."""
    echo = f"{what} '".encode() + token.partition(b"\0")[0] + b"'"
    return utf8.decode_for_display(echo[:ECHO_BYTES_MAX])


class Kind(enum.Enum):
    """Of tokens."""

    OPEN_OBJECT = "{"
    CLOSE_OBJECT = "}"
    OPEN_ARRAY = "["
    CLOSE_ARRAY = "]"
    COLON = ":"
    COMMA = ","
    STRING = "string"  #: with its quotes and escapes
    INTEGER = "integer"
    FLOAT = "float"
    KEYWORD = "keyword"


class State(enum.Enum):
    """What has been read of the token that has begun."""

    BETWEEN = enum.auto()  #: nothing; spaces are passed over
    SKIPPING = enum.auto()  #: there was a mistake
    DOUBLE_QUOTED = enum.auto()
    DOUBLE_QUOTED_ESCAPE = enum.auto()
    SINGLE_QUOTED = enum.auto()
    SINGLE_QUOTED_ESCAPE = enum.auto()
    MINUS = enum.auto()
    ZERO = enum.auto()
    DIGITS = enum.auto()
    POINT = enum.auto()
    FRACTION = enum.auto()
    EXPONENT = enum.auto()
    EXPONENT_SIGN = enum.auto()
    EXPONENT_DIGITS = enum.auto()
    LETTERS = enum.auto()


Token: TypeAlias = tuple[Kind, bytes]
Move: TypeAlias = State | Kind | None


@dataclass(frozen=True, slots=True)
class Rule:
    """How a state goes on.

    :ivar run: bytes that change nothing.
    :ivar moves: bytes that lead to another state, end a token as its last byte (a Kind), or are a
        mistake (None).
    :ivar otherwise: any other byte: a Kind ends the token before it, a State is entered and looks
        at it again, None makes it a mistake.
    """

    run: re.Pattern[bytes]
    moves: Mapping[int, Move] = field(default_factory=dict)
    otherwise: Move = None


def _moves(*pairs: tuple[bytes, Move]) -> dict[int, Move]:
    return {byte: move for several, move in pairs for byte in several}


_NOTHING: Final = re.compile(rb"")
_DIGITS: Final = re.compile(rb"[0-9]*")
_ANY: Final = bytes(range(0x20, 0xFE))

RULES: Final[Mapping[State, Rule]] = {
    State.BETWEEN: Rule(
        re.compile(rb"[ \t\r\n]*"),
        _moves(
            *((kind.value.encode(), kind) for kind in Kind if len(kind.value) == 1),
            (b'"', State.DOUBLE_QUOTED),
            (b"'", State.SINGLE_QUOTED),
            (b"-", State.MINUS),
            (b"0", State.ZERO),
            (b"123456789", State.DIGITS),
            (bytes(range(ord("a"), ord("z") + 1)), State.LETTERS),
        ),
    ),
    State.SKIPPING: Rule(
        re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]*"), otherwise=State.BETWEEN
    ),
    State.DOUBLE_QUOTED: Rule(
        re.compile(rb'[^\x00-\x1f\xfe\xff"\\]*'),
        _moves((b"\\", State.DOUBLE_QUOTED_ESCAPE), (b'"', Kind.STRING)),
    ),
    State.DOUBLE_QUOTED_ESCAPE: Rule(_NOTHING, _moves((_ANY, State.DOUBLE_QUOTED))),
    State.SINGLE_QUOTED: Rule(
        re.compile(rb"[^\x00-\x1f\xfe\xff'\\]*"),
        _moves((b"\\", State.SINGLE_QUOTED_ESCAPE), (b"'", Kind.STRING)),
    ),
    State.SINGLE_QUOTED_ESCAPE: Rule(_NOTHING, _moves((_ANY, State.SINGLE_QUOTED))),
    State.MINUS: Rule(_NOTHING, _moves((b"0", State.ZERO), (b"123456789", State.DIGITS))),
    State.ZERO: Rule(_NOTHING, _moves((b".", State.POINT), (b"0123456789", None)), Kind.INTEGER),
    State.DIGITS: Rule(_DIGITS, _moves((b".", State.POINT), (b"eE", State.EXPONENT)), Kind.INTEGER),
    State.POINT: Rule(_NOTHING, _moves((b"0123456789", State.FRACTION))),
    State.FRACTION: Rule(_DIGITS, _moves((b"eE", State.EXPONENT)), Kind.FLOAT),
    State.EXPONENT: Rule(
        _NOTHING,
        _moves((b"+-", State.EXPONENT_SIGN), (b"0123456789", State.EXPONENT_DIGITS)),
    ),
    State.EXPONENT_SIGN: Rule(_NOTHING, _moves((b"0123456789", State.EXPONENT_DIGITS))),
    State.EXPONENT_DIGITS: Rule(_DIGITS, {}, Kind.FLOAT),
    State.LETTERS: Rule(re.compile(rb"[a-z]*"), {}, Kind.KEYWORD),
}
_NO_TOKEN: Final = (State.BETWEEN, State.SKIPPING)

#: Tokens that are whole in what has come, and simple: what the rules would find, at once.
_WHOLE: Final = re.compile(
    rb"""[ \t\r\n]*(?:
        ([{}\[\]:,]) | ("[^\x00-\x1f\xfe\xff"\\]*") | (-?(?:0|[1-9][0-9]*)(?=[ \t\r\n,:\]}]))
        | ([a-z]+(?=[^a-z]))
    )""",
    re.VERBOSE,
)
_GROUPS: Final = (None, None, Kind.STRING, Kind.INTEGER, Kind.KEYWORD)
_STRUCTURE: Final = {kind.value.encode(): kind for kind in Kind if len(kind.value) == 1}


class Lexer:
    """Holds the bytes of a token that has not ended yet; at most TOKEN_BYTES_MAX and one."""

    def __init__(self) -> None:
        self._state = State.BETWEEN
        self._token = bytearray()

    @property
    def held_bytes(self) -> int:
        return len(self._token)

    @property
    def is_at_rest(self) -> bool:
        """Nothing of a token has been read that has not ended."""
        return self._state is State.BETWEEN

    def feed(self, data: bytes) -> Iterator[Token | JsonError]:
        """Take more bytes; yield every token that they end, in order.

        A mistake, or a token that is too long, is one JsonError in the sequence."""
        position = 0
        while True:
            if self._state is State.BETWEEN:
                while whole := _WHOLE.match(data, position, position + TOKEN_BYTES_MAX):
                    position = whole.end()
                    text = whole[whole.lastindex or 0]
                    yield _GROUPS[whole.lastindex or 0] or _STRUCTURE[text], text
            position = self._run(data, position)
            if len(self._token) > TOKEN_BYTES_MAX:
                self._end(State.BETWEEN)
                yield LimitExceeded("token size")
            elif position == len(data):
                return
            else:
                taken, ended = self._step(data[position])
                position += taken
                if ended is not None:
                    yield ended

    def _step(self, byte: int) -> tuple[int, Token | JsonError | None]:
        """Look at one byte; tell whether it was taken (0 or 1), and what ended by it."""
        rule = RULES[self._state]
        if byte not in rule.moves and rule.otherwise is not None:
            if isinstance(rule.otherwise, State):
                self._end(rule.otherwise)
                return 0, None
            return 0, (rule.otherwise, self._end(State.BETWEEN))
        self._token.append(byte)
        move = rule.moves.get(byte)
        if move is None:
            return 1, Mistake(quoted("stray", self._end(State.SKIPPING)))
        if isinstance(move, Kind):
            return 1, (move, self._end(State.BETWEEN))
        self._state = move
        return 1, None

    def _run(self, data: bytes, position: int) -> int:
        """Pass over the bytes that change nothing; return where they end."""
        room = len(data)
        if self._state not in _NO_TOKEN:
            room = position + TOKEN_BYTES_MAX + 1 - len(self._token)
        run = RULES[self._state].run.match(data, position, min(room, len(data)))
        assert run is not None  # it may be empty, so it always matches
        if self._state not in _NO_TOKEN:
            self._token += run[0]
        return run.end()

    def _end(self, state: State) -> bytes:
        """Enter `state` without a token; return what was read of the one before."""
        token = bytes(self._token)
        self._token.clear()
        self._state = state
        return token
