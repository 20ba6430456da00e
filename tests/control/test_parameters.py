"""The table of parameters against QEMU 10.0's: names, defaults, ranges and literal texts."""
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.parameter_table import HMP_ORDER, OLD_COMMANDS, Kind
from engine.control.parameters import (
    CHECKED_FIRST,
    MAPPED_RAM_TEXT,
    PARAMETERS,
    ZERO_COPY_TEXT,
    ParameterStore,
    hmp_lines,
    parse_hmp_value,
    parse_value,
)
from engine.errors import UsageError

#: What a fresh QEMU 10.0.2 answers to query-migrate-parameters, in its order.
QEMU_DEFAULTS: dict[str, Any] = {
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
    "throttle-trigger-threshold": 50,
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "cpu-throttle-tailslow": False,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "max-bandwidth": 134217728,
    "avail-switchover-bandwidth": 0,
    "downtime-limit": 300,
    "x-checkpoint-delay": 20000,
    "multifd-channels": 2,
    "xbzrle-cache-size": 67108864,
    "max-postcopy-bandwidth": 0,
    "max-cpu-throttle": 99,
    "multifd-compression": "none",
    "multifd-zlib-level": 1,
    "multifd-qatzip-level": 1,
    "multifd-zstd-level": 1,
    "x-vcpu-dirty-limit-period": 1000,
    "vcpu-dirty-limit": 1,
    "mode": "normal",
    "zero-page-detection": "multifd",
    "direct-io": False,
}

#: (name, smallest, largest, QEMU's text for what is outside).
RANGES = [
    ("announce-initial", 0, 100000, "Parameter 'announce_initial' expects a value between 0 and 100000"),
    ("announce-max", 0, 100000, "Parameter 'announce_max' expects a value between 0 and 100000"),
    ("announce-rounds", 0, 1000, "Parameter 'announce_rounds' expects a value between 0 and 1000"),
    ("announce-step", 1, 10000, "Parameter 'announce_step' expects a value between 0 and 10000"),
    ("throttle-trigger-threshold", 1, 100, "Parameter 'throttle_trigger_threshold' expects an integer in the range of 1 to 100"),
    ("cpu-throttle-increment", 1, 99, "Parameter 'cpu_throttle_increment' expects an integer in the range of 1 to 99"),
    ("downtime-limit", 0, 2000000, "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"),
    ("multifd-channels", 1, 255, "Parameter 'multifd_channels' expects a value between 1 and 255"),
    ("multifd-zlib-level", 0, 9, "Parameter 'multifd_zlib_level' expects a value between 0 and 9"),
    ("multifd-zstd-level", 0, 20, "Parameter 'multifd_zstd_level' expects a value between 0 and 20"),
    ("x-vcpu-dirty-limit-period", 1, 1000, "Parameter 'x-vcpu-dirty-limit-period' expects a value between 1 and 1000"),
]  # fmt: skip


MAPPED = {"node-name": "a", "alias": "b", "bitmaps": []}
EXTENSIONS = Path(__file__).parents[2] / "docs" / "extensions.md"


def refusal(changes: dict[str, object], store: ParameterStore | None = None) -> str:
    store = store or ParameterStore()
    before = store.values.as_dict()
    with pytest.raises(UsageError) as refused:
        store.set(changes)
    assert store.values.as_dict() == before
    return str(refused.value)


def test_a_fresh_process_answers_qemus_defaults_in_qemus_order() -> None:
    ours = {parameter.name for parameter in PARAMETERS if parameter.is_ours}
    shown = ParameterStore().values.as_dict()

    assert [name for name in shown if name not in ours] == list(QEMU_DEFAULTS)
    assert {name: shown[name] for name in QEMU_DEFAULTS} == QEMU_DEFAULTS


@pytest.mark.parametrize(("name", "low", "high", "text"), RANGES)
def test_both_borders_are_allowed(name: str, low: int, high: int, text: str) -> None:
    store = ParameterStore()
    for value in (low, high):
        store.set({name: value})
        assert store.values.as_dict()[name] == value


