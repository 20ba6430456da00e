"""Lines of the human monitor: from bytes, to arguments, and answers as text."""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.hmp import views
from engine.control.hmp.expression import DEPTH_MAX, OPERATORS_MAX
from engine.control.hmp.parser import Argument, Kind, flag, parse_arguments
from engine.control.hmp.reader import WrongLine
from engine.control.hmp.telnet import LINE_BYTES_MAX, LineSplitter, Overlong

# -- bytes to lines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        pytest.param(b"stop\n", [b"stop"], id="nc"),
        pytest.param(b"stop\r\n", [b"stop"], id="telnet"),
        pytest.param(b"stop\r\0cont\r\0", [b"stop", b"cont"], id="telnet-raw"),
        pytest.param(b"a\rb\r", [b"a", b"b"], id="return-only"),
        pytest.param(b"\n\r\n\n", [b"", b"", b""], id="empty-lines"),
        pytest.param(b"stop", [], id="a-line-without-end-is-no-line"),
        pytest.param(b"\xff\xfb\x01\xff\xfd\x03stop\n", [b"stop"], id="will-and-do"),
        pytest.param(b"st\xff\xfa\x18\0vt\r\nquit\n\xff\xf0op\n", [b"stop"], id="subnegotiation"),
        pytest.param(b"\xff\xfa\xff\xff\xff\xf0a\n", [b"a"], id="escaped-in-subnegotiation"),
        pytest.param(b"a\xff\xffb\n", [b"a\xffb"], id="escaped-255"),
        pytest.param(b"quit\xff\xf4stop\n", [b"stop"], id="interrupt-takes-the-line-back"),
        pytest.param(b"quit\x03stop\n", [b"stop"], id="ctrl-c"),
        pytest.param(b"quit\x15stop\n", [b"stop"], id="ctrl-u"),
        pytest.param(b"stopp\x7f\n\x08\x08s\n", [b"stop", b"s"], id="backspace"),
        pytest.param("xü\x7fy\n".encode(), [b"xy"], id="backspace-takes-a-whole-character"),
        pytest.param(b"\x1bst\0op\x01\n", [b"stop"], id="other-control-characters"),
        pytest.param(b"a\tb\n", [b"a\tb"], id="a-tabulator-is-a-space"),
    ],
)  # fmt: skip
def test_lines_of_every_kind_of_client(data: bytes, lines: list[bytes]) -> None:
    assert LineSplitter().feed(data) == lines
    splitter = LineSplitter()
    assert [line for byte in data for line in splitter.feed(bytes([byte]))] == lines


def test_a_line_has_a_limit_and_the_next_one_is_good() -> None:
    splitter = LineSplitter()
    longest = b"x" * LINE_BYTES_MAX
    assert splitter.feed(longest + b"\n") == [longest]
    first, second = splitter.feed(longest + b"yz\x7f\nstop\n")
    assert isinstance(first, Overlong)
    assert second == b"stop"


def test_a_line_that_never_ends_is_not_kept() -> None:
    splitter = LineSplitter()
    for _ in range(20):
        assert splitter.feed(b"x" * 1000) == []
        assert splitter.waiting_bytes <= LINE_BYTES_MAX
    assert splitter.feed(b"\xff\xfa" + b"y" * 100_000) == []
    assert splitter.waiting_bytes <= LINE_BYTES_MAX


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_where_the_stream_is_cut_does_not_matter(data: bytes, cuts: list[int]) -> None:
    whole, pieces = LineSplitter(), LineSplitter()
    edges = [0, *sorted(cuts), len(data)]
    parts = [data[one:other] for one, other in itertools.pairwise(edges)]
    assert b"".join(parts) == data
    assert [line for part in parts for line in pieces.feed(part)] == whole.feed(data)


# -- lines to arguments --------------------------------------------------------------------------

