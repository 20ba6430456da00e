"""Comparing answers: every difference is explained in a list, or is a defect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.conformance.peers import Client

EXTENSIONS: Final = Path(__file__).parents[2] / "docs" / "extensions.md"
ABSENT: Final = "<absent>"


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that may differ.

    :ivar request: regular expression that the request's JSON text must match somewhere.
    :ivar member: regular expression that the whole path in the answer must match, such as
        `return.qemu.micro`, `error.desc`, `return[3].name`; `` is the whole answer.
    :ivar reason: why; docs/extensions.md must say the same words.
    :ivar shown_by: requests, or streams (bytes), to two fresh processes: each of them that
        `request` matches shows the difference, or the explanation is stale. None where chance or
        the host decides, or another test shows it.
    :ivar incoming: they are sent to processes that wait for `migrate-incoming`.
    """

    request: str
    member: str
    reason: str
    shown_by: Sequence[object] = field(default=(), compare=False)  # requests have no hash
    incoming: bool = False


def command(name: str, **arguments: object) -> dict[str, object]:
    """A request; `calc_time=1` is `"calc-time": 1`."""
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": given}


def compare(
    requests: Iterable[object],
    qemu: Client,
    ours: Client,
    differences: Sequence[Difference] = (),
) -> None:
    """Send each request to both, in order, and compare the answers.

    :raise AssertionError: with a line for every difference that nobody explains."""
    unexplained: list[str] = []
    for request in requests:
        answers = qemu.ask(request), ours.ask(request)
        unexplained += _unexplained(_text(request), *answers, differences)
    assert not unexplained, "\n".join(unexplained)


def compare_streams(
    streams: Iterable[bytes],
    qemu: Client,
    ours: Client,
    differences: Sequence[Difference] = (),
) -> None:
    """Send each stream to both, and compare all that comes back: `[2].error.desc` is a member.

    :raise AssertionError: with a line for every difference that nobody explains."""
    unexplained: list[str] = []
    for stream in streams:
        answers = qemu.converse(stream), ours.converse(stream)
        unexplained += _unexplained(_text(stream), *answers, differences)
    assert not unexplained, "\n".join(unexplained)


def stale(known: Difference, qemu: Client, ours: Client) -> list[str]:
    """Which of the requests that should show a difference are answered alike."""
    alike = []
    for request in known.shown_by:
        theirs, own = (
            one.converse(request) if isinstance(request, bytes) else one.ask(request)
            for one in (qemu, ours)
        )
        if re.search(known.request, _text(request)) and not any(
            re.fullmatch(known.member, path) for path, _, _ in unlike(theirs, own)
        ):
            alike.append(f"{_text(request)[:200]}\n  is no more: {known.reason}")
    return alike


def _text(request: object) -> str:
    if isinstance(request, bytes):
        return request.decode(errors="backslashreplace")
    return json.dumps(request)


def _unexplained(
    text: str, theirs: Any, own: Any, differences: Sequence[Difference]
) -> Iterator[str]:
    """A line for every member that differs without a reason; `text` is what was sent."""
    for path, one, other in unlike(theirs, own):
        if not _is_explained(text, path, differences):
            yield f"{text[:200]}\n  {path}: QEMU {one!r}\n  ours {other!r}"


def unlike(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Paths at which two JSON values differ, with both values there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other}):
            member = f"{path}.{name}" if path else name
            yield from unlike(one.get(name, ABSENT), other.get(name, ABSENT), member)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from unlike(left, right, f"{path}[{index}]")
    elif type(one) is not type(other) or one != other:
        yield path, one, other


def _is_explained(text: str, path: str, differences: Sequence[Difference]) -> bool:
    return any(
        re.search(known.request, text) and re.fullmatch(known.member, path) for known in differences
    )


def undocumented(reasons: Iterable[str]) -> list[str]:
    """Reasons that docs/extensions.md does not give: users must find every difference."""
    said = " ".join(EXTENSIONS.read_text().split())
    return [reason for reason in reasons if reason not in said]