@pytest.mark.parametrize(("name", "low", "high", "text"), RANGES)
def test_outside_of_a_range_qemus_text_is_answered(
    name: str, low: int, high: int, text: str
) -> None:
    if low > 0:
        assert refusal({name: low - 1}) == text
    answer = refusal({name: high + 1})
    uint8 = f"Parameter '{name}' expects uint8_t"
    assert answer in (text, uint8)
    assert (answer == uint8) is (high == 255)  # 256 does not fit its type, and that is told first


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"nope": 1}, "Parameter 'nope' is unexpected"),
        ({"downtime-limit": "1"}, "Parameter 'downtime-limit' expects uint64"),
        ({"downtime-limit": True}, "Parameter 'downtime-limit' expects uint64"),
        ({"downtime-limit": 1.0}, "Parameter 'downtime-limit' expects uint64"),
        ({"max-bandwidth": -(2**63) - 1}, "Parameter 'max-bandwidth' expects uint64"),
        ({"x-multifd-port-base": 65536}, "Parameter 'x-multifd-port-base' expects uint16_t"),
        ({"x-heal-limit": 256}, "Parameter 'x-heal-limit' expects uint8_t"),
        ({"x-tracker": "none"}, "Parameter 'x-tracker' does not accept value 'none'"),
        ({"compress-level": 10}, "Parameter 'compress_level' expects a value between 0 and 9"),
        ({"compress-threads": 0}, "Parameter 'compress_threads' expects a value between 1 and 255"),
        ({"decompress-threads": 0}, "Parameter 'decompress_threads' expects a value between 1 and 255"),
        ({"compress-wait-thread": 1}, "Invalid parameter type for 'compress-wait-thread', expected: boolean"),
        ({"cpr-exec-command": "a"}, "Invalid parameter type for 'cpr-exec-command', expected: array"),
        ({"cpr-exec-command": ["a", 1]}, "Invalid parameter type for 'cpr-exec-command[1]', expected: string"),
        ({"mode": "cpr-reboot"}, "this build of ramferry has no mode 'cpr-reboot' yet; it has: normal"),
        ({"mode": "cpr-reboot", "nope": 1}, "Parameter 'nope' is unexpected"),
        ({"mode": "cpr-reboot", "announce-step": 0}, "Parameter 'announce_step' expects a value between 0 and 10000"),
        ({"direct-io": 1}, "Invalid parameter type for 'direct-io', expected: boolean"),
        ({"mode": "foo"}, "Parameter 'mode' does not accept value 'foo'"),
        ({"multifd-compression": "gzip"}, "Parameter 'multifd-compression' does not accept value 'gzip'"),
        ({"max-bandwidth": 2**64}, "Parameter 'max-bandwidth' expects uint64"),
        ({"xbzrle-cache-size": 5000}, "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"),
        ({"cpu-throttle-initial": 50, "max-cpu-throttle": 40}, "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"),
        ({"downtime-limit": 100, "multifd-channels": 0}, "Parameter 'multifd_channels' expects a value between 1 and 255"),
    ],
)  # fmt: skip
def test_all_or_nothing_with_qemus_texts(changes: dict[str, object], text: str) -> None:
    assert refusal(changes) == text


def test_minus_one_is_the_largest_size_as_in_qemu() -> None:
    store = ParameterStore()
    store.set({"max-bandwidth": -1})

    assert store.values.max_bandwidth == 2**64 - 1


def test_subscribers_are_told_once_a_set_and_not_of_refusals() -> None:
    store, told = ParameterStore(), []
    store.subscribe(lambda: told.append(store.values.downtime_limit))

    store.set({"downtime-limit": 7, "max-bandwidth": 1})
    with pytest.raises(UsageError):
        store.set({"downtime-limit": -5})

    assert told == [7]


ODD = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-5, max_value=300)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["none", "zlib", "normal", "legacy", "auto", 4096, 8192, 2**63])
    | st.lists(st.text(max_size=3) | st.just(MAPPED), max_size=2)
)
REQUEST = st.dictionaries(st.sampled_from([*(p.name for p in PARAMETERS), "nope"]), ODD, max_size=5)
CAPABILITY_SETS = st.sets(st.sampled_from(["zero-copy-send", "mapped-ram"]))


