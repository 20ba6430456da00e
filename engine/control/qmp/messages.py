"""What goes over the wire: requests as they are understood, answers and events as lines."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from engine.control.qmp.registry import Command
from engine.control.qmp.visitor import QmpError
from engine.errors import shown

VERSION: Final = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "ramferry-0.1.0"}
#: An answer repeats the id, and encoding it takes a call for each level.
ID_DEPTH_MAX: Final = 128
#: From here on C's `%.17g`, which QEMU prints a number with, has an exponent.
_WHOLE_NUMBERS_END: Final = 1e17

#: How a float begins to end that may be whole; that it stands in a string costs time only.
_MAYBE_WHOLE: Final = re.compile(rb"\.0[,}\]]|\de[+-]?\d")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """A request that names a command.

    :ivar arguments: as they came; nobody has looked at them."""

    command: Command
    arguments: Json


def greeting() -> bytes:
    return line({"QMP": {"version": VERSION, "capabilities": ["oob"]}})


def identity_of(request: object) -> Json:
    """`{"id": …}` for its answer; nothing where it has none, or none that can be repeated."""
    if not isinstance(request, dict) or "id" not in request or _is_deep(request["id"]):
        return {}
    return {"id": request["id"]}


def is_out_of_band(request: object) -> bool:
    return isinstance(request, dict) and "exec-oob" in request and "execute" not in request


def understand(request: object, find: Callable[[str], Command], *, oob: bool) -> Order:
    """What a request asks for.

    :param find: a command by its name, or raises QmpError.
    :param oob: the client has enabled `exec-oob`.
    :raise QmpError: nothing that there is; QEMU's text."""
    if not isinstance(request, dict):
        raise QmpError("QMP input must be a JSON object")
    verbs = ("execute", "exec-oob") if oob else ("execute",)
    for member, value in request.items():
        if member in verbs:
            if not isinstance(value, str):
                raise QmpError(f"QMP input member '{member}' must be a string")
        elif member == "arguments":
            if not isinstance(value, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise QmpError(f"QMP input member '{shown(member)}' is unexpected")
    given = [verb for verb in verbs if verb in request]
    if not given:
        raise QmpError("QMP input lacks member 'execute'")
    if len(given) > 1:
        raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
    if _is_deep(request.get("id")):
        raise QmpError(f"QMP input member 'id' nests deeper than {ID_DEPTH_MAX}")
    command = find(request[given[0]])
    if given[0] == "exec-oob" and not command.oob:
        raise QmpError(f"The command {command.name} does not support OOB")
    return Order(command, request.get("arguments", {}))


class Shared(dict[str, Any]):
    """An answer that may go to many clients: nobody changes it, and it is encoded once."""

    __slots__ = ("_encoded",)

    def encoded(self) -> bytes:
        """:raise UnicodeEncodeError: a string holds a surrogate."""
        try:
            return self._encoded
        except AttributeError:
            self._encoded: bytes = _encode(dict(self))
            return self._encoded


def answer_line(answer: object, identity: Json) -> bytes:
    """:raise UnicodeEncodeError: a string holds a surrogate.
    :raise TypeError: something has no JSON."""
    if not isinstance(answer, Shared):
        return line({"return": answer} | identity)
    end = b"," + line(identity)[1:] if identity else b"}\r\n"
    return b'{"return":' + answer.encoded() + end


def error_line(class_: str, text: str, identity: Json) -> bytes:
    text = text.encode(errors="backslashreplace").decode()  # a name of a file may be no UTF-8
    return line({"error": {"class": class_, "desc": text}} | identity)


def event_line(event: str, data: Json | None) -> bytes:
    """With the time of this moment."""
    now_us = time.time_ns() // 1000
    message: Json = {"event": event}
    if data is not None:
        message["data"] = data
    stamp = {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000}
    return line(message | {"timestamp": stamp})


def line(message: Json) -> bytes:
    """One message in ASCII, as QEMU's are; a float that is whole is written without a fraction.

    :raise UnicodeEncodeError: a string holds a surrogate.
    :raise TypeError: something has no JSON."""
    return _encode(message) + b"\r\n"


def _encode(message: Json) -> bytes:
    data = msgspec.json.encode(message)
    if _MAYBE_WHOLE.search(data):
        data = msgspec.json.encode(_as_printed(message))
    if not data.isascii():
        data = json.dumps(msgspec.json.decode(data), separators=(",", ":")).encode()
    return data


def _as_printed(value: Any) -> Any:
    if isinstance(value, float):
        is_whole = value.is_integer() and abs(value) < _WHOLE_NUMBERS_END
        return int(value) if is_whole else value
    if isinstance(value, dict):
        return {name: _as_printed(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_as_printed(item) for item in value]
    return value


def _is_deep(value: object) -> bool:
    """Whether it nests deeper than ID_DEPTH_MAX."""
    level = [value]
    for _ in range(ID_DEPTH_MAX):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return False
        level = inner
    return any(isinstance(one, dict | list) for one in level)
