"""The wire: the same bytes to a real QEMU and to ramferry get the same answers."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conformance.compare import (
    Difference,
    command,
    compare,
    compare_streams,
    unlike,
)
from tests.conformance.peers import Client, Peer, both

DIFFERENCES: Final = [
    Difference(
        r"e400|E400|9{400}",
        r"(\[0\]\.)?error\.desc|\[0\]",
        "A number beyond the range of a double is a mistake; QEMU takes it for infinity, and "
        "repeats it in what is no JSON.",
        shown_by=[b'{"id":1E400}', b'{"id":-1e400}', b"9" * 400],
    ),
    Difference(
        r"several-mistakes",
        r".*error\.desc",
        "Of several wrong members ramferry tells the first one, QEMU any.",
        shown_by=[{"exec-oob": "stop", "several-mistakes": 1, "id": 5}],
    ),
    Difference(
        r"long-or-unprintable",
        r".*error\.desc",
        "A message repeats at most 100 characters of a name, and those that are not printable as "
        "escapes.",
        shown_by=[command("long-or-unprintable" * 10), command("long-or-unprintable\n\1\u00e9")],
    ),
    Difference(
        r"^\"s{1024}",
        r"\[\d\]\.error\.desc",
        "A message repeats at most 1023 bytes of what is no token.",
        shown_by=[b'"' + b"s" * 1100 + b"\n"],
    ),
    Difference(
        r"deep-id",
        r".*",
        "An `id` nests at most 128 levels deep; a request with a deeper one is not executed.",
        shown_by=[b'{"execute":"deep-id","id":%s1%s}' % (b'{"a":' * 200, b"}" * 200)],
    ),
    Difference(
        r"too-large",
        r".*",
        "A value has at most 256 KiB and 65536 tokens, in QEMU 64 MiB and 2097152; what follows is "
        "read as a new value in both.",
        shown_by=[
            b'["too-large","' + b"x" * 1_100_000 + b'"]',
            b'["too-large"' + b",1" * 70_000 + b"]",
        ],
    ),
    Difference(
        r"^greeting$",
        r"QMP\.version\.package",
        "The greeting's `package` is ramferry's name and version.",
    ),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Peer, Peer]]:
    """QEMU and ramferry for all tests here; each takes fresh clients."""
    with both() as two:
        for one in two:
            one.client.close()
        yield two


@contextlib.contextmanager
def clients(pair: tuple[Peer, Peer], **options: bool) -> Iterator[tuple[Client, Client]]:
    with pair[0].fresh(**options) as qemu, pair[1].fresh(**options) as ours:
        yield qemu, ours


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


STREAMS: Final[dict[str, list[bytes]]] = {
    "values-that-are-no-objects": [
        b"12", b"-1 34", b"1.5", b"null", b"true false", b'"x"', b"'x'", b"[1]", b"[[]]", b"[]",
        b"1,2:3", b"true1", b"1true", b'1"a"', b"0e1", b"1.5.5", b"1e5e5", b"1e-5", b"1E+05",
        b"-0", b"9" * 60, b"-" + b"9" * 60, b"nullnull", b"\r\r\n\t ", b"",
    ],
    "numbers": [
        b"01", b"00", b"-", b"-a", b"-01", b"--1", b"+1", b".5", b"1.", b"1.e", b"1e", b"1e+",
        b"0.0.", b"NaN", b"nan", b"Infinity", b"-Infinity", b"0x10", b"1_000", b"1e400",
        b'{"id":1E400}', b'{"id":-1E400}', b"9" * 400,
        *(
            b'{"id":%s}' % number
            for number in (
                b"18446744073709551615", b"18446744073709551616", b"9223372036854775808",
                b"-9223372036854775808", b"-9223372036854775809", b"1.0", b"0.1", b"-0", b"-0.0",
                b"1e2", b"1e16", b"1e17", b"123456789012345678", b"12345678901234567890123",
                b"1e300", b"5e-324", b"1e-400", b"99999999999999990.0", b"0.30000000000000004",
            )
        ),
    ],
    "strings": [
        b'"abc', b"'abc", b'"a\tb"', b'"\\', b'"\\\n', b'"\\"', b"'\"'", b"'\\''", b'"\'"',
        b'"a\x7fb"', b'"\x00"', b'"abc\x00', b'"a\x1fb"', b'"\\x"', b'"\\U0041"', b'"\\a"',
        b'"\\u12"', b'"\\u"', b'"\\u00"x', b'"\\u12 \xc3\xa9zz"', b'"\\uFFFF"', b'"\\uFDD0"',
        b'"\\ud800"', b'"\\ud800x"', b'"\\udc00\\ud800"', b'"\\ud83d\\u0041"', b'"\\ud83d\\u12"',
        b'"\\ud83f\\udffe"', b'"\\u005c"', b'"\xff"', b'"\xfe"', b'"\\u\xff"', b'"\xc0\x80"',
        b'"a\xc3\xff"', b'"a\xf8\x88\x80\x80\x80\xff"', b'"\x80\xc3\xc3\xed\xa0\x80\xc1\x80\xff"',
        *(
            b'{"id":"%s"}' % text
            for text in (
                b"\\u00e9\\u4e00\\ud83d\\ude00\\u007f\\u001f\\n\\/\\b\\f\\r\\t", b"\\u0000",
                b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbf\xbf", b"\xf0\x9f\x98\x80",
                b"\xf4\x90\x80\x80", b"\xc3\xa9", b"\xc3", b"\x80", b"\xe4\xb8", b"\xc1\xbf",
                b"\xf0\x9f\xbf\xbe", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\\'",
            )
        ),
        b"s" * 1100, b'"' + b"s" * 1100 + b"\n", b"s" * 1000,
    ],
    "structure": [
        b"{", b"}", b"[", b"]", b"{]", b"[}", b"{}}", b"[[]", b"[{]}", b"{[}]", b"[[}", b'{"a":1]',
        b"[1}", b"{a}", b'{"a" 1}', b'{"a":}', b'{"a":1,}', b"[1,]", b"[1 2]", b"{1:2}", b"[,]",
        b'{"a":1 "b":2}', b"{[1]:2}", b"{{}:2}", b'{"a":1,"a":2}', b'{"id":{"a":1,"a":2}}',
        b"{:1}", b"{,}", b'{"a"}', b'{"a",1}', b'{"a":,}', b"[1,,2]", b"[:]", b"{null:1}",
        b'{"a":"\\x","b":nonsense}', b'{"a":nonsense,"b":"\\x"}', b'{nonsense:"\\x"}', b":", b",",
        b'{"a":1}{"b":2}', b'{"execute":"no"}garbage{"execute":"no"}', b"nonsense {}", b"true {}",
    ],
    "stray-bytes": [
        b"\x01", b"abc\x01def", b"/* c */", b"// c", b"# c", b"%d", b'{"a":%d}', b"True", b"(1)",
        b'@foo {"execute":"no"}', b'@foo\n{"execute":"no"}', b"\xff", b"\xfe", b"\xc3\xa9",
        b"\xc2\x80", b"\x00", b"{\x00}", b"\x7f", b"\x0b\x0c", b"@:@,@]@}", b"@a\tb\"c'd\\e f,",
        b'\xef\xbb\xbf{"execute":"no"}', b'\x1b[A{"execute":"no"}', b"\x04", b"a\tb",
        *(bytes([byte]) for byte in range(256)),
        *(b"@" + bytes([byte]) + b"1" for byte in range(256)),
        *(b'{"id":"' + bytes([byte]) + b'","execute":"no"}' for byte in range(256)),
    ],
    "limits": [
        b"[" * 1024 + b"]" * 1024, b"[" * 1025 + b"]" * 1025, b"[" * 1030 + b"]" * 1030,
        b'{"a":' * 1030, b'{"id":%s,"execute":"no"}' % nested(100).encode(),
        b'{"execute":"deep-id","id":%s}' % nested(200).encode(),
        b'["too-large","' + b"x" * 1_100_000 + b'"]',
        b'["too-large"' + b",1" * 70_000 + b"]",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(STREAMS))
def test_malformed_and_odd_streams_are_answered_alike(pair: tuple[Peer, Peer], kind: str) -> None:
    with clients(pair) as (qemu, ours):
        compare_streams(STREAMS[kind], qemu, ours, DIFFERENCES)


def test_streams_before_the_negotiation_are_answered_alike(pair: tuple[Peer, Peer]) -> None:
    for kind in ("values-that-are-no-objects", "structure"):
        with clients(pair, negotiate=False) as (qemu, ours):
            compare_streams(STREAMS[kind], qemu, ours, DIFFERENCES)


SEEDS: Final = (
    b'{"execute":"no","id":{"a":[1,2.5,-0,null,true,\'x\',"\\u00e9\\ud83d\\ude00\\n"]}}',
    b'[{"a":{}},[],{"b":[[]]}]',
    b"{'id':\"\xc3\xa9\xf0\x9f\x98\x80\",'execute':\"no\"}",
)
PIECES: Final = (
    *(bytes([byte]) for byte in range(256)),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b",", b":", b"\\u", b"\\ud83d", b"0", b"1") * 8,
    *(b"e", b".", b"-", b"null", b"\xc0\x80", b"\xed\xa0\x80", b"\n", b'"a":') * 8,
)


def mutated(luck: random.Random) -> bytes:
    """A stream that was right once."""
    stream = bytearray(luck.choice(SEEDS) * luck.randint(1, 2))
    for _ in range(luck.randint(1, 5)):
        position = luck.randrange(len(stream) + 1)
        taken = luck.choice((0, 0, 0, 1, 3, 6))
        stream[position : position + taken] = luck.choice(PIECES)
    return bytes(stream)


def without_names(message: Any) -> Any:
    """A mutated name is told as ramferry shows names, and of several the first."""
    match message:
        case {"error": {"desc": str(text)}} if text.startswith(("QMP input member", "The command")):
            return text[:11], message.get("id")
    return message


def test_mutated_streams_are_answered_alike(pair: tuple[Peer, Peer]) -> None:
    luck = random.Random(20)
    with clients(pair) as (qemu, ours):
        for _ in range(3000):
            stream = mutated(luck)
            theirs = [without_names(message) for message in qemu.converse(stream)]
            assert theirs == [without_names(message) for message in ours.converse(stream)], stream


def ask(name: str, **more: Any) -> dict[str, Any]:
    return {"execute": name} | more


WRONG_ARGUMENTS: Final[list[Any]] = [
    {"enable": ["fly"]},
    {"enable": [1]},
    {"enable": [["oob"]]},
    {"enable": "oob"},
    {"enable": None},
    {"enable": ["oob", "fly"]},
    {"enable": 1, "x": 1},
    {"x": 1},
    [],
    None,
]
NEGOTIATIONS: Final = [
    ask("query-version"),
    ask("no-such-command", id=3),
    {"exec-oob": "qmp_capabilities"},
    *(ask("qmp_capabilities", arguments=arguments, id=[1]) for arguments in WRONG_ARGUMENTS),
    ask("query-version", arguments={"enable": 1}),
    {},
    {"execute": 1},
    [1],
    b"@\n",
]


@pytest.mark.parametrize(
    "arguments", [{}, {"enable": []}, {"enable": ["oob"]}, {"enable": ["oob", "oob"]}]
)
def test_the_negotiation_is_qemus(pair: tuple[Peer, Peer], arguments: dict[str, Any]) -> None:
    afterwards = [
        ask("qmp_capabilities", arguments=arguments, id="right"),
        *(request for request in NEGOTIATIONS if request != ask("query-version")),
        {"exec-oob": "no-such-command", "id": 1},
    ]
    with clients(pair, negotiate=False) as (qemu, ours):
        greetings = unlike(qemu.greeting, ours.greeting)
        assert [path for path, _, _ in greetings] == ["QMP.version.package"]
        compare(NEGOTIATIONS + afterwards, qemu, ours, DIFFERENCES)


IDENTITIES: Final[list[Any]] = [
    *(None, True, 0, -1, 2**64 - 1, 1.5, "", "é", "\0", [], {}, [{"a": [None]}])
]
NO_STRINGS: Final[list[Any]] = [1, 1.5, True, [], {}, ["stop"]]
NO_OBJECTS: Final[list[Any]] = [None, "", 1, [], True]
REQUESTS: Final = [
    *(ask("no-such-command", id=identity) for identity in IDENTITIES),
    *({"execute": wrong, "id": 1} for wrong in (*NO_STRINGS, None)),
    *({"exec-oob": wrong, "id": 1} for wrong in (*NO_STRINGS, "no-such-command", "stop")),
    *(ask("stop", arguments=wrong, id=2) for wrong in NO_OBJECTS),
    {},
    {"id": 1},
    {"arguments": {}},
    {"Execute": "stop"},
    {"execute": "stop", "x": 1, "id": 4},
    {"execute": "stop", "exec-oob": "stop"},
    {"exec-oob": "stop", "execute": "stop"},
    {"exec-oob": "qmp_capabilities"},
    {"exec-oob": "stop", "arguments": 1},
    {"exec-oob": "stop", "several-mistakes": 1, "id": 5},
    {"exec-oob": "migrate-pause", "id": 6},
    {"exec-oob": "migrate-pause", "arguments": {"x": 1}},
    {"event": "STOP"},
    {"return": {}},
    ask(""),
    ask("STOP"),
    ask(" stop"),
    ask("stop", arguments={}),
    ask("stop", arguments={"a": 1}),
    ask("stop", arguments={"": 1}),
    ask("stop", arguments={"several-mistakes": 1, "a": 2, "b": 3}),
    {"several-mistakes": 1, "y": 2, "a": 3, "id": 5},
    ask("long-or-unprintable" * 10),
    ask("long-or-unprintable\n\1é"),
    {"long-or-unprintable" * 10: 1},
    b"{'execute': 'st\\u006fp', 'id': 'single \"quotes\"'}",
    b'{"execute"\t:\r\n"stop"\n,"id":7}',
]


@pytest.mark.parametrize("oob", [False, True])
def test_requests_are_checked_as_qemu_does(pair: tuple[Peer, Peer], oob: bool) -> None:
    with clients(pair, oob=oob) as (qemu, ours):
        compare(REQUESTS, qemu, ours, DIFFERENCES)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_value_may_come_in_many_writes(pair: tuple[Peer, Peer], size: int) -> None:
    stream = b"".join(STREAMS["strings"][:40] + STREAMS["structure"]) * 2
    with clients(pair) as (qemu, ours):
        whole = qemu.converse(stream)
        for client in (qemu, ours):
            for position in range(0, len(stream), size):
                client.send(stream[position : position + size])
            assert client.converse(b"") == whole


def test_many_requests_in_one_write_are_answered_in_order(pair: tuple[Peer, Peer]) -> None:
    stream = b"".join(b'{"execute":"no","id":%d}' % number for number in range(200))
    with clients(pair) as (qemu, ours):
        compare_streams([stream], qemu, ours)


def test_an_event_comes_before_the_answer_of_the_command_that_made_it(
    pair: tuple[Peer, Peer],
) -> None:
    with clients(pair) as (qemu, ours):
        told = []
        for client in (qemu, ours):
            client.converse(b'{"execute":"stop"}')
            messages = client.converse(b'{"execute":"cont","id":1}{"execute":"stop","id":2}')
            told.append([message.get("event", message.get("id")) for message in messages])
        assert told[0] == told[1] == ["RESUME", 1, "STOP", 2, "first", None, "last"]


ADD: Final = b'{"execute":"add-fd","arguments":{"opaque":"x"}}'
LOOK: Final = b'{"execute":"query-fdsets"}'


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        pytest.param([(ADD, 0)], [0], id="one"),
        pytest.param([(ADD, None)], [None], id="none"),
        pytest.param([(LOOK, 0), (ADD, 1)], [1], id="the-newest"),
        pytest.param([(LOOK, 0), (ADD, None), (ADD, None)], [0, None], id="before-its-command"),
        pytest.param([(ADD, 0), (ADD, 1), (ADD, None)], [0, 1, None], id="each-its-own"),
        pytest.param([(ADD[:9], 0), (ADD[9:], 1), (ADD, None)], [1, None], id="in-two-writes"),
    ],
)
@pytest.mark.parametrize("waits", [True, False])
def test_a_descriptor_belongs_to_the_command_that_it_came_with(
    pair: tuple[Peer, Peer],
    tmp_path: Path,
    waits: bool,
    sent: list[tuple[bytes, int | None]],
    taken: list[int | None],
) -> None:
    for name in "01":
        (tmp_path / name).touch()
    for peer in pair:
        with peer.fresh() as client:
            answers = []
            for request, number in sent:
                with contextlib.ExitStack() as files:
                    descriptors = []
                    if number is not None:
                        file = files.enter_context(open(tmp_path / str(number)))
                        descriptors.append(file.fileno())
                    socket.send_fds(client.socket, [request], descriptors)
                if waits and request[-1:] == b"}" and len(request) > 20:
                    answers.append(client.answer())
            answers += client.converse(b"")[:-3]
            added = [answer for answer in answers if not isinstance(answer.get("return"), list)]
            assert [taken_file(peer, answer) for answer in added] == taken, peer.name


def taken_file(peer: Peer, answer: Any) -> int | None:
    """Which of the test's files the process has got."""
    if "error" in answer:
        assert answer["error"]["desc"] == "No file descriptor supplied via SCM_RIGHTS"
        return None
    fd = answer["return"]["fd"]
    return int(Path(f"/proc/{peer.process.pid}/fd/{fd}").readlink().name)


def test_the_greeting_differs_in_its_package_alone(pair: tuple[Peer, Peer]) -> None:
    with clients(pair, negotiate=False) as (qemu, ours):
        explained = [known.member for known in DIFFERENCES if known.request == "^greeting$"]
        paths = [path.replace(".", r"\.") for path, _, _ in unlike(qemu.greeting, ours.greeting)]
        assert paths == explained