@given(st.lists(st.tuples(REQUEST, CAPABILITY_SETS), max_size=6))
def test_any_sequence_leaves_each_set_whole_or_unchanged(
    steps: list[tuple[dict[str, object], set[str]]],
) -> None:
    on: set[str] = set()
    store = ParameterStore(lambda name: name in on)
    for changes, now_on in steps:
        on = now_on
        before, expected = store.values, store.values.as_dict()
        try:
            store.set(changes)
        except UsageError:
            assert store.values is before
        else:
            read = {p.name: p.read(changes[p.name]) for p in PARAMETERS if p.name in changes}
            expected |= read
        assert store.values.as_dict() == expected
        assert_inside_the_table(store)


def assert_inside_the_table(store: ParameterStore) -> None:
    """Every value has its type and is in its range, also those that queries do not show."""
    for parameter in PARAMETERS:
        value = store.values.value(parameter.name)
        assert parameter.read(value) == value
        if type(value) is int:
            assert parameter.low <= value <= parameter.high
        if parameter.kind is Kind.ENUM:
            assert value in parameter.values
    size = store.values.xbzrle_cache_size
    assert size & (size - 1) == 0
    assert store.values.cpu_throttle_initial <= store.values.max_cpu_throttle


def test_every_default_is_inside_the_table() -> None:
    assert_inside_the_table(ParameterStore())


def test_mapped_ram_asks_for_the_values_of_now_as_qemus_does() -> None:
    on = {"mapped-ram"}
    store = ParameterStore(lambda name: name in on)
    store.set({"tls-creds": "a"})

    assert refusal({"downtime-limit": 1}, store) == MAPPED_RAM_TEXT
    assert refusal({"tls-creds": ""}, store) == MAPPED_RAM_TEXT
    assert "'announce_step'" in refusal({"announce-step": 0}, store)  # that is looked at before
    assert refusal({"vcpu-dirty-limit": 0}, store) == MAPPED_RAM_TEXT
    on.clear()
    store.set({"tls-creds": ""})


def test_zero_copy_asks_for_the_values_that_would_come_out() -> None:
    store = ParameterStore(lambda name: name == "zero-copy-send")

    assert refusal({"tls-creds": "a"}, store) == ZERO_COPY_TEXT
    assert refusal({"multifd-compression": "zlib"}, store) == ZERO_COPY_TEXT
    store.set({"tls-creds": "", "downtime-limit": 1})


def test_what_qemu_10_has_not_is_shown_once_it_was_set() -> None:
    store = ParameterStore()
    assert (store.values.compress_level, store.values.compress_wait_thread) == (1, True)
    hidden = {"cpr-exec-command": [], "compress-level": 1, "block-bitmap-mapping": []}
    assert hidden.keys().isdisjoint(store.values.as_dict())

    for name, value in hidden.items():
        store.set({name: value})
        assert store.values.as_dict()[name] == value
    order = [parameter.name for parameter in PARAMETERS]
    assert list(store.values.as_dict()) == sorted(store.values.as_dict(), key=order.index)


def test_what_is_deprecated_says_what_replaces_it(caplog: pytest.LogCaptureFixture) -> None:
    deprecated = {p.name: p.deprecated for p in PARAMETERS if p.deprecated}
    assert list(deprecated) == [
        "compress-level", "compress-threads", "compress-wait-thread", "decompress-threads"
    ]  # fmt: skip
    ParameterStore().set({"compress-level": 3})
    assert "multifd-zlib-level" in caplog.text


def test_the_documentation_has_every_parameter_that_qemu_10_has_not() -> None:
    lines = EXTENSIONS.read_text().partition("## Commands")[0].splitlines()
    for parameter in PARAMETERS:
        if parameter.is_ours or (parameter.is_hidden and parameter.kind is not Kind.MAPPING):
            default = str(parameter.default).lower()
            row = next(line for line in lines if line.startswith(f"| `{parameter.name}` |"))
            assert row.split("|")[2].strip().strip("`") == default, row
            assert ("deprecated" in row) is bool(parameter.deprecated), row


