"""Values of parameters as people write and read them: on the command line and in HMP.

HMP's grammar is QEMU's (hmp_migrate_set_parameter, qapi/string-input-visitor.c, qemu_strtosz); the
command line's is ours: sizes as engine.sizes has them, whole numbers, `on` and `off`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, Final

from engine.control.parameter_table import (
    BY_NAME,
    HMP_ORDER,
    MIB,
    PARAMETERS,
    UINT64_MAX,
    Kind,
    Parameter,
)
from engine.errors import UsageError, shown
from engine.sizes import parse_size

INT64_MAX: Final = 2**63 - 1
NUMBER_CHARACTERS_MAX: Final = 100  #: longer ones are no number; Python's int() has a limit, too
HMP_SCALES: Final = {letter: 1024**power for power, letter in enumerate("bkmgtpe")}
HMP_ON: Final = ("on", "yes", "true", "y")
HMP_OFF: Final = ("off", "no", "false", "n")
SIZE_HINT: Final = (
    "\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-"
    "\nand exabytes, respectively."
)
_HMP_SIZE: Final = re.compile(r"\+?(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?([bkmgtpe]?)", re.I | re.A)
_HMP_HEX: Final = re.compile(r"\+?0x([0-9a-f]+)", re.I | re.A)
_HMP_NEGATIVE: Final = re.compile(r"-[0-9]+", re.A)
_HMP_INTEGER: Final = re.compile(r"([+-]?)(?:0x([0-9a-f]+)|(0[0-7]*)|([1-9][0-9]*))", re.I | re.A)
_WHOLE_NUMBER: Final = re.compile(r"-?[0-9]{1,20}")


def known_names() -> Iterable[str]:
    """Names of all parameters."""
    return BY_NAME


def parse_value(name: str, text: str) -> object:
    """A parameter's value as a person writes it (`--set max-bandwidth=200M`).

    :raise UsageError: an unknown name or a text that is no such value."""
    parameter = BY_NAME.get(name)
    if parameter is None:
        known = ", ".join(known_names())
        raise UsageError(f"no parameter or capability '{shown(name)}'; known: {known}")
    match parameter.kind:
        case Kind.BOOL:
            return parse_switch(name, text)
        case Kind.SIZE:
            return parse_size(text)
        case Kind.ENUM | Kind.STRING_OR_NULL:
            return _unicode(name, text)
        case Kind.STRINGS:
            return _split(_unicode(name, text))
        case Kind.MAPPING:
            raise UsageError(f"The {name} parameter can only be set through QMP")
    if not _WHOLE_NUMBER.fullmatch(text):
        raise UsageError(f"'{name}' takes a whole number, not '{shown(text)}'")
    return int(text)


def _unicode(name: str, text: str) -> str:
    """:raise UsageError: bytes of the command line that are no UTF-8; no answer could hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"'{name}' takes UTF-8, not '{shown(text)}'") from None
    return text


def parse_switch(name: str, text: str) -> bool:
    """`on` or `off`.

    :raise UsageError: anything else."""
    if text in ("on", "off"):
        return text == "on"
    raise UsageError(f"'{name}' is on or off, not '{shown(text)}'")


def parse_hmp_value(name: str, text: str) -> object:
    """The value of HMP's `migrate_set_parameter NAME VALUE`, as ParameterStore.set takes it.

    :raise UsageError: QEMU's text for an unknown name or a text that is no such value; ranges are
        checked by ParameterStore.set."""
    parameter = BY_NAME.get(name)
    if parameter is None:
        raise UsageError(f"invalid parameter value: {shown(name)}")
    match parameter.kind:
        case Kind.BOOL:
            if text not in (*HMP_ON, *HMP_OFF):
                raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")
            return text in HMP_ON
        case Kind.SIZE | Kind.UINT64:
            return _hmp_size_of(parameter, text)
        case Kind.UINT32 | Kind.UINT16 | Kind.UINT8:
            return _hmp_integer(parameter, text)
        case Kind.STRINGS:
            return _split(text)
        case Kind.MAPPING:
            raise UsageError(f"The {name} parameter can only be set through QMP")
    return text


