"""`--guest SPEC`: from text to a typed specification, and from that to a guest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

from engine.errors import UsageError, shown
from engine.guest import messages
from engine.guest.backing import HUGE_1G, HUGE_2M, check_available, make_ram
from engine.guest.base import Guest, Handover, TrackerName
from engine.guest.foreignguest import ForeignGuest, adopt_foreign, attach_process, attach_qemu
from engine.guest.handoffguest import HandoffGuest, attach_handoff
from engine.guest.ram import RamGuest
from engine.guest.rundir import check_rundir, default_rundir
from engine.guest.workload import WorkloadGuest, adopt_workload, start_workload
from engine.memory.blocks import BLOCK_SIZE_MAX, PAGE_SIZE
from engine.sizes import parse_size

PATTERNS: Final = ("sweep", "random", "hotspot", "append")
CONTENTS: Final = ("zero", "text", "heap", "random", "mixed")
ADOPTED_WAITS: Final = "a guest that is adopted (socket=) cannot wait for a migration"
PATH_BYTES_MAX: Final = 4095  #: the kernel's PATH_MAX, less its final zero


@dataclass(frozen=True, slots=True)
class RamSpec:
    """`ram:`: memory and nothing else. Sizes in bytes; see `make_ram`."""

    size: int
    path: str | None = None
    hugetlb: int | None = None
    pagesize: int | None = None


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """`workload:`: a guest that writes. With `socket` an orphaned one is adopted instead.

    :ivar rate: page writes x 4096 of all vCPUs, bytes per second; 0 is full speed.
    :ivar words: body words moved by each write, of 508.
    :ivar timed: note how long each write takes; two looks at the clock.
    :ivar fill: off leaves RAM untouched, which is the same as contents=zero.
    """

    size: int = 0
    path: str | None = None
    hugetlb: int | None = None
    pagesize: int | None = None
    vcpus: int = 1
    pattern: str = "sweep"
    rate: int = 0
    contents: str = "mixed"
    seed: int = 1
    words: int = 508
    fill: bool = True
    socket: str | None = None
    rundir: str | None = None
    tracker: TrackerName | None = None
    timed: bool = False

    @property
    def is_filled(self) -> bool:
        """Whether a start takes all of its RAM from the system's free memory."""
        is_written = self.fill and self.contents != "zero" and self.socket is None
        return is_written and self.path is None and self.hugetlb is None

    def options(self) -> messages.Options:
        """What the vCPUs are told."""
        contents = self.contents if self.fill else "zero"
        return messages.Options(
            self.vcpus, self.pattern, self.rate, self.words, contents, self.seed, self.timed
        )


@dataclass(frozen=True, slots=True)
class QemuSpec:
    """`qemu:`: one that runs already, whose QMP server listens at the path; with `socket` the agent
    that was left with it in postcopy is adopted instead.

    :ivar vhost_user: pids of its back ends, which map its RAM, too."""

    qmp: str = ""
    vhost_user: tuple[int, ...] = ()
    socket: str | None = None


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """`process:`: any that maps the file as its memory; `socket` as of a QEMU."""

    pid: int = 0
    path: str = ""
    socket: str | None = None


@dataclass(frozen=True, slots=True)
class HandoffSpec:
    """`handoff:PATH`: a VMM that will connect to a socket there; `socket` as of a QEMU."""

    path: str = ""
    socket: str | None = None


GuestSpec = RamSpec | WorkloadSpec | QemuSpec | ProcessSpec | HandoffSpec
SpecT = TypeVar("SpecT", RamSpec, WorkloadSpec, QemuSpec, ProcessSpec)
BACK_END: Final = "vhost-user"  #: may be given several times
#: What kinds that have no size need, and how it looks.
NEEDED: Final = {
    "qemu": ({"qmp"}, "qmp=, like qemu:qmp=/run/guest.qmp"),
    "process": ({"pid", "path"}, "pid= and path=, like process:pid=4711,path=/dev/shm/cache"),
}


