"""Values of JSON's strings, numbers and words, with QEMU's texts for those that have none."""

from __future__ import annotations

import math
import re
from typing import Final

from engine.control.qmp import utf8
from engine.control.qmp.lexer import Kind, Mistake, quoted

_WORDS: Final[dict[bytes, object]] = {b"true": True, b"false": False, b"null": None}
_ESCAPES: Final = {
    ord(letter): value for letter, value in zip("\"'\\/bfnrt", "\"'\\/\b\f\n\r\t", strict=True)
}
_HEXADECIMAL: Final = re.compile(rb"[0-9a-fA-F]{4}")
_INTEGER_CHARACTERS_MAX: Final = len(str(-(2**63)))


def value_of(kind: Kind, text: bytes) -> object:
    """What a string, a number or a keyword says.

    :raise Mistake: nothing."""
    if kind is Kind.STRING:
        return _string(text)
    if kind is Kind.KEYWORD:
        if text not in _WORDS:
            raise Mistake(quoted("invalid keyword", text))
        return _WORDS[text]
    if kind is Kind.INTEGER and len(text) <= _INTEGER_CHARACTERS_MAX:
        value = int(text)
        if -(2**63) <= value < 2**64:
            return value
    number = float(text)
    if not math.isfinite(number):  # QEMU takes it, and answers what is no JSON
        raise Mistake("number out of range")
    return number


def _string(text: bytes) -> str:
    parts = []
    end = len(text) - 1  # the quote at the end
    position = 1
    while (escape := text.find(b"\\", position, end)) >= 0:
        parts.append(_plain(text[position:escape]))
        letter = text[escape + 1]
        if letter == ord("u"):
            character, position = _unicode(text, escape)
            parts.append(character)
        elif letter in _ESCAPES:
            parts.append(_ESCAPES[letter])
            position = escape + 2
        else:
            raise Mistake("invalid escape sequence in string")
    parts.append(_plain(text[position:end]))
    return "".join(parts)


def _plain(text: bytes) -> str:
    try:
        return utf8.decode(text)
    except ValueError:
        raise Mistake("invalid UTF-8 sequence in string") from None


def _unicode(text: bytes, position: int) -> tuple[str, int]:
    r"""The character of a `\u`, which may have two parts, and where it ends."""
    end = position + 6
    code = _code(text, position)
    if 0xD800 <= code < 0xDC00 and text[end : end + 2] == b"\\u":
        low = _code(text, end)
        if 0xDC00 <= low < 0xE000:
            code = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF)
            end += 6
    if code < 0 or not utf8.is_character(code):
        shown = utf8.decode_for_display(text[position:end])
        raise Mistake(f"{shown} is not a valid Unicode character")
    return chr(code), end


def _code(text: bytes, position: int) -> int:
    r"""The four digits after the `\u` at `position`; -1 if they are not there."""
    digits = _HEXADECIMAL.match(text, position + 2)
    return int(digits[0], 16) if digits else -1