def _hmp_size_of(parameter: Parameter, text: str) -> int:
    size = qemu_size(text, MIB if parameter.is_mib_in_hmp else 1)
    if parameter.is_mib_in_hmp or parameter.name == "xbzrle-cache-size":
        invalid = f"Invalid size {shown(text)}"
        if size is not None and size > INT64_MAX and size <= UINT64_MAX:
            raise UsageError(invalid)
        if parameter.is_mib_in_hmp and (size is None or not 0 <= size <= INT64_MAX):
            raise UsageError(invalid)
    if size is None:
        raise UsageError(
            f"Parameter '{parameter.name}' expects a non-negative number below 2^64{SIZE_HINT}"
        )
    if not 0 <= size <= UINT64_MAX:
        raise UsageError(f"Value '{shown(text)}' is out of range for parameter '{parameter.name}'")
    return size


def qemu_size(text: str, scale: int) -> int | None:
    """Bytes by QEMU's grammar, rounded to the nearest; -1 for what is negative, None for what is no
    size.

    :param scale: what a number without suffix counts."""
    if len(text) > NUMBER_CHARACTERS_MAX:
        return None
    text = text.lstrip()
    if match := _HMP_HEX.fullmatch(text):
        return int(match[1], 16) * scale
    if _HMP_NEGATIVE.fullmatch(text):
        return -1
    match = _HMP_SIZE.fullmatch(text)
    if match is None:
        return None
    whole, fraction = match[1] or "0", match[2] or ""
    scale = HMP_SCALES[match[3].lower()] if match[3] else scale
    if scale == 1 and fraction.strip("0"):
        return None  # there is no part of a byte
    parts: int = 10 ** len(fraction)
    return (2 * int(whole + fraction) * scale + parts) // (2 * parts)


def _hmp_integer(parameter: Parameter, text: str) -> int:
    """As strtoull reads it: decimal, 0x or 0 in front, a sign wraps around."""
    match = _HMP_INTEGER.fullmatch(text.lstrip()) if len(text) <= NUMBER_CHARACTERS_MAX else None
    if match is None:
        raise UsageError(f"Parameter '{parameter.name}' expects uint64")
    sign, hexadecimal, octal, decimal = match.groups()
    if hexadecimal is not None:
        number = int(hexadecimal, 16)
    else:
        number = int(octal, 8) if octal is not None else int(decimal)
    if number > UINT64_MAX:
        raise UsageError(f"Parameter '{parameter.name}' expects uint64")
    return 2**64 - number if sign == "-" and number else number


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise UsageError(f"'{shown(text)}' is no command line: {exc}") from exc


def hmp_lines(shown_values: Mapping[str, Any]) -> list[str]:
    """HMP's `info migrate_parameters`: QEMU's lines in its order, then those QEMU has not.

    :param shown_values: `Parameters.as_dict()`."""
    further = [one.name for one in PARAMETERS if one.is_ours or one.is_hidden]
    names = (*HMP_ORDER, *(name for name in further if name not in HMP_ORDER))
    lines = []
    for name in names:
        if name in shown_values:
            lines += _hmp_lines_of(BY_NAME[name], shown_values[name])
    return lines


def _hmp_lines_of(parameter: Parameter, value: Any) -> list[str]:
    if parameter.kind is Kind.MAPPING:
        lines = [f"{parameter.name}:"]
        for node in value:
            lines.append(f"  '{node['node-name']}' -> '{node['alias']}'")
            lines += [f"    '{one['name']}' -> '{one['alias']}'" for one in node["bitmaps"]]
        return lines
    if parameter.kind is Kind.STRINGS:
        return [f"{parameter.name}: {shlex.join(value)}"]
    if parameter.kind is Kind.BOOL:
        value = "on" if value else "off"
    if parameter.is_quoted_in_hmp:
        value = f"'{value}'"
    unit = f" {parameter.hmp_unit}" if parameter.hmp_unit else ""
    return [f"{parameter.name}: {value}{unit}"]