# -- values: each raises ValueError with what is allowed -----------------------------------------


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except UsageError as exc:
        raise ValueError("a number of bytes, like 4096, 512M or 1.5G") from exc
    if size >= 2**63:
        raise ValueError("less than 8388608T")
    return size


def _ram_size(text: str) -> int:
    size = _size(text)
    if not PAGE_SIZE <= size <= BLOCK_SIZE_MAX or size % PAGE_SIZE:
        raise ValueError("a positive multiple of 4096, at most 16T")
    return size


def _huge_page_size(text: str) -> int:
    if _size(text) not in (HUGE_2M, HUGE_1G):
        raise ValueError("2M or 1G")
    return _size(text)


def _page_size(text: str) -> int:
    if _size(text) not in (PAGE_SIZE, HUGE_2M, HUGE_1G):
        raise ValueError("4K, 2M or 1G")
    return _size(text)


def _number(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(highest))
        if not is_number or not lowest <= int(text) <= highest:
            raise ValueError(f"{lowest} to {highest}")
        return int(text)

    return parse


def _word(allowed: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(", ".join(allowed))
        return text

    return parse


def _switch(text: str) -> bool:
    return _word(("on", "off"))(text) == "on"


def _path(text: str) -> str:
    if not text or "\0" in text or len(os.fsencode(text)) > PATH_BYTES_MAX:
        raise ValueError("a path")
    return text


def _tracker(text: str) -> TrackerName:
    names = [name.value for name in TrackerName if name is not TrackerName.NONE]
    return TrackerName(_word(tuple(names))(text))


PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "size": _ram_size,
    "path": _path,
    "hugetlb": _huge_page_size,
    "pagesize": _page_size,
    "vcpus": _number(1, messages.VCPUS_MAX),
    "pattern": _word(PATTERNS),
    "rate": _size,
    "contents": _word(CONTENTS),
    "seed": _number(0, 2**63 - 1),
    "words": _number(0, messages.WORDS_MAX),
    "fill": _switch,
    "timed": _switch,
    "socket": _path,
    "qmp": _path,
    "pid": _number(1, 2**22),
    "vhost-user": _number(1, 2**22),
    "rundir": _path,
    "tracker": _tracker,
}


# -- text to specification -----------------------------------------------------------------------


def parse_guest_spec(text: str) -> GuestSpec:
    """Parse `KIND:name=value,...`.

    :raise UsageError: one line that says what is allowed."""
    kind, _, rest = text.partition(":")
    if kind == "ram":
        return _parse(RamSpec, kind, rest)
    if kind == "workload":
        spec = _parse(WorkloadSpec, kind, rest)
        if spec.vcpus * PAGE_SIZE > spec.size and spec.socket is None:
            raise UsageError(f"guest '{kind}': vcpus={spec.vcpus} need a page of RAM each")
        if spec.rundir is not None:
            check_rundir(spec.rundir)
        return spec
    if kind == "qemu":
        return _parse(QemuSpec, kind, rest)
    if kind == "process":
        return _parse(ProcessSpec, kind, rest)
    if kind == "handoff":
        return _parse_handoff(rest)
    raise UsageError(
        f"guest '{shown(text)}' is of no known kind; allowed: ram:size=..., workload:size=..., "
        "qemu:qmp=..., process:pid=...,path=..., handoff:PATH"
    )


def _parse_handoff(text: str) -> HandoffSpec:
    """A path and nothing else, whatever is in it."""
    name, equals, value = text.partition("=")
    is_adopted = name == "socket" and equals
    try:
        path = _path(value if is_adopted else text)
    except ValueError as exc:
        raise UsageError(
            f"guest 'handoff' needs {exc}, like handoff:/run/vmm.sock; not '{shown(text)}'"
        ) from exc
    return HandoffSpec(socket=path) if is_adopted else HandoffSpec(path)


