"""The table of parameters against QEMU 10.0's: names, defaults, ranges and literal texts."""
# ruff: noqa: E501

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.capabilities import CapabilityStore
from engine.control.parameters import PARAMETERS, ParameterStore, parse_value
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


def refusal(changes: dict[str, object]) -> str:
    store = ParameterStore()
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
        ({"downtime-limit": "1"}, "Invalid parameter type for 'downtime-limit', expected: integer"),
        ({"downtime-limit": True}, "Invalid parameter type for 'downtime-limit', expected: integer"),
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


@given(
    st.dictionaries(
        st.sampled_from([p.name for p in PARAMETERS]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        max_size=4,
    )
)
def test_whatever_is_set_the_values_stay_inside_the_table(changes: dict[str, object]) -> None:
    store = ParameterStore()
    before = store.values.as_dict()
    with contextlib.suppress(UsageError):
        store.set(changes)
        before = store.values.as_dict()
    assert store.values.as_dict() == before  # set whole, or not at all
    for parameter in PARAMETERS:
        value = store.values.as_dict().get(parameter.name)
        if type(value) is int:
            assert parameter.low <= value <= parameter.high


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


def test_capabilities_are_all_off_and_in_qemus_order() -> None:
    names = [entry["capability"] for entry in CapabilityStore().query()]

    assert names == [
        "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "events", "postcopy-ram", "x-colo",
        "release-ram", "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps",
        "postcopy-blocktime", "late-block-activate", "x-ignore-shared", "validate-uuid",
        "background-snapshot", "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit",
        "mapped-ram",
    ]  # fmt: skip
    assert not any(entry["state"] for entry in CapabilityStore().query())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"foo": True}, "Parameter 'capability' does not accept value 'foo'"),
        ({"multifd": True, "xbzrle": True}, "Multifd is not compatible with xbzrle"),
        ({"switchover-ack": True}, "Capability 'switchover-ack' requires capability 'return-path'"),
        (
            {"events": True, "zero-copy-send": True},
            "Zero copy only available for non-compressed non-TLS multifd migration",
        ),
        ({"postcopy-preempt": True}, "Postcopy preempt requires postcopy-ram"),
        ({"events": True, "postcopy-ram": True}, "this build of ramferry has no postcopy yet"),
    ],
)
def test_capabilities_in_conflict_change_nothing(changes: dict[str, bool], text: str) -> None:
    store = CapabilityStore()

    with pytest.raises(UsageError) as refused:
        store.set(changes)

    assert str(refused.value) == text
    assert not store.is_on("events")


def test_what_was_given_is_repeated_in_part_only() -> None:
    long = "~" * 5000
    refusals: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (parse_value, (long, "1")),
        (parse_value, ("max-bandwidth", long)),
        (parse_value, ("downtime-limit", "9" * 5000)),
        (parse_value, ("direct-io", long)),
        (ParameterStore().set, ({"mode": long},)),
        (ParameterStore().set, ({long: 1},)),
        (CapabilityStore().set, ({long: True},)),
    ]
    for refuse, arguments in refusals:
        with pytest.raises(UsageError) as refused:
            refuse(*arguments)
        text = str(refused.value)
        assert max(text.count("~"), text.count("9")) == 100
