"""The one table of migration parameters: name, type, default, range, unit, effect, help.

QMP, HMP, the command line, the documentation and every range error come from it. Names, ranges,
defaults and texts are QEMU 10.0's (qapi/migration.json, migration/options.c); those that QEMU has
given up, those that are newer, and ours (`x-`) are marked and listed in docs/extensions.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final

from engine.control.bitmapmapping import check_mapping, read_list, read_mapping, read_text
from engine.errors import UsageError, shown

UINT64_MAX: Final = 2**64 - 1
MIB: Final = 1024 * 1024
PAGE_BYTES: Final = 4096  #: QEMU's target page of x86-64 and arm64


class Kind(enum.Enum):
    """How a value is written; the value is QAPI's word for it.

    SIZE and UINT64 are one type in QAPI; a person may write the former with a suffix (200M)."""

    SIZE = "size"
    UINT64 = "uint64"
    UINT32 = "uint32_t"
    UINT16 = "uint16_t"
    UINT8 = "uint8_t"
    BOOL = "boolean"
    ENUM = "string"
    STRING_OR_NULL = "StrOrNull"
    STRINGS = "list of strings"
    MAPPING = "BitmapMigrationNodeAlias"


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

    :ivar default: the value until another is set.
    :ivar values: of an enum, those that this build takes.
    :ivar lacks: of an enum, those that QEMU takes and this build does not, yet.
    :ivar effective: when a change takes effect.
    :ivar range_text: QEMU's words for a value out of range, literally.
    :ivar acts: it changes what ramferry does today; others are kept and shown.
    :ivar is_hidden: queries show it only once it was set.
    :ivar deprecated: what to use instead; empty: not deprecated.
    :ivar hmp_unit: what HMP prints after the value.
    :ivar is_mib_in_hmp: HMP takes a number without suffix as MiB, not as bytes.
    """

    name: str
    kind: Kind
    default: Any
    low: int = 0
    high: int = UINT64_MAX
    values: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    unit: str = ""
    effective: str = "at once"
    range_text: str = ""
    help: str = ""
    acts: bool = False
    is_ours: bool = False
    is_hidden: bool = False
    deprecated: str = ""
    hmp_unit: str = ""
    is_mib_in_hmp: bool = False

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def is_quoted_in_hmp(self) -> bool:
        """HMP prints the value in single quotes."""
        return self.kind is Kind.STRING_OR_NULL

    def read(self, value: object) -> Any:
        """Take a value of QMP as it is kept; its range is not looked at.

        :raise UsageError: QEMU's text for a wrong type or a name that no enum has."""
        match self.kind:
            case Kind.BOOL:
                return self._typed(value, bool)
            case Kind.STRING_OR_NULL:
                return "" if value is None else self._typed(value, str)
            case Kind.MAPPING:
                return read_mapping(value, self.name)
            case Kind.STRINGS:
                return read_list(value, self.name, read_text)
            case Kind.ENUM:
                if self._typed(value, str) not in (*self.values, *self.lacks):
                    raise UsageError(
                        f"Parameter '{self.name}' does not accept value '{shown(value)}'"
                    )
                return value
        return self._number(value)

    def check(self, value: Any) -> None:
        """:raise UsageError: QEMU's text for what is out of range; `value` is of `read`."""
        if self.kind in _TYPE_MAX and not self.low <= value <= self.high:
            raise self.out_of_range()
        if self.kind is Kind.MAPPING:
            check_mapping(value)

    def refuse_lacking(self, value: Any) -> None:
        """:raise UsageError: QEMU has this value, this build has not."""
        if self.kind is Kind.ENUM and value in self.lacks:
            known = ", ".join(self.values)
            raise UsageError(
                f"this build of ramferry has no {self.name} '{value}' yet; it has: {known}"
            )

    def out_of_range(self) -> UsageError:
        """QEMU's text; it names the option with underscores."""
        if self.range_text.startswith("Parameter"):
            return UsageError(self.range_text)
        what = self.range_text or f"a value between {self.low} and {self.high}"
        return UsageError(f"Parameter '{self.attribute}' expects {what}")

    def _typed(self, value: object, type_: type) -> object:
        if not isinstance(value, type_):
            raise UsageError(
                f"Invalid parameter type for '{self.name}', expected: {self.kind.value}"
            )
        return value

    def _number(self, value: object) -> int:
        """QAPI reads 64 bits first, signed or not (-1 is the largest value), then narrows."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"Parameter '{self.name}' expects uint64")
        if not -(2**63) <= value <= UINT64_MAX:
            raise UsageError(f"Parameter '{self.name}' expects uint64")
        number = value % 2**64
        if number > _TYPE_MAX[self.kind]:
            raise UsageError(f"Parameter '{self.name}' expects {self.kind.value}")
        return number


@dataclass(frozen=True, slots=True)
class OldCommand:
    """A QMP command that QEMU gave up in 6.0 for a parameter, and that scripts still send.

    :ivar deprecated: what to use instead."""

    name: str
    parameter: str
    deprecated: str


OLD_COMMANDS: Final = (
    OldCommand("migrate_set_speed", "max-bandwidth", "migrate-set-parameters"),
    OldCommand("migrate_set_downtime", "downtime-limit", "migrate-set-parameters"),
    OldCommand("migrate-set-cache-size", "xbzrle-cache-size", "migrate-set-parameters"),
    OldCommand("query-migrate-cache-size", "xbzrle-cache-size", "query-migrate-parameters"),
)


def _integer_range(low: int | str, high: int) -> str:
    return f"an integer in the range of {low} to {high}"


PERCENT_1_99: Final = _integer_range(1, 99)
SIZE_MAX_TEXT: Final = "an integer in the range of 0 to <SIZE_MAX> bytes/second"
NEXT_MIGRATION: Final = "at the next migration"
NEXT_BATCH: Final = "at the next batch"
NEXT_ROUND: Final = "at the end of the round"
NEXT_CONNECTION: Final = "at the next connection"
ON_ARRIVAL: Final = "when the guest starts at the destination"

# ruff: noqa: E501
# One line a parameter, in QAPI's order, in which their types are checked; ours come last.
PARAMETERS: Final[tuple[Parameter, ...]] = (
    Parameter("announce-initial", Kind.SIZE, 50, high=100_000, unit="ms", hmp_unit="ms", effective=ON_ARRIVAL,
              help="first delay of the announcements after the guest starts at the destination"),
    Parameter("announce-max", Kind.SIZE, 550, high=100_000, unit="ms", hmp_unit="ms", effective=ON_ARRIVAL,
              help="longest delay between two announcements"),
    Parameter("announce-rounds", Kind.SIZE, 5, high=1000, effective=ON_ARRIVAL, help="number of announcements"),
    Parameter("announce-step", Kind.SIZE, 100, low=1, high=10_000, range_text="a value between 0 and 10000",
              unit="ms", hmp_unit="ms", effective=ON_ARRIVAL, help="increase of the delay after each announcement"),
    Parameter("compress-level", Kind.UINT8, 1, 0, 9, is_hidden=True, effective=NEXT_MIGRATION,
              deprecated="multifd-zlib-level or multifd-zstd-level", help="level of the old compression (zlib)"),
    Parameter("compress-threads", Kind.UINT8, 8, 1, 255, is_hidden=True, effective=NEXT_MIGRATION,
              deprecated="multifd-channels", help="channels of a migration with the old compression"),
    Parameter("compress-wait-thread", Kind.BOOL, True, is_hidden=True, effective=NEXT_MIGRATION,
              deprecated="multifd-compression", help="kept; wait for a free thread of the old compression"),
    Parameter("decompress-threads", Kind.UINT8, 2, 1, 255, is_hidden=True, effective=NEXT_MIGRATION,
              deprecated="multifd-channels", help="kept; threads of the old decompression"),
    Parameter("throttle-trigger-threshold", Kind.UINT8, 50, 1, 100, unit="%", acts=True, effective=NEXT_ROUND,
              range_text=_integer_range(1, 100),
              help="share of what was sent that must be dirty again to start or raise the throttle"),
    Parameter("cpu-throttle-initial", Kind.UINT8, 20, 1, 99, unit="%", acts=True, effective=NEXT_ROUND,
              range_text=PERCENT_1_99, help="first throttle of auto-converge"),
    Parameter("cpu-throttle-increment", Kind.UINT8, 10, 1, 99, unit="%", acts=True, effective=NEXT_ROUND,
              range_text=PERCENT_1_99, help="how much each step of auto-converge adds"),
    Parameter("cpu-throttle-tailslow", Kind.BOOL, False, acts=True, effective=NEXT_ROUND,
              help="make smaller steps of auto-converge near the end"),
    Parameter("tls-creds", Kind.STRING_OR_NULL, "", effective=NEXT_CONNECTION, help="id of the TLS credentials; empty: no TLS"),
    Parameter("tls-hostname", Kind.STRING_OR_NULL, "", effective=NEXT_CONNECTION, help="host name to verify; empty: the URI's"),
    Parameter("tls-authz", Kind.STRING_OR_NULL, "", effective=NEXT_CONNECTION, help="id of the authorization object"),
    Parameter("max-bandwidth", Kind.SIZE, 128 * MIB, unit="bytes/second", hmp_unit="bytes/second", is_mib_in_hmp=True,
              acts=True, range_text=SIZE_MAX_TEXT,
              help="limit of all channels together, lifted for the switchover; 0: unlimited"),
    Parameter("avail-switchover-bandwidth", Kind.SIZE, 0, unit="bytes/second", hmp_unit="bytes/second",
              is_mib_in_hmp=True, acts=True, effective=NEXT_ROUND, range_text=SIZE_MAX_TEXT,
              help="bandwidth to expect during the switchover; 0: as measured"),
    Parameter("downtime-limit", Kind.UINT64, 300, high=2_000_000, unit="ms", hmp_unit="ms", acts=True, effective=NEXT_ROUND,
              range_text="an integer in the range of 0 to (2000 * 1000) ms",
              help="longest time for which the guest may stand at the switchover"),
    Parameter("x-checkpoint-delay", Kind.UINT32, 20_000, high=2**32 - 1, unit="ms", hmp_unit="ms", help="COLO checkpoint period"),
    Parameter("multifd-channels", Kind.UINT8, 2, 1, 255, acts=True, effective=NEXT_MIGRATION,
              help="number of parallel channels, each with a worker process on either side"),
    Parameter("xbzrle-cache-size", Kind.SIZE, 64 * MIB, PAGE_BYTES, 2**63, unit="bytes", hmp_unit="bytes",
              range_text="a power of two no less than the target page size", acts=True, effective=NEXT_BATCH,
              help="size of the XBZRLE caches of all channels together"),
    Parameter("max-postcopy-bandwidth", Kind.SIZE, 0, unit="bytes/second", acts=True,
              help="limit of the background pages of postcopy; 0: unlimited"),
    Parameter("max-cpu-throttle", Kind.UINT8, 99, 1, 99, unit="%", acts=True, effective=NEXT_ROUND,
              range_text=_integer_range("cpu_throttle_initial", 99), help="largest throttle of auto-converge"),
    Parameter("multifd-compression", Kind.ENUM, "none", values=("none", "zlib", "zstd", "lz4", "auto"),
              acts=True, effective=NEXT_BATCH, help="codec of the channels; auto: what moves the most RAM per second"),
    Parameter("multifd-zlib-level", Kind.UINT8, 1, 0, 9, acts=True, effective=NEXT_BATCH, help="zlib level"),
    Parameter("multifd-qatzip-level", Kind.UINT8, 1, 1, 9, help="kept; there is no QATzip here"),
    Parameter("multifd-zstd-level", Kind.UINT8, 1, 0, 20, acts=True, effective=NEXT_BATCH, help="zstd level"),
    Parameter("block-bitmap-mapping", Kind.MAPPING, [], is_hidden=True, effective=NEXT_MIGRATION,
              help="checked and kept; there are no block devices here"),
    Parameter("x-vcpu-dirty-limit-period", Kind.UINT64, 1000, 1, 1000, unit="ms", hmp_unit="ms", effective=NEXT_MIGRATION,
              range_text="Parameter 'x-vcpu-dirty-limit-period' expects a value between 1 and 1000",
              help="period of the dirty limit"),
    Parameter("vcpu-dirty-limit", Kind.UINT64, 1, 1, unit="MB/s", hmp_unit="MB/s", effective=NEXT_MIGRATION,
              range_text="Parameter 'vcpu_dirty_limit' must be greater than 1 MB/s",
              help="dirty rate that a vCPU may have"),
    Parameter("mode", Kind.ENUM, "normal", values=("normal",), lacks=("cpr-reboot", "cpr-transfer"),
              effective=NEXT_MIGRATION, help="kind of migration"),
    Parameter("zero-page-detection", Kind.ENUM, "multifd", values=("none", "legacy", "multifd"), acts=True,
              effective=NEXT_MIGRATION, help="look for zero pages (legacy and multifd: in the workers) or not"),
    Parameter("direct-io", Kind.BOOL, False, effective=NEXT_MIGRATION, help="O_DIRECT for file migration"),
    Parameter("cpr-exec-command", Kind.STRINGS, [], is_hidden=True, effective=NEXT_MIGRATION,
              help="kept, as newer QEMUs do; nothing is executed"),
    Parameter("x-tracker", Kind.ENUM, "auto", is_ours=True, acts=True, effective=NEXT_MIGRATION,
              values=("auto", "uffd-wp", "guest-bitmap", "soft-dirty", "content-hash"),
              help="how dirty pages are found"),
    Parameter("x-multifd-port-base", Kind.UINT16, 0, high=2**16 - 1, is_ours=True, acts=True, effective=NEXT_MIGRATION,
              help="destination: the handover listens at this TCP port, channel i at base + 1 + i; 0: any free ports"),
    Parameter("x-heal-limit", Kind.UINT8, 8, high=255, is_ours=True, acts=True, effective=NEXT_MIGRATION,
              help="how many channels and workers may be made anew in one migration"),
    Parameter("multifd-lz4-acceleration", Kind.UINT16, 1, 1, 65535, is_ours=True, acts=True, effective=NEXT_BATCH,
              help="acceleration of lz4; larger is faster and leaves more"),
    Parameter("x-multifd-zstd-fast", Kind.UINT8, 0, 0, 50, is_ours=True, acts=True, effective=NEXT_BATCH,
              help="zstd's fast levels (its -1 to -50) instead of multifd-zstd-level; 0: off"),
    Parameter("x-compress-cpu-percent", Kind.UINT8, 100, 1, 100, unit="%", is_ours=True, acts=True, effective=NEXT_BATCH,
              help="share of this host's CPUs that auto may spend on encoding"),
    Parameter("x-elide-unchanged", Kind.ENUM, "auto", values=("off", "on", "auto"), is_ours=True, acts=True,
              effective=NEXT_BATCH, help="send no page again that is as it was sent, by its hash; auto: where that pays"),
    Parameter("x-on-stall", Kind.ENUM, "nothing", is_ours=True, acts=True, effective=NEXT_ROUND,
              values=("nothing", "throttle", "switchover", "cancel", "postcopy"),
              help="what to do, besides X_MIGRATION_STALLED, when the rounds do not shrink any more"),
)  # fmt: skip

BY_NAME: Final = {parameter.name: parameter for parameter in PARAMETERS}

#: The lines of HMP's `info migrate_parameters`, in QEMU's order. What is not here, QEMU prints not.
HMP_ORDER: Final = (
    "announce-initial", "announce-max", "announce-rounds", "announce-step",
    "throttle-trigger-threshold", "cpu-throttle-initial", "cpu-throttle-increment", "cpu-throttle-tailslow",
    "max-cpu-throttle", "tls-creds", "tls-hostname", "max-bandwidth", "avail-switchover-bandwidth",
    "downtime-limit", "x-checkpoint-delay", "multifd-channels", "multifd-compression",
    "zero-page-detection", "xbzrle-cache-size", "max-postcopy-bandwidth", "tls-authz",
    "block-bitmap-mapping", "x-vcpu-dirty-limit-period", "vcpu-dirty-limit", "mode", "direct-io",
)  # fmt: skip
