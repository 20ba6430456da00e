"""What a VMM says when it hands its memory over, right and wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import WireError
from engine.guest.handoff_hello import Hello, parse_hello
from engine.wire import BLOCKS_MAX

PAGE = 4096


def region(**changes: Any) -> dict[str, Any]:
    whole = {"base_host_virt_addr": 16 * PAGE, "size": 4 * PAGE, "offset": 0, "page_size_kib": 4}
    return {"id": "ram", **whole, **changes}


def hello(*regions: dict[str, Any], **changes: Any) -> bytes:
    said = {"handoff": 1, "running": True, "regions": list(regions or [region()])}
    return json.dumps({**said, **changes}).encode()


def test_a_hello_tells_regions_run_state_and_threads() -> None:
    said = parse_hello(
        hello(region(), region(id="high", base_host_virt_addr=20 * PAGE), state=True, vcpus=[7])
    )

    assert [each.id for each in said.regions] == ["ram", "high"]
    assert (said.running, said.state, said.vcpus) == (True, True, [7])


def test_keys_that_a_later_version_may_have_are_ignored() -> None:
    assert parse_hello(hello(region(numa_node=3), name="x")).regions[0].id == "ram"


@pytest.mark.parametrize(
    ("said", "size"),
    [(4, PAGE), (4096, PAGE), (2048, 2 << 20), (2 << 20, 2 << 20), (1 << 20, 1 << 30)],
)
def test_a_page_size_is_in_kib_or_in_bytes_as_firecracker_has_it(said: int, size: int) -> None:
    place = {"base_host_virt_addr": 1 << 30, "size": 1 << 30}

    assert parse_hello(hello(region(page_size_kib=said, **place))).regions[0].page_size == size


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "not a hello"),
        (b"[1]", "not a hello: Expected `object`"),
        (b"[" * 100_000, "not a hello"),
        (b'{"handoff": 1}', "missing required field `regions`"),
        (hello(handoff=2), "version 2 of the handoff protocol; 1 is spoken"),
        (hello(regions=[]), "0 regions; 1 to"),
        (hello(*[region()] * (BLOCKS_MAX + 1)), f"{BLOCKS_MAX + 1} regions; 1 to {BLOCKS_MAX}"),
        (hello(region(size=0)), "is not whole pages of 4096"),
        (hello(region(size=PAGE + 1)), "is not whole pages of 4096"),
        (hello(region(base_host_virt_addr=1)), "is not whole pages of 4096"),
        (hello(region(page_size_kib=2048)), "is not whole pages of 2097152"),
        (hello(region(size=-PAGE)), "Expected `int` >= 0"),
        (hello(region(size=2**64)), "Expected `int`|out of range"),
        (hello(region(size=2**63 - PAGE)), "is not whole pages|impossible"),
        (hello(region(size=2**62)), "impossible"),
        (hello(region(page_size_kib=16)), "4, 2048 and 1048576 are allowed"),
        (hello(region(offset=PAGE)), "each needs a memfd of its own"),
        (hello(region(), region(id="b")), "two regions overlap at 0x10000"),
        (hello(region(), region(base_host_virt_addr=20 * PAGE)), "two RAM blocks of one name"),
        (hello(region(id="")), "bad name"),
        (hello(region(id="x" * 256)), "bad name"),
        (hello(running=1), "Expected `bool`"),
        (hello(vcpus=[1] * 4097), "Expected `array` of length <= 4096"),
    ],
)
def test_a_wrong_hello_is_refused_in_one_line(line: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says) as caught:
        parse_hello(line)

    assert "\n" not in str(caught.value)


NUMBERS = st.sampled_from([-1, 0, 1, 4, 2048, PAGE, 2**20, 2**62, 2**63, 2**70]) | st.integers()
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
REGIONS = st.dictionaries(
    st.sampled_from(["id", "base_host_virt_addr", "size", "offset", "page_size_kib"]),
    VALUES | NUMBERS,
)
HELLOS = st.fixed_dictionaries(
    {"handoff": st.just(1) | VALUES, "running": st.booleans() | VALUES},
    optional={
        "regions": st.lists(REGIONS | st.just(region()), max_size=4) | VALUES,
        "state": VALUES,
        "vcpus": st.lists(NUMBERS, max_size=3) | VALUES,
    },
)


@given(st.binary(max_size=200) | HELLOS.map(lambda each: json.dumps(each).encode()))
def test_no_bytes_end_in_anything_but_a_sound_hello_or_a_refusal(line: bytes) -> None:
    with contextlib.suppress(WireError):
        said = parse_hello(line)
        check_sound(said)


def check_sound(said: Hello) -> None:
    ends = 0
    for each in sorted(said.regions, key=lambda one: one.base_host_virt_addr):
        assert 0 <= ends <= each.base_host_virt_addr
        assert each.size > 0
        assert each.size % each.page_size == each.base_host_virt_addr % each.page_size == 0
        ends = each.end
    assert ends < 2**63