MIGRATE: Final = (flag("detach", "d"), flag("resume", "r"), Argument("uri"))
NUMBERS: Final = (
    flag("ring", "r"),
    Argument("second", Kind.INTEGER),
    Argument("pages", Kind.INTEGER, True),
)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("uri", (False, False, "uri")),
        ("-d uri", (True, False, "uri")),
        ("-r uri", (False, True, "uri")),
        (" -d  -r uri ", (True, True, "uri")),
        ("-d-r uri", (True, True, "uri")),
        ("-duri", (True, False, "uri")),
        ('"a b"', (False, False, "a b")),
        (r'"\"\\\n\'\r"', (False, False, "\"\\\n'\r")),
        ('a"b', (False, False, 'a"b')),
        ('""', (False, False, "")),
        ("é☃", (False, False, "é☃")),
    ],
)
def test_flags_and_words(text: str, values: tuple[object, ...]) -> None:
    assert tuple(parse_arguments("migrate", MIGRATE, text).values()) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10), ("0x10", 16), ("010", 8), ("1+2*3", 7), ("(1+2)*3", 9), ("-7/2", None),
        ("+-7/2", -3), ("0-7%4", -3), ("2&3+1", 3), ("6|1", 7), ("6^2", 4), ("~0", -1),
        ("'a'", 97), ("0xffffffffffffffff", -1), ("9223372036854775807+1", -(2**63)),
        ("(" * (DEPTH_MAX - 1) + "5" + ")" * (DEPTH_MAX - 1), 5),
        ("1" + "+1" * OPERATORS_MAX, OPERATORS_MAX + 1),
    ],
)  # fmt: skip
def test_expressions(text: str, value: int | None) -> None:
    if value is None:  # a minus at the beginning is a flag
        with pytest.raises(WrongLine, match="calc: unsupported option -7"):
            parse_arguments("calc", NUMBERS, text)
    else:
        assert parse_arguments("calc", NUMBERS, text)["second"] == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unexpected end of expression"), ("1+", "unexpected end of expression"),
        ("x", "invalid char 'x' in expression"), ("1/0", "division by zero"),
        ("1%0", "division by zero"), ("(1", "')' expected"), ("$rip", "unknown register"),
        ("'", "character constant expected"), ("'a", "missing terminating ' character"),
        ("0x10000000000000000", "number too large"), ("9" * 5000, "number too large"),
        ("1 2 3", "calc: extraneous characters"),
        ("(" * 5000, f"may have {DEPTH_MAX} brackets"), ("~" * 5000, f"may have {DEPTH_MAX}"),
        ("1" + "*1" * (OPERATORS_MAX + 1), f"may have {OPERATORS_MAX} operators"),
        ("~1+" * OPERATORS_MAX + "1", f"may have {OPERATORS_MAX} operators"),
        ("(1)+" * OPERATORS_MAX + "1", f"may have {OPERATORS_MAX} operators"),
    ],
)  # fmt: skip
def test_wrong_expressions(text: str, says: str) -> None:
    with pytest.raises(WrongLine, match=re.escape(says)):
        parse_arguments("calc", NUMBERS, text)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Kind.SIZE, "100", 100 * 2**20), (Kind.SIZE, "100k", 102400),
        (Kind.SIZE, "1.5G", 3 * 2**29), (Kind.SIZE, "8B", 8),
        (Kind.SECONDS, "0.3", 0.3), (Kind.SECONDS, "30ms", 0.03),
        (Kind.SECONDS, "5us", 5e-6), (Kind.SECONDS, "-1", -1.0), (Kind.SWITCH, "on", True),
        (Kind.SWITCH, "off", False), (Kind.REST, "a  b ", "a  b "),
        (Kind.INTEGER32, "0xffffffff", 0xFFFFFFFF),
    ],
)  # fmt: skip
def test_other_kinds_of_values(kind: Kind, text: str, value: object) -> None:
    read = parse_arguments("x", [Argument("value", kind)], text)["value"]
    assert read == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (Kind.SIZE, "fast", "invalid size"), (Kind.SIZE, "-1", "invalid size"),
        (Kind.SIZE, "", "invalid size"), (Kind.SIZE, "9999999T", "invalid size"),
        (Kind.SECONDS, "x", "number expected"), (Kind.SECONDS, "1min", "Unknown unit suffix"),
        (Kind.SWITCH, "yes", "Expected 'on' or 'off'"), (Kind.SWITCH, "", "Expected 'on' or 'off'"),
        (Kind.REST, "", "x: string expected"), (Kind.TEXT, "", "x: string expected"),
        (Kind.TEXT, '"a', "unterminated string\nx: string expected"),
        (Kind.TEXT, '"a\\', "unterminated string\nx: string expected"),
        (Kind.TEXT, '"\\q"', r"unsupported escape code: '\q'" + "\nx: string expected"),
        (Kind.INTEGER32, "0x100000000", "'x' has failed: integer is for 32-bit values"),
    ],
)  # fmt: skip
def test_other_kinds_of_wrong_values(kind: Kind, text: str, says: str) -> None:
    with pytest.raises(WrongLine) as refused:
        parse_arguments("x", [Argument("value", kind)], text)
    assert str(refused.value) == says


