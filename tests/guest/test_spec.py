"""Guest specifications: what is allowed parses, everything else is refused in one line."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import MemoryRefused, UsageError
from engine.guest import backing
from engine.guest.base import TrackerName
from engine.guest.ram import RamGuest
from engine.guest.spec import QemuSpec, RamSpec, WorkloadSpec, open_guest, parse_guest_spec
from tests.guest.support import run

GIB = 1024**3


def test_every_option_parses() -> None:
    assert parse_guest_spec("ram:size=2G,path=/dev/shm/x,pagesize=2M") == RamSpec(
        2 * GIB, "/dev/shm/x", None, 2 * 1024**2
    )
    assert parse_guest_spec(
        "workload:size=1G,vcpus=2,pattern=hotspot,rate=200M,contents=text,seed=7,words=8,"
        "hugetlb=2M,fill=off,rundir=/tmp/r,tracker=guest-bitmap"
    ) == WorkloadSpec(
        GIB,
        None,
        2 * 1024**2,
        None,
        2,
        "hotspot",
        200 * 1024**2,
        "text",
        7,
        8,
        False,
        None,
        "/tmp/r",
        TrackerName.BITMAP,
    )
    assert parse_guest_spec("workload:socket=/tmp/s") == WorkloadSpec(socket="/tmp/s")
    back_ends = parse_guest_spec("qemu:qmp=/tmp/q,vhost-user=7,vhost-user=9")
    assert back_ends == QemuSpec("/tmp/q", (7, 9))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "allowed: ram:size=..., workload:size=..."),
        ("lama:size=1G", "allowed: ram:size=..., workload:size=..."),
        ("qemu:", "needs qmp=, like qemu:qmp="),
        ("qemu:qmp=", "a path is$"),
        ("qemu:size=1G", "allowed: qmp"),
        ("qemu:vhost-user=1", "needs qmp="),
        ("qemu:qmp=/x,vhost-user=0", "1 to 4194304"),
        ("qemu:qmp=/x,qmp=/y", "given twice"),
        ("qemu:qmp=/x" + ",vhost-user=1" * 17, "at most 16 vhost-user="),
        ("qemu:socket=/x,vhost-user=1", "adopts a guest as it is"),
        ("process:pid=1,path=/x,vhost-user=2", "allowed: pid, path, socket"),
        ("process:pid=1", "needs pid= and path=, like process:pid="),
        ("process:pid=0,path=/x", "1 to 4194304"),
        ("handoff:", "needs a path, like handoff:/run/vmm.sock"),
        ("ram:", "needs size="),
        ("workload", "needs size="),
        ("ram:size=", "a positive multiple of 4096|a number of bytes"),
        ("ram:size=1G,size=2G", "given twice"),
        ("ram:size=1000", "a positive multiple of 4096"),
        ("ram:size=0", "a positive multiple of 4096"),
        ("ram:size=-1G", "a number of bytes, like 4096, 512M or 1.5G"),
        ("ram:size=17T", "at most 16T"),
        ("ram:size=1G,rate=1", "allowed: size, path, hugetlb, pagesize"),
        ("ram:size=1G,", "no option ''"),
        ("ram:size=1G,path", "no option 'path'"),
        ("ram:size=1G,hugetlb=4M", "2M or 1G"),
        ("ram:size=1G,path=/a,hugetlb=2M", "exclude each other"),
        ("workload:size=1G,vcpus=65", "1 to 64"),
        ("workload:size=4K,vcpus=2", "need a page of RAM each"),
        ("workload:size=1G,words=509", "0 to 508"),
        ("workload:size=1G,pattern=up", "sweep, random, hotspot, append"),
        ("workload:size=1G,contents=up", "zero, text, heap, random, mixed"),
        ("workload:size=1G,fill=yes", "on, off"),
        ("workload:size=1G,tracker=none", "uffd-wp, guest-bitmap, soft-dirty, content-hash"),
        ("workload:size=1G,rundir=relative", "must be absolute; begin it with /$"),
        ("workload:size=1G,rundir=/" + "x" * 89, "has 90 bytes; 88 are allowed"),
        ("workload:size=1G,rundir=x" + "y" * 200, "'xy{99}\\.\\.\\.' must be absolute"),
        (
            "ram:size=" + "9" * 5000,
            "^guest 'ram': size=9{100}\\.\\.\\. is not allowed; a number of",
        ),
        ("ram:size=99999999999T", "less than 8388608T"),
        ("workload:size=1G,seed=" + "9" * 5000, "0 to 9223372036854775807 is$"),
        ("z" * 5000, "^guest 'z{100}\\.\\.\\.' is of no known kind"),
        ("ram:" + "z" * 5000, "no option 'z{100}\\.\\.\\.'; allowed"),
        ("ram:size=1G,path=/" + "z" * 4095, "; a path is$"),
        ("ram:a\nb", "no option 'a.nb'"),
        ("workload:size=1G,socket=/tmp/x", "only tracker= may go with it"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line_that_says_what_is(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_guest_spec(text)

    assert "\n" not in str(caught.value)


@given(st.text(max_size=40), st.sampled_from(["", "ram:", "workload:", "workload:size=1G,"]))
def test_no_text_ends_in_anything_but_a_specification_or_a_usage_error(
    text: str, start: str
) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(parse_guest_spec(start + text), RamSpec | WorkloadSpec)


def test_a_guest_has_sizes_of_the_same_grammar_as_parameters() -> None:
    assert parse_guest_spec("ram:size=1.5G") == RamSpec(3 * GIB // 2)
    assert parse_guest_spec("workload:size=4096b,rate=0.5k") == WorkloadSpec(4096, rate=512)


def test_a_guest_that_cannot_be_filled_is_refused_before_it_takes_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backing, "available_bytes", lambda: GIB)

    async def scenario() -> None:
        with pytest.raises(MemoryRefused, match=r"wants 1\.5 GiB of memory, and 1\.0 GiB are"):
            await open_guest(parse_guest_spec("workload:size=1.5G"), incoming=False)
        for empty in ("fill=off", "contents=zero"):
            guest = await open_guest(parse_guest_spec(f"workload:size=2G,{empty}"), incoming=False)
            await guest.quit()
        await (await open_guest(parse_guest_spec("workload:size=2G"), incoming=True)).quit()

    run(scenario())


def test_available_memory_is_what_the_kernel_says() -> None:
    memory = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
    }

    assert memory["MemFree"] // 2 < backing.available_bytes() <= memory["MemTotal"]


def test_ram_on_a_path_is_made_and_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "ram"
        guest = await open_guest(parse_guest_spec(f"ram:size=8M,path={path}"), incoming=True)
        assert isinstance(guest, RamGuest)
        assert path.stat().st_size == 8 << 20
        assert path.stat().st_blocks == 0
        assert guest.blocks[0].backing_page_size == 4096
        await guest.quit()
        await guest.quit()
        assert not path.exists()

    run(scenario())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("size=1M,path={}/no/such/dir", "cannot make RAM at"),
        ("size=1M,path={}", "cannot open RAM at"),
        ("size=1M,pagesize=2M", "not a positive multiple of the page size 2097152"),
    ],
)
def test_ram_that_cannot_be_had_is_refused_and_nothing_is_left(
    tmp_path: Path, options: str, says: str
) -> None:
    async def scenario() -> None:
        with pytest.raises(UsageError, match=says) as caught:
            await open_guest(parse_guest_spec("ram:" + options.format(tmp_path)), incoming=False)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    run(scenario())


def test_huge_pages_that_are_not_there_are_refused_with_the_way_to_get_them() -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages")
    if not free.exists() or int(free.read_text()) > 0:
        pytest.skip("this machine has free 1 GiB pages, or knows none")

    async def scenario() -> None:
        with pytest.raises(MemoryRefused, match="huge pages"):
            await open_guest(parse_guest_spec("ram:size=1G,hugetlb=1G"), incoming=False)

    run(scenario())


def test_a_file_that_somebody_else_put_there_since_is_not_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "ram"
        guest = await open_guest(parse_guest_spec(f"ram:size=1M,path={path}"), incoming=False)
        os.unlink(path)
        path.write_text("somebody else's")
        await guest.quit()
        assert path.read_text() == "somebody else's"

    run(scenario())
