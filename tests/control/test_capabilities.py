"""The table of capabilities: QEMU's names, order, conflicts and literal texts.

tests/conformance/test_capabilities.py asks a real QEMU the same; here is what it cannot be asked.
"""
# ruff: noqa: E501

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.capabilities import (
    CAPABILITIES,
    CHECKS,
    DIRTY_LIMIT_CONFLICT,
    DIRTY_LIMIT_REFUSAL,
    CapabilityStore,
    Surroundings,
    no_dirty_limit,
)
from engine.control.parameters import ZERO_COPY_TEXT, ParameterStore
from engine.errors import UsageError

NAMES = [capability.name for capability in CAPABILITIES]
SETTABLE = [one.name for one in CAPABILITIES if not one.refusal and one.name != "dirty-limit"]


def anything_goes(capability: str) -> None:
    """A guest that can do whatever it is asked for."""


def first_text(*on: str, is_listening: bool = False) -> str | None:
    """What the checks say about a set, all of it newly on."""
    wanted = {name: name in on for name in NAMES}
    before = dict.fromkeys(NAMES, False)
    around = Surroundings(before, ParameterStore().values, is_listening, anything_goes)
    return next((text for check in CHECKS if (text := check(wanted, around))), None)


def refusal(store: CapabilityStore, **changes: bool) -> str:
    before = store.query()
    with pytest.raises(UsageError) as refused:
        store.set({name.replace("_", "-"): state for name, state in changes.items()})
    assert store.query() == before
    return str(refused.value)


def test_all_are_off_and_in_qemus_order() -> None:
    shown = CapabilityStore().query()

    assert [entry["capability"] for entry in shown] == [
        "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "events", "postcopy-ram", "x-colo",
        "release-ram", "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps",
        "postcopy-blocktime", "late-block-activate", "x-ignore-shared", "validate-uuid",
        "background-snapshot", "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit",
        "mapped-ram",
    ]  # fmt: skip
    assert not any(entry["state"] for entry in shown)


@pytest.mark.parametrize(
    "name",
    [
        "pause-before-switchover", "return-path", "validate-uuid", "late-block-activate",
        "zero-blocks", "events", "multifd", "auto-converge", "release-ram", "compress",
    ],
)  # fmt: skip
def test_what_is_free_of_conflicts_can_be_set(name: str) -> None:
    store = CapabilityStore()

    store.set({name: True})

    assert store.is_on(name)
    assert {"capability": name, "state": True} in store.query()


@pytest.mark.parametrize("name", [one.name for one in CAPABILITIES if one.refusal])
def test_what_this_build_has_not_is_refused_in_one_line_of_ours(name: str) -> None:
    text = refusal(CapabilityStore(), events=True, **{name: True})

    assert "ramferry" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"foo": True}, "Parameter 'capability' does not accept value 'foo'"),
        ({"multifd": True, "xbzrle": True}, "Multifd is not compatible with xbzrle"),
        ({"switchover-ack": True}, "Capability 'switchover-ack' requires capability 'return-path'"),
        ({"events": True, "zero-copy-send": True}, ZERO_COPY_TEXT),
        ({"postcopy-preempt": True}, "Postcopy preempt requires postcopy-ram"),
        (
            {"events": True, "x-colo": True},
            "this build of ramferry has no fault tolerance (COLO) yet",
        ),
    ],
)
def test_capabilities_in_conflict_change_nothing(changes: dict[str, bool], text: str) -> None:
    assert refusal(CapabilityStore(), **changes) == text