def _parse(spec_type: type[SpecT], kind: str, text: str) -> SpecT:
    allowed = [field.name.replace("_", "-") for field in fields(spec_type)]
    values: dict[str, Any] = {}
    name: str
    for option in text.split(",") if text else []:
        name, equals, value = option.partition("=")
        if name not in allowed or not equals:
            raise UsageError(
                f"guest '{kind}' has no option '{shown(option)}'; allowed: {', '.join(allowed)}"
            )
        is_repeated = name == BACK_END
        if name in values and not is_repeated:
            raise UsageError(f"guest '{kind}': option '{name}' is given twice")
        try:
            parsed: Any = PARSERS[name](value)
        except ValueError as exc:
            raise UsageError(
                f"guest '{kind}': {name}={shown(value)} is not allowed; {exc} is"
            ) from exc
        values[name] = (*values.get(name, ()), parsed) if is_repeated else parsed
    _check_together(kind, values)
    return spec_type(**{key.replace("-", "_"): value for key, value in values.items()})


def _check_together(kind: str, values: dict[str, Any]) -> None:
    if len(values.get(BACK_END, ())) > messages.BACK_ENDS_MAX:
        raise UsageError(
            f"guest '{kind}': at most {messages.BACK_ENDS_MAX} {BACK_END}= may be given"
        )
    if "socket" in values:
        if set(values) - {"socket", "tracker"}:
            raise UsageError(
                f"guest '{kind}': socket= adopts a guest as it is; only tracker= may go with it"
            )
    elif kind in NEEDED:
        names, text = NEEDED[kind]
        if not names <= set(values):
            raise UsageError(f"guest '{kind}' needs {text}")
    elif "size" not in values:
        raise UsageError(f"guest '{kind}' needs size=, like {kind}:size=2G")
    if "path" in values and "hugetlb" in values:
        raise UsageError(
            f"guest '{kind}': path= and hugetlb= exclude each other; give a path in a hugetlbfs"
        )


# -- specification to guest ----------------------------------------------------------------------


async def open_guest(
    spec: GuestSpec, *, incoming: bool, run: bool = True, given_up: Handover | None = None
) -> Guest:
    """Make the guest: running, or paused when not `run`, or waiting for a migration.

    RAM of an incoming guest is not filled. The caller ends the guest with `quit`.

    :param given_up: of a guest that is only memory: it was handed over (TAKEN), or nobody knows.
    :raise UsageError: not possible like that; nothing is left.
    :raise MemoryRefused: the system has no such memory; nothing is left.
    :raise GuestError: the guest's process failed to start; nothing is left."""
    if isinstance(spec, WorkloadSpec):
        return await open_workload(spec, incoming=incoming, run=run)
    if isinstance(spec, QemuSpec | ProcessSpec | HandoffSpec):
        return await _open_foreign(spec, incoming=incoming)
    ram = make_ram(spec.size, spec.path, spec.hugetlb, spec.pagesize)
    return RamGuest(ram, incoming=incoming, run=run, given_up=given_up)


async def _open_foreign(spec: QemuSpec | ProcessSpec | HandoffSpec, *, incoming: bool) -> Guest:
    if spec.socket is not None:
        if incoming:
            raise UsageError(ADOPTED_WAITS)
        kind = HandoffGuest if isinstance(spec, HandoffSpec) else ForeignGuest
        return await adopt_foreign(spec.socket, kind)
    if isinstance(spec, HandoffSpec):
        return await attach_handoff(spec.path, incoming=incoming)
    if isinstance(spec, QemuSpec):
        return await attach_qemu(spec.qmp, spec.vhost_user, incoming=incoming)
    return await attach_process(spec.pid, spec.path, incoming=incoming)


async def open_workload(spec: WorkloadSpec, *, incoming: bool, run: bool = True) -> WorkloadGuest:
    """`open_guest` for those who want to judge it."""
    if spec.socket is not None:
        if incoming:
            raise UsageError(ADOPTED_WAITS)
        return await adopt_workload(spec.socket, spec.tracker)
    rundir = check_rundir(spec.rundir or default_rundir())
    if spec.is_filled and not incoming:
        check_available(spec.size, "a guest that is filled")
    ram = make_ram(spec.size, spec.path, spec.hugetlb, spec.pagesize)
    return await start_workload(
        ram,
        spec.options(),
        incoming=incoming,
        fill=spec.fill and not incoming,
        run=run,
        rundir=rundir,
        tracker=spec.tracker,
    )
