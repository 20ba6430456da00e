"""Migration parameters: one table declares name, type, default, range, unit and help.

QMP, the command line, the documentation and every range error come from it. Names, ranges, defaults
and texts are QEMU 10.0's (qapi/migration.json, migration/options.c); names that begin with `x-` and
are marked as ours are listed in docs/extensions.md.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.errors import UsageError, shown
from engine.sizes import parse_size

UINT64_MAX: Final = 2**64 - 1


class Kind(enum.Enum):
    """How a value is written; the value is what QEMU's type error calls it."""

    SIZE = "uint64"
    UINT64 = "uint64 "
    UINT32 = "uint32_t"
    UINT16 = "uint16_t"
    UINT8 = "uint8_t"
    BOOL = "boolean"
    ENUM = "enum"
    STRING_OR_NULL = "StrOrNull"
    LIST = "array"


_TYPE_MAX: Final = {
    Kind.SIZE: UINT64_MAX,
    Kind.UINT64: UINT64_MAX,
    Kind.UINT32: 2**32 - 1,
    Kind.UINT16: 2**16 - 1,
    Kind.UINT8: 2**8 - 1,
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One line of the table.

    :ivar default: None means that the parameter is absent until it is set.
    :ivar range_text: QEMU's words for a value out of range, literally.
    :ivar acts: it changes what ramferry does today; others are kept and shown.
    """

    name: str
    kind: Kind
    default: Any
    low: int = 0
    high: int = UINT64_MAX
    values: tuple[str, ...] = ()
    unit: str = ""
    range_text: str = ""
    help: str = ""
    acts: bool = False
    is_ours: bool = False

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    def check(self, value: object) -> Any:
        """Return the value as it is kept.

        :raise UsageError: QEMU's text for a wrong type or a value out of range."""
        match self.kind:
            case Kind.BOOL:
                return self._typed(value, bool)
            case Kind.STRING_OR_NULL:
                return "" if value is None else self._typed(value, str)
            case Kind.LIST:
                return self._typed(value, list)
            case Kind.ENUM:
                if self._typed(value, str) not in self.values:
                    raise UsageError(
                        f"Parameter '{self.name}' does not accept value '{shown(value)}'"
                    )
                return value
        return self._number(value)

    def _typed(self, value: object, type_: type) -> object:
        if not isinstance(value, type_):
            expected = "string" if type_ is str and self.kind is Kind.ENUM else self.kind.value
            raise UsageError(
                f"Invalid parameter type for '{self.name}', expected: {expected.strip()}"
            )
        return value

    def _number(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"Invalid parameter type for '{self.name}', expected: integer")
        if value < 0 and self.kind in (Kind.SIZE, Kind.UINT64):
            value += 2**64  # QEMU reads -1 as the largest value
        if not 0 <= value <= _TYPE_MAX[self.kind]:
            raise UsageError(f"Parameter '{self.name}' expects {self.kind.value.strip()}")
        if not self.low <= value <= self.high:
            raise UsageError(self._out_of_range())
        return value

    def _out_of_range(self) -> str:
        if self.range_text.startswith("Parameter"):
            return self.range_text
        what = self.range_text or f"a value between {self.low} and {self.high}"
        return f"Parameter '{self.attribute}' expects {what}"


def _integer_range(low: int | str, high: int) -> str:
    return f"an integer in the range of {low} to {high}"


PERCENT_1_99: Final = _integer_range(1, 99)

# ruff: noqa: E501
# One line a parameter, in QEMU's order; ours come last.
PARAMETERS: Final[tuple[Parameter, ...]] = (
    Parameter("announce-initial", Kind.SIZE, 50, high=100_000, unit="ms",
              help="first delay of the announcements after the guest starts at the destination"),
    Parameter("announce-max", Kind.SIZE, 550, high=100_000, unit="ms",
              help="longest delay between two announcements"),
    Parameter("announce-rounds", Kind.SIZE, 5, high=1000, help="number of announcements"),
    Parameter("announce-step", Kind.SIZE, 100, low=1, high=10_000, range_text="a value between 0 and 10000", unit="ms",
              help="increase of the delay after each announcement"),
    Parameter("throttle-trigger-threshold", Kind.UINT8, 50, 1, 100, unit="%", acts=True,
              range_text=_integer_range(1, 100),
              help="share of what was sent that must be dirty again to start or raise the throttle"),
    Parameter("cpu-throttle-initial", Kind.UINT8, 20, 1, 99, unit="%", acts=True,
              range_text=PERCENT_1_99, help="first throttle of auto-converge"),
    Parameter("cpu-throttle-increment", Kind.UINT8, 10, 1, 99, unit="%", acts=True,
              range_text=PERCENT_1_99, help="how much each step of auto-converge adds"),
    Parameter("cpu-throttle-tailslow", Kind.BOOL, False, acts=True,
              help="make smaller steps of auto-converge near the end"),
    Parameter("tls-creds", Kind.STRING_OR_NULL, "", help="id of the TLS credentials; empty: no TLS"),
    Parameter("tls-hostname", Kind.STRING_OR_NULL, "", help="host name to verify; empty: the URI's"),
    Parameter("tls-authz", Kind.STRING_OR_NULL, "", help="id of the authorization object"),
    Parameter("max-bandwidth", Kind.SIZE, 128 * 1024 * 1024, unit="bytes/second", acts=True,
              range_text="an integer in the range of 0 to <SIZE_MAX> bytes/second",
              help="limit of all channels together, lifted for the switchover; 0: unlimited"),
    Parameter("avail-switchover-bandwidth", Kind.SIZE, 0, unit="bytes/second", acts=True,
              range_text="an integer in the range of 0 to <SIZE_MAX> bytes/second",
              help="bandwidth to expect during the switchover; 0: as measured"),
    Parameter("downtime-limit", Kind.UINT64, 300, high=2_000_000, unit="ms", acts=True,
              range_text="an integer in the range of 0 to (2000 * 1000) ms",
              help="longest time for which the guest may stand at the switchover"),
    Parameter("x-checkpoint-delay", Kind.UINT32, 20_000, unit="ms", help="COLO checkpoint period"),
    Parameter("multifd-channels", Kind.UINT8, 2, 1, 255, acts=True,
              help="number of parallel channels, each with a worker process on either side"),
    Parameter("xbzrle-cache-size", Kind.SIZE, 64 * 1024 * 1024, 4096, unit="bytes",
              range_text="a power of two no less than the target page size",
              help="size of the XBZRLE cache"),
    Parameter("max-postcopy-bandwidth", Kind.SIZE, 0, unit="bytes/second",
              help="limit of the background pages of postcopy; 0: unlimited"),
    Parameter("max-cpu-throttle", Kind.UINT8, 99, 1, 99, unit="%", acts=True,
              range_text=_integer_range("cpu_throttle_initial", 99),
              help="largest throttle of auto-converge"),
    Parameter("multifd-compression", Kind.ENUM, "none", values=("none",),
              help="compression of the channels"),
    Parameter("multifd-zlib-level", Kind.UINT8, 1, 0, 9, help="zlib level"),
    Parameter("multifd-qatzip-level", Kind.UINT8, 1, 1, 9, help="QATzip level"),
    Parameter("multifd-zstd-level", Kind.UINT8, 1, 0, 20, help="zstd level"),
    Parameter("block-bitmap-mapping", Kind.LIST, None, help="kept; there are no block devices here"),
    Parameter("x-vcpu-dirty-limit-period", Kind.UINT64, 1000, 1, 1000, unit="ms",
              range_text="Parameter 'x-vcpu-dirty-limit-period' expects a value between 1 and 1000",
              help="period of the dirty limit"),
    Parameter("vcpu-dirty-limit", Kind.UINT64, 1, 1, unit="MB/s",
              range_text="Parameter 'vcpu_dirty_limit' must be greater than 1 MB/s",
              help="dirty rate that a vCPU may have"),
    Parameter("mode", Kind.ENUM, "normal", values=("normal", "cpr-reboot", "cpr-transfer"),
              help="kind of migration"),
    Parameter("zero-page-detection", Kind.ENUM, "multifd", values=("none", "legacy", "multifd"),
              acts=True, help="look for zero pages (legacy and multifd: in the workers) or not"),
    Parameter("direct-io", Kind.BOOL, False, help="O_DIRECT for file migration"),
    Parameter("x-tracker", Kind.ENUM, "auto", is_ours=True, acts=True,
              values=("auto", "uffd-wp", "guest-bitmap", "soft-dirty", "content-hash"),
              help="how dirty pages are found"),
    Parameter("x-multifd-port-base", Kind.UINT16, 0, is_ours=True, acts=True,
              help="destination: the handover listens at this TCP port, channel i at base + 1 + i; "
                   "0: any free ports"),
    Parameter("x-heal-limit", Kind.UINT8, 8, is_ours=True, acts=True,
              help="how many channels and workers may be made anew in one migration"),
)  # fmt: skip

_BY_NAME: Final = {parameter.name: parameter for parameter in PARAMETERS}


class Parameters:
    """A snapshot of all values; `max-bandwidth` is `.max_bandwidth`. Immutable."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return self._values[attribute.replace("_", "-")]
        except KeyError:
            raise AttributeError(attribute) from None

    def replace(self, changes: Mapping[str, Any]) -> Parameters:
        return Parameters({**self._values, **changes})

    def as_dict(self) -> dict[str, Any]:
        """In the table's order, without those that are absent."""
        return {name: value for name, value in self._values.items() if value is not None}


def check_together(values: Parameters) -> None:
    """Rules between parameters.

    :raise UsageError: QEMU's text."""
    if values.max_cpu_throttle < values.cpu_throttle_initial:
        raise UsageError(_BY_NAME["max-cpu-throttle"]._out_of_range())
    size = values.xbzrle_cache_size
    if size & (size - 1):
        raise UsageError(_BY_NAME["xbzrle-cache-size"]._out_of_range())


class ParameterStore:
    """The current values; tells its subscribers after a change."""

    def __init__(self) -> None:
        self.values = Parameters({parameter.name: parameter.default for parameter in PARAMETERS})
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    def set(self, changes: Mapping[str, object]) -> None:
        """All or nothing.

        :raise UsageError: an unknown name, a wrong type or value; nothing was changed."""
        checked = {}
        for name, value in changes.items():
            parameter = _BY_NAME.get(name)
            if parameter is None:
                raise UsageError(f"Parameter '{shown(name)}' is unexpected")
            checked[name] = parameter.check(value)
        values = self.values.replace(checked)
        check_together(values)
        self.values = values
        for callback in self._subscribers:
            callback()


def parse_value(name: str, text: str) -> object:
    """A parameter's value as a person writes it (`--set max-bandwidth=200M`).

    :raise UsageError: an unknown name or a text that is no such value."""
    parameter = _BY_NAME.get(name)
    if parameter is None:
        known = ", ".join(known_names())
        raise UsageError(f"no parameter or capability '{shown(name)}'; known: {known}")
    match parameter.kind:
        case Kind.BOOL:
            return parse_switch(name, text)
        case Kind.SIZE:
            return parse_size(text)
        case Kind.ENUM | Kind.STRING_OR_NULL:
            return text
        case Kind.LIST:
            raise UsageError(f"The {name} parameter can only be set through QMP")
    try:
        return int(text)
    except ValueError as exc:
        raise UsageError(f"'{name}' takes a whole number, not '{shown(text)}'") from exc


def parse_switch(name: str, text: str) -> bool:
    """`on` or `off`.

    :raise UsageError: anything else."""
    if text in ("on", "off"):
        return text == "on"
    raise UsageError(f"'{name}' is on or off, not '{shown(text)}'")


def known_names() -> Iterable[str]:
    """Names of all parameters."""
    return _BY_NAME