@given(st.text(max_size=60))
def test_no_text_does_more_than_refuse(text: str) -> None:
    for declared in (MIGRATE, NUMBERS, *([Argument("value", kind)] for kind in Kind)):
        if any(one.kind is Kind.FLAG and not one.letter for one in declared):
            continue
        with contextlib.suppress(WrongLine):
            parse_arguments("x", declared, text)


# -- answers to text -----------------------------------------------------------------------------

RAM: Final = {
    "transferred": 438223, "remaining": 4096, "total": 67641344, "duplicate": 1, "normal": 2,
    "normal-bytes": 8192, "dirty-pages-rate": 7, "mbps": 12.345, "dirty-sync-count": 3,
    "postcopy-requests": 4, "page-size": 4096, "multifd-bytes": 2048, "pages-per-second": 5,
    "precopy-bytes": 1024, "downtime-bytes": 2048, "postcopy-bytes": 3072,
    "dirty-sync-missed-zero-copy": 6,
}  # fmt: skip
XBZRLE: Final = {
    "cache-size": 64, "bytes": 2048, "pages": 3, "cache-miss": 4, "cache-miss-rate": 0.5,
    "encoding-rate": 1.25, "overflow": 6,
}  # fmt: skip


def test_what_auto_does_is_a_line_of_info_migrate() -> None:
    auto = {"codec": "zstd:1", "reason": "because", "drain-bytes-per-second": 5_000_000}
    info = {"x-compression": {"channels": [{"index": 0, "auto": auto}]}}
    lines = list(views.migration(info, only_migratable=False))[7:]
    assert lines == ["auto compression: zstd:1 on 1 (because; 5 MB/s drained)"]


def test_every_line_of_info_migrate() -> None:
    info = {
        "blocked-reasons": ["non-migratable device: x"], "status": "active", "total-time": 1,
        "expected-downtime": 2, "downtime": 3, "setup-time": 4, "ram": RAM, "xbzrle-cache": XBZRLE,
        "cpu-throttle-percentage": 20, "dirty-limit-throttle-time-per-round": 21,
        "dirty-limit-ring-full-time": 22, "postcopy-blocktime": 23,
        "postcopy-vcpu-blocktime": [5, 1, 2, 3, 5],
        "socket-address": [{"type": "inet", "host": "h", "port": "1"},
                           {"type": "unix", "path": "/p"}],
        "x-tracker": "uffd-wp",
    }  # fmt: skip
    assert list(views.migration(info, only_migratable=False))[7:] == [
        "Outgoing migration blocked:", "  non-migratable device: x",
        "Migration status: active", "total time: 1 ms", "expected downtime: 2 ms",
        "downtime: 3 ms", "setup: 4 ms", "transferred ram: 427 kbytes", "throughput: 12.35 mbps",
        "remaining ram: 4 kbytes", "total ram: 66056 kbytes", "duplicate: 1 pages",
        "normal: 2 pages", "normal bytes: 8 kbytes", "dirty sync count: 3", "page size: 4 kbytes",
        "multifd bytes: 2 kbytes", "pages-per-second: 5", "dirty pages rate: 7 pages",
        "postcopy request count: 4", "precopy ram: 1 kbytes", "downtime ram: 2 kbytes",
        "postcopy ram: 3 kbytes", "Zero-copy-send fallbacks happened: 6 times",
        "cache size: 64 bytes", "xbzrle transferred: 2 kbytes", "xbzrle pages: 3 pages",
        "xbzrle cache miss: 4 pages", "xbzrle cache miss rate: 0.50",
        "xbzrle encoding rate: 1.25", "xbzrle overflow: 6", "cpu throttle percentage: 20",
        "dirty-limit throttle time: 21 us", "dirty-limit ring full time: 22 us",
        "postcopy blocktime: 23", "postcopy vcpu blocktime: 1-3,5",
        "socket address: [", "\ttcp:h:1", "\tunix:/p", "]",
    ]  # fmt: skip


