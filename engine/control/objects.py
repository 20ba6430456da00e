"""User-created objects: credentials, authorization and secrets, as `object-add` makes them
(QEMU: qom/object_interfaces.c, crypto/, authz/).

They are checked as far as QEMU checks them without its crypto library, and kept until they are
deleted. A secret's data is read when it is added, as QEMU does, so a file may go afterwards.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.control.jobs import is_identifier
from engine.errors import UsageError, shown

OBJECTS_MAX: Final = 256
SECRET_BYTES_MAX: Final = 64 * 1024
PSK_BYTES_MAX: Final = 1024 * 1024
PSK_FILE: Final = "keys.psk"
USERNAME_DEFAULT: Final = "qemu"
#: Which files of a directory each endpoint needs, and which it reads if they are there.
X509_NEEDED: Final = {
    "server": ("ca-cert.pem", "server-cert.pem", "server-key.pem"),
    "client": ("ca-cert.pem",),
}


@dataclass(frozen=True, slots=True)
class UserObject:
    """One object.

    :ivar properties: as they were given.
    :ivar data: of a secret, decoded; else empty."""

    id: str
    type: str
    properties: Mapping[str, Any]
    data: bytes = b""


class Objects:
    """All user-created objects of one process."""

    def __init__(self) -> None:
        self._objects: dict[str, UserObject] = {}  #: never more than OBJECTS_MAX

    def add(self, type_: str, identity: str, properties: Mapping[str, Any]) -> None:
        """Check and keep one, in QEMU's order.

        :raise UsageError: QEMU's text for what is wrong; nothing was added."""
        if not is_identifier(identity):
            raise UsageError("Parameter 'id' expects an identifier")
        if identity in self._objects:
            raise UsageError(
                f"attempt to add duplicate property '{identity}' to object (type 'container')"
            )
        if len(self._objects) >= OBJECTS_MAX:
            raise UsageError(f"there are {OBJECTS_MAX} objects already; delete some")
        data = b""
        match type_:
            case "tls-creds-psk":
                _check_psk(properties)
            case "tls-creds-x509":
                _check_x509(properties)
            case "secret":
                data = self._read_secret(properties)
        self._objects[identity] = UserObject(identity, type_, dict(properties), data)

    def delete(self, identity: str) -> None:
        """:raise UsageError: there is no such object."""
        if self._objects.pop(identity, None) is None:
            raise UsageError(f"object '{shown(identity)}' not found")

    def find(self, identity: str) -> UserObject | None:
        """For whoever names an object in a parameter."""
        return self._objects.get(identity)

    # -- secrets ---------------------------------------------------------------------------------

    def _read_secret(self, properties: Mapping[str, Any]) -> bytes:
        data, path = properties.get("data"), properties.get("file")
        if data is not None and path is not None:
            raise UsageError("'file' and 'data' are mutually exclusive")
        if path is not None:
            content = _read(path)
        elif data is not None:
            content = str(data).encode()
            if len(content) > SECRET_BYTES_MAX:
                raise UsageError(f"a secret has at most {SECRET_BYTES_MAX} bytes")
        else:
            raise UsageError("Either 'file' or 'data' must be provided")
        if (key_id := properties.get("keyid")) is not None:
            self._refuse_encrypted(key_id)
        if properties.get("format") == "base64":
            try:
                return base64.b64decode(content, validate=True)
            except (binascii.Error, ValueError):
                raise UsageError("Base64 data contains invalid characters") from None
        return content

    def _refuse_encrypted(self, key_id: str) -> None:
        """:raise UsageError: always."""
        key = self._objects.get(key_id)
        if key is None:
            raise UsageError(f"No secret with id '{shown(key_id)}'")
        if key.type != "secret":
            raise UsageError(f"Object with id '{shown(key_id)}' is not a secret")
        if len(key.data) != 32:
            raise UsageError("Key should be 32 bytes in length")
        raise UsageError(
            "ramferry cannot decrypt a secret; give its data without 'keyid', or in a 'file'"
        )


def _read(path: str) -> bytes:
    try:
        content = _read_file(path, SECRET_BYTES_MAX + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(
            f"Unable to read {shown(path)}: Failed to open file “{shown(path)}”: {reason}"
        ) from exc
    if len(content) > SECRET_BYTES_MAX:
        raise UsageError(f"Unable to read {shown(path)}: more than {SECRET_BYTES_MAX} bytes")
    return content


def _read_file(path: str, size: int) -> bytes:
    """The beginning of a regular file: what is none could keep us waiting for ever.

    :raise OSError: there is none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.read(fd, size)
    finally:
        os.close(fd)


def _directory(properties: Mapping[str, Any]) -> str:
    directory = properties.get("dir")
    if directory is None:
        raise UsageError("Missing 'dir' property value")
    return str(directory)


def _check_readable(path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(f"Unable to access credentials {shown(path)}: {reason}") from exc


def _check_psk(properties: Mapping[str, Any]) -> None:
    directory, username = _directory(properties), properties.get("username")
    path = f"{directory}/{PSK_FILE}"
    is_server = properties.get("endpoint") == "server"
    if is_server and username is not None:
        raise UsageError("username should not be set when endpoint=server")
    _check_readable(path)
    if is_server:
        return
    wanted = USERNAME_DEFAULT if username is None else str(username)
    try:
        lines = _read_file(path, PSK_BYTES_MAX).splitlines()
    except OSError as exc:
        raise UsageError(f"Cannot read PSK file {shown(path)}: {exc.strerror}") from exc
    if not any(line.startswith(wanted.encode() + b":") for line in lines):
        raise UsageError(f"Username {shown(wanted)} not found in PSK file {shown(path)}")


def _check_x509(properties: Mapping[str, Any]) -> None:
    directory = _directory(properties)
    endpoint = properties.get("endpoint") or "client"
    for name in X509_NEEDED[endpoint]:
        _check_readable(f"{directory}/{name}")