@pytest.mark.parametrize(
    ("on", "text"),
    [
        (("postcopy-ram", "x-ignore-shared", "multifd"), "Postcopy is not compatible with ignore-shared"),
        (("postcopy-ram", "multifd", "background-snapshot"), "Postcopy is not yet compatible with multifd"),
        (("background-snapshot", "postcopy-ram", "zero-copy-send"), "Background-snapshot is not compatible with postcopy-ram"),
        (("background-snapshot", "compress", "xbzrle"), "Background-snapshot is not compatible with compress"),
        (("zero-copy-send", "multifd", "compress"), ZERO_COPY_TEXT),
        (("postcopy-preempt", "postcopy-ram", "compress"), "Postcopy preempt not compatible with compress"),
        (("multifd", "compress", "switchover-ack"), "Multifd is not compatible with compress"),
        (("dirty-limit", "auto-converge", "compress", "xbzrle"), DIRTY_LIMIT_CONFLICT),
        (("compress", "xbzrle", "mapped-ram"), "Compression is not compatible with xbzrle"),
        (("mapped-ram", "xbzrle", "postcopy-ram"), "Mapped-ram migration is incompatible with xbzrle"),
        (("mapped-ram", "compress", "postcopy-ram"), "Mapped-ram migration is incompatible with compression"),
        (("mapped-ram", "postcopy-ram"), "Mapped-ram migration is incompatible with postcopy"),
    ],
)  # fmt: skip
def test_qemus_order_decides_which_conflict_is_told(on: tuple[str, ...], text: str) -> None:
    assert first_text(*on) == text


@pytest.mark.parametrize("name", ["multifd", "postcopy-preempt"])
def test_channels_are_decided_when_the_listener_opens(name: str) -> None:
    on = (name, "postcopy-ram") if name == "postcopy-preempt" else (name,)
    text = f"{name.capitalize().replace('-', ' ')} must be set before incoming starts"

    assert first_text(*on) is None
    assert first_text(*on, is_listening=True) == text


def test_what_was_on_before_the_listener_opened_may_stay() -> None:
    is_listening = False
    store = CapabilityStore(is_listening=lambda: is_listening)
    store.set({"multifd": True})
    is_listening = True

    store.set({"multifd": True, "events": True})
    store.set({"multifd": False})

    assert refusal(store, multifd=True) == "Multifd must be set before incoming starts"


def test_zero_copy_asks_the_parameters() -> None:
    parameters = ParameterStore()
    store = CapabilityStore(parameters)
    parameters.set({"tls-creds": "a"})
    assert refusal(store, multifd=True, zero_copy_send=True) == ZERO_COPY_TEXT

    parameters.set({"tls-creds": None})
    store.set({"multifd": True, "zero-copy-send": True})

    assert refusal(store, multifd=False) == ZERO_COPY_TEXT


def test_dirty_limit_asks_the_guest_after_its_conflict() -> None:
    without, with_it = CapabilityStore(), CapabilityStore(refusal_of=anything_goes)

    assert no_dirty_limit("events") is None
    assert refusal(without, dirty_limit=True) == DIRTY_LIMIT_REFUSAL
    for store in (without, with_it):
        assert refusal(store, dirty_limit=True, auto_converge=True) == DIRTY_LIMIT_CONFLICT
    with_it.set({"dirty-limit": True})
    assert with_it.is_on("dirty-limit")


@pytest.mark.parametrize("name", ["compress", "zero-blocks"])
def test_what_is_deprecated_says_so_when_it_is_set(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    CapabilityStore().set({name: True})

    assert [record.getMessage() for record in caplog.records if name in record.getMessage()]


def test_what_was_given_is_repeated_in_part_only() -> None:
    assert refusal(CapabilityStore(), **{"~" * 5000: True}).count("~") == 100


changes_of_all = st.dictionaries(st.sampled_from([*NAMES, "nope"]), st.booleans(), max_size=6)


@given(
    st.lists(changes_of_all, max_size=8),
    st.booleans(),
    st.sampled_from(["", "a"]),
)
def test_any_sequence_leaves_each_set_whole_or_unchanged(
    requests: list[Mapping[str, bool]], is_listening: bool, tls: str
) -> None:
    parameters = ParameterStore()
    parameters.set({"tls-creds": tls})
    store = CapabilityStore(parameters, is_listening=lambda: is_listening)
    states = dict.fromkeys(NAMES, False)
    for changes in requests:
        with contextlib.suppress(UsageError):
            store.set(changes)
            states |= changes
        assert {name: store.is_on(name) for name in NAMES} == states
        around = Surroundings(states, parameters.values, is_listening, no_dirty_limit)
        assert not any(check(states, around) for check in CHECKS)
        assert not any(states[one.name] for one in CAPABILITIES if one.refusal)