def test_the_orders_name_parameters_of_the_table_once() -> None:
    names = {parameter.name for parameter in PARAMETERS}
    for order in (CHECKED_FIRST, HMP_ORDER):
        assert len(set(order)) == len(order)
        assert set(order) <= names
    assert {command.parameter for command in OLD_COMMANDS} <= names
    assert all(parameter.help for parameter in PARAMETERS)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-bandwidth", "1", 2**20),
        ("avail-switchover-bandwidth", "1.5k", 1536),
        ("max-postcopy-bandwidth", "1", 1),
        ("downtime-limit", "1k", 1024),
        ("announce-max", "1.999k", 2047),
        ("multifd-channels", "0x4", 4),
        ("multifd-channels", "010", 8),
        ("direct-io", "y", True),
        ("direct-io", "no", False),
        ("tls-creds", "", ""),
        ("cpr-exec-command", "a 'b c'", ["a", "b c"]),
        ("x-tracker", "auto", "auto"),
        ("x-multifd-port-base", "4444", 4444),
    ],
)
def test_hmp_reads_values_as_qemu_does(name: str, text: str, value: object) -> None:
    assert parse_hmp_value(name, text) == value


def test_hmp_prints_ours_after_qemus() -> None:
    store = ParameterStore()
    store.set({"cpr-exec-command": ["a", "b c"], "compress-level": 3})

    lines = hmp_lines(store.values.as_dict())
    assert lines[len(HMP_ORDER) - 2 :][:4] == [  # no block-bitmap-mapping was set
        "direct-io: off",
        "compress-level: 3",
        "cpr-exec-command: a 'b c'",
        "x-tracker: auto",
    ]


def test_values_of_the_command_line_have_their_types() -> None:
    assert parse_value("max-bandwidth", "200M") == 200 * 2**20
    assert parse_value("direct-io", "on") is True
    assert parse_value("mode", "normal") == "normal"
    assert parse_value("downtime-limit", "30") == 30


@pytest.mark.parametrize(
    ("name", "text"), [("direct-io", "yes"), ("downtime-limit", "fast"), ("speed", "1")]
)
def test_wrong_values_of_the_command_line_are_refused(name: str, text: str) -> None:
    with pytest.raises(UsageError):
        parse_value(name, text)


def test_what_was_given_is_repeated_in_part_only() -> None:
    long = "~" * 5000
    refusals: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (parse_value, (long, "1")),
        (parse_value, ("max-bandwidth", long)),
        (parse_value, ("downtime-limit", "9" * 5000)),
        (parse_value, ("direct-io", long)),
        (ParameterStore().set, ({"mode": long},)),
        (ParameterStore().set, ({long: 1},)),
        (ParameterStore().set, ({"block-bitmap-mapping": [MAPPED | {"alias": long}]},)),
        (parse_hmp_value, (long, "1")),
        (parse_hmp_value, ("max-bandwidth", long)),
        (parse_hmp_value, ("downtime-limit", "9" * 5000 + "-")),
    ]
    for refuse, arguments in refusals:
        with pytest.raises(UsageError) as refused:
            refuse(*arguments)
        text = str(refused.value)
        assert max(text.count("~"), text.count("9")) <= 100


@pytest.mark.parametrize("text", ["1_0", " 4 ", "٤", "+4", "0x4", "", "4.0"])
def test_a_whole_number_is_written_with_ascii_digits(text: str) -> None:
    with pytest.raises(UsageError, match="takes a whole number"):
        parse_value("multifd-channels", text)


@pytest.mark.parametrize("name", ["tls-creds", "mode", "cpr-exec-command"])
def test_a_text_is_utf8(name: str) -> None:
    """A query must be able to show it."""
    with pytest.raises(UsageError, match="takes UTF-8"):
        parse_value(name, "a\udcffb")
