"""`object-add` and `object-del`: credentials, authorization, secrets."""

from __future__ import annotations

import enum
from typing import Any, Final

from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry
from engine.control.qmp.visitor import Union


class Endpoint(enum.Enum):
    """QAPI QCryptoTLSCredsEndpoint."""

    CLIENT = "client"
    SERVER = "server"


class ListPolicy(enum.Enum):
    """QAPI QAuthZListPolicy."""

    DENY = "deny"
    ALLOW = "allow"


class ListFormat(enum.Enum):
    """QAPI QAuthZListFormat."""

    EXACT = "exact"
    GLOB = "glob"


class SecretFormat(enum.Enum):
    """QAPI QCryptoSecretFormat."""

    RAW = "raw"
    BASE64 = "base64"


class Object(Arguments, frozen=True):
    """What every object has."""

    id: str


class TlsCreds(Object, frozen=True):
    """QAPI TlsCredsProperties."""

    verify_peer: bool | None = None
    dir: str | None = None
    endpoint: Endpoint | None = None
    priority: str | None = None


class TlsCredsPsk(TlsCreds, frozen=True):
    """QAPI TlsCredsPskProperties."""

    username: str | None = None


class TlsCredsX509(TlsCreds, frozen=True):
    """QAPI TlsCredsX509Properties."""

    sanity_check: bool | None = None
    passwordid: str | None = None


class AuthzSimple(Object, frozen=True):
    """QAPI AuthZSimpleProperties."""

    identity: str


class ListRule(Arguments, frozen=True):
    """QAPI QAuthZListRule."""

    match: str
    policy: ListPolicy
    format: ListFormat | None = None


class AuthzList(Object, frozen=True):
    """QAPI AuthZListProperties."""

    policy: ListPolicy | None = None
    rules: list[ListRule] | None = None


class Secret(Object, frozen=True):
    """QAPI SecretProperties."""

    format: SecretFormat | None = None
    keyid: str | None = None
    iv: str | None = None
    data: str | None = None
    file: str | None = None


class ObjectDel(Arguments, frozen=True):
    """The object's id."""

    id: str


OBJECT_ADD: Final = Union(
    "qom-type",
    {
        "authz-list": AuthzList,
        "authz-simple": AuthzSimple,
        "secret": Secret,
        "tls-creds-anon": TlsCreds,
        "tls-creds-psk": TlsCredsPsk,
        "tls-creds-x509": TlsCredsX509,
    },
)


class UserObjects:
    """Handlers; the control process keeps the objects."""

    def __init__(self, process: ControlProcess) -> None:
        self._objects = process.objects

    async def add(self, given: dict[str, Any]) -> None:
        properties = {
            name: value.value if isinstance(value, enum.Enum) else value
            for name, value in given.items()
            if name not in ("qom-type", "id")
        }
        self._objects.add(given["qom-type"], given["id"], properties)

    async def delete(self, asked: ObjectDel) -> None:
        self._objects.delete(asked.id)


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = UserObjects(process)
    registry.add("object-add", commands.add, OBJECT_ADD)
    registry.add("object-del", commands.delete, ObjectDel)
