"""Migration parameters: their current values, and what a set request may do to them.

The table is parameter_table.py; how people write and read values is parameter_text.py. The order of
checks is QEMU 10.0's: types and names in QAPI's order, then names that nobody knows, then ranges
and rules between parameters on what would come out (migrate_params_check, migration/options.c),
and last what this build has not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from engine.control.parameter_table import BY_NAME, PARAMETERS, Kind, Parameter
from engine.control.parameter_text import (
    hmp_lines,
    known_names,
    parse_hmp_value,
    parse_switch,
    parse_value,
)
from engine.errors import UsageError, shown

__all__ = [
    "PARAMETERS",
    "Kind",
    "Parameter",
    "ParameterStore",
    "Parameters",
    "hmp_lines",
    "known_names",
    "parse_hmp_value",
    "parse_switch",
    "parse_value",
]

log = logging.getLogger("ramferry.control")

ZERO_COPY_TEXT: Final = "Zero copy only available for non-compressed non-TLS multifd migration"
MAPPED_RAM_TEXT: Final = "Mapped-ram only available for non-compressed non-TLS multifd migration"

#: Ranges that are looked at before the rules between parameters and capabilities, in this order.
#: The first three are QEMU 9.0's; all others come after the rules, in the table's order.
CHECKED_FIRST: Final = (
    "compress-level",
    "compress-threads",
    "decompress-threads",
    "throttle-trigger-threshold",
    "cpu-throttle-initial",
    "cpu-throttle-increment",
    "max-bandwidth",
    "avail-switchover-bandwidth",
    "downtime-limit",
    "multifd-channels",
    "multifd-zlib-level",
    "multifd-qatzip-level",
    "multifd-zstd-level",
    "xbzrle-cache-size",
    "max-cpu-throttle",
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    "block-bitmap-mapping",
)
_CHECKED_LAST: Final = tuple(name for name in BY_NAME if name not in CHECKED_FIRST)


class Parameters:
    """A snapshot of all values; `max-bandwidth` is `.max_bandwidth`. Immutable."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, attribute: str) -> Any:
        name = attribute.replace("_", "-")
        if name not in BY_NAME:
            raise AttributeError(attribute)
        return self.value(name)

    def value(self, name: str) -> Any:
        """The value of a parameter of the table, also of one that queries do not show."""
        return self._values.get(name, BY_NAME[name].default)

    def is_set(self, name: str) -> bool:
        """Whether a parameter that queries do not show by default was set."""
        return name in self._values

    def replace(self, changes: Mapping[str, Any]) -> Parameters:
        return Parameters({**self._values, **changes})

    def as_dict(self) -> dict[str, Any]:
        """In the table's order, without those that are shown only once they were set."""
        return {name: self._values[name] for name in BY_NAME if name in self._values}

    @property
    def uses_tls(self) -> bool:
        return bool(self.value("tls-creds"))

    @property
    def uses_compression(self) -> bool:
        return bool(self.value("multifd-compression") != "none")


def _defaults() -> Parameters:
    return Parameters({one.name: one.default for one in PARAMETERS if not one.is_hidden})


def _check_one(name: str, values: Parameters) -> None:
    """A value's range, and the rules that QEMU checks together with it."""
    parameter, value = BY_NAME[name], values.value(name)
    parameter.check(value)
    if name == "xbzrle-cache-size" and value & (value - 1):
        raise parameter.out_of_range()
    if name == "max-cpu-throttle" and value < values.value("cpu-throttle-initial"):
        raise parameter.out_of_range()


def check_together(values: Parameters, current: Parameters, is_on: Callable[[str], bool]) -> None:
    """Every range and every rule, in QEMU's order, on what would come out.

    :param current: mapped-ram asks for these, as in QEMU 10.0: with compression or TLS it refuses
        every change, also one that would end them; turn the capability off first.
    :param is_on: whether a capability is on.
    :raise UsageError: QEMU's text."""
    for name in CHECKED_FIRST:
        _check_one(name, values)
    if is_on("zero-copy-send") and (values.uses_compression or values.uses_tls):
        raise UsageError(ZERO_COPY_TEXT)
    if is_on("mapped-ram") and (current.uses_compression or current.uses_tls):
        raise UsageError(MAPPED_RAM_TEXT)
    for name in _CHECKED_LAST:
        _check_one(name, values)


def _none_is_on(capability: str) -> bool:
    """For a store without capabilities beside it."""
    return False


class ParameterStore:
    """The current values; tells its subscribers after a change."""

    def __init__(self, is_on: Callable[[str], bool] = _none_is_on) -> None:
        self.values = _defaults()
        self._is_on = is_on
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    def set(self, changes: Mapping[str, object]) -> None:
        """All or nothing; QEMU's order decides which error is told.

        :raise UsageError: a wrong type, an unknown name, a value out of range or not in this build;
            nothing was changed."""
        read = {name: one.read(changes[name]) for name, one in BY_NAME.items() if name in changes}
        for name in changes:
            if name not in BY_NAME:
                raise UsageError(f"Parameter '{shown(name)}' is unexpected")
        values = self.values.replace(read)
        check_together(values, self.values, self._is_on)
        for name, value in read.items():
            BY_NAME[name].refuse_lacking(value)
        self.values = values
        for name in read:
            if BY_NAME[name].deprecated:
                log.warning("%s is deprecated; instead: %s", name, BY_NAME[name].deprecated)
        for callback in self._subscribers:
            callback()
