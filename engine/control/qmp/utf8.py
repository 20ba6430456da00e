"""QEMU's modified UTF-8: NUL is two bytes, and what is no Unicode character is refused.

Surrogates, the non-characters (U+FDD0 to U+FDEF, and the last two of every plane) and forms that
are longer than needed are invalid; b"\\xc0\\x80", the long form of NUL, is not.
"""

from __future__ import annotations

import re
from typing import Final

_NUL: Final = b"\xc0\x80"
_NO_CHARACTER: Final = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
)
#: A first byte with as many of the bytes that it announces as there are.
_SEQUENCE: Final = re.compile(
    rb"[\x00-\xbf\xfe\xff]|[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}"
    rb"|[\xf0-\xf7][\x80-\xbf]{0,3}|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc\xfd][\x80-\xbf]{0,5}"
)


def is_character(code: int) -> bool:
    return code <= 0x10FFFF and not _NO_CHARACTER.match(chr(code))


def decode(data: bytes) -> str:
    """:raise ValueError: something in it is invalid."""
    text = data.replace(_NUL, b"\0").decode()
    if _NO_CHARACTER.search(text):
        raise ValueError("not a character")
    return text


def decode_for_display(data: bytes) -> str:
    """With U+FFFD for every sequence that is invalid."""
    return "".join(_shown(match[0]) for match in _SEQUENCE.finditer(data))


def _shown(sequence: bytes) -> str:
    try:
        return decode(sequence)
    except ValueError:
        return "\ufffd"