def test_what_has_no_number_has_no_line() -> None:
    quiet = dict.fromkeys(RAM, 0) | {"mbps": 0.0}
    text = "\n".join(views.migration({"status": "completed", "ram": quiet}, only_migratable=False))
    for word in ("dirty pages rate", "postcopy", "precopy", "downtime", "Zero-copy", "blocked"):
        assert word not in text


@pytest.mark.parametrize(("flag", "text"), [(False, "off"), (True, "on")])
def test_only_migratable_is_the_one_global_that_may_change(flag: bool, text: str) -> None:
    assert list(views.migration({}, only_migratable=flag)) == [
        "globals:", "store-global-state: on", f"only-migratable: {text}", "send-configuration: on",
        "send-section-footer: on", "send-switchover-start: on", "clear-bitmap-shift: 18",
    ]  # fmt: skip


def test_only_a_failure_shows_its_reason() -> None:
    failed = list(views.migration({"status": "failed", "error-desc": "why"}, only_migratable=False))
    assert failed[-2:] == ["Migration status: failed (why)", "total time: 0 ms"]
    cancelled = list(
        views.migration({"status": "cancelled", "error-desc": "why"}, only_migratable=False)
    )
    assert cancelled[-2] == "Migration status: cancelled"


def test_our_members_are_lines_of_their_own() -> None:
    info = {
        "status": "active", "x-heals": 1, "x-downtime-phases": {"pause": 1, "send": 2},
        "x-channels": [{"index": 0, "bytes": 1}, {"index": 1, "bytes": 2}],
        "x-compression": {"tried-bytes": 3, "channels": [{"codec": "lz4", "batches": {"lz4": 4}}]},
    }  # fmt: skip
    assert list(views.extensions(info)) == [
        "x-heals: 1", "x-downtime-phases: pause=1 send=2",
        "x-channels[0]: index=0 bytes=1", "x-channels[1]: index=1 bytes=2",
        "x-compression: tried-bytes=3", "x-compression.channels[0]: codec=lz4 batches=(lz4=4)",
    ]  # fmt: skip


def test_dirty_rates_and_limits() -> None:
    measured = {
        "status": "measured", "start-time": 1, "calc-time": 2, "mode": "dirty-ring",
        "sample-pages": 0, "dirty-rate": 3, "vcpu-dirty-rate": [{"id": 0, "dirty-rate": 4}],
    }  # fmt: skip
    assert list(views.dirty_rate(measured)) == [
        "Status: measured", "Start Time: 1 (ms)", "Period: 2 (sec)", "Mode: dirty-ring",
        "Dirty rate: 3 (MB/s)", "vcpu[0], Dirty rate: 4 (MB/s)",
    ]  # fmt: skip
    limit = {"cpu-index": 1, "limit-rate": 2, "current-rate": 3}
    assert list(views.vcpu_dirty_limits([limit])) == [
        "vcpu[1], limit rate 2 (MB/s), current rate 3 (MB/s)"
    ]
    assert list(views.vcpu_dirty_limits([])) == ["Dirty page limit not enabled!"]
