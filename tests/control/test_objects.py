"""User-created objects and jobs: what is kept, what is refused, and how much of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.control.jobs import (
    IDENTIFIER_CHARACTERS_MAX,
    JOBS_MAX,
    Jobs,
    JobType,
    is_identifier,
)
from engine.control.objects import OBJECTS_MAX, SECRET_BYTES_MAX, Objects
from engine.errors import UsageError


def test_a_secret_is_read_when_it_is_added(tmp_path: Path) -> None:
    objects, file = Objects(), tmp_path / "secret"
    file.write_bytes(b"in a file\n")
    objects.add("secret", "plain", {"data": "as it is"})
    objects.add("secret", "coded", {"data": "Y29kZWQ=", "format": "base64"})
    objects.add("secret", "filed", {"file": str(file)})
    file.unlink()
    found = [objects.find(name) for name in ("plain", "coded", "filed")]
    assert [one.data for one in found if one] == [b"as it is", b"coded", b"in a file\n"]
    objects.delete("coded")
    assert objects.find("coded") is None


def test_a_secret_is_not_shown() -> None:
    objects = Objects()
    with pytest.raises(UsageError) as refused:
        objects.add("secret", "bad", {"data": "Passw0rd!", "format": "base64"})
    assert "Passw0rd" not in str(refused.value)


def test_what_is_too_much_is_refused(tmp_path: Path) -> None:
    objects, file = Objects(), tmp_path / "secret"
    file.write_bytes(bytes(SECRET_BYTES_MAX + 1))
    with pytest.raises(UsageError, match=f"more than {SECRET_BYTES_MAX} bytes"):
        objects.add("secret", "large", {"file": str(file)})
    with pytest.raises(UsageError, match="Unable to read"):
        objects.add("secret", "nul", {"file": "a\0b"})
    with pytest.raises(UsageError, match=f"at most {SECRET_BYTES_MAX} bytes"):
        objects.add("secret", "long", {"data": "x" * (SECRET_BYTES_MAX + 1)})
    for index in range(OBJECTS_MAX):
        objects.add("tls-creds-anon", f"a{index}", {})
    with pytest.raises(UsageError, match="already"):
        objects.add("tls-creds-anon", "more", {})
    objects.delete("a0")
    objects.add("tls-creds-anon", "more", {})


def test_what_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    """A FIFO that nobody writes would hold the event loop for ever."""
    objects = Objects()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "keys.psk").mkdir()
    with pytest.raises(UsageError, match="Unable to read"):
        objects.add("secret", "one", {"file": str(tmp_path / "fifo")})
    psk = {"dir": str(tmp_path), "endpoint": "client"}
    with pytest.raises(UsageError, match="Cannot read PSK file"):
        objects.add("tls-creds-psk", "two", psk)
    (tmp_path / "keys.psk").rmdir()
    os.mkfifo(tmp_path / "keys.psk")
    with pytest.raises(UsageError, match="Cannot read PSK file"):
        objects.add("tls-creds-psk", "two", psk)


def test_an_id_has_an_end() -> None:
    assert is_identifier("j" * IDENTIFIER_CHARACTERS_MAX)
    assert not is_identifier("j" * (IDENTIFIER_CHARACTERS_MAX + 1))


def test_an_object_that_is_refused_can_be_added_rightly(tmp_path: Path) -> None:
    objects = Objects()
    given = {"dir": str(tmp_path), "endpoint": "server"}
    with pytest.raises(UsageError, match=r"Unable to access credentials .*/keys\.psk: No such"):
        objects.add("tls-creds-psk", "creds", given)
    (tmp_path / "keys.psk").write_text("qemu:0011")
    objects.add("tls-creds-psk", "creds", given)
    objects.add("tls-creds-psk", "client", given | {"endpoint": "client"})
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        with pytest.raises(UsageError, match=f"Unable to access credentials .*/{name}"):
            objects.add("tls-creds-x509", "x509", given)
        (tmp_path / name).touch()
    objects.add("tls-creds-x509", "x509", given)


def test_a_job_is_told_until_it_is_dismissed() -> None:
    told: list[tuple[object, object]] = []
    jobs = Jobs(lambda name, data: told.append((name, data["status"])))
    jobs.fail_snapshot("j", JobType.SNAPSHOT_SAVE, ["disk"])
    assert jobs.query()[0]["error"] == "No block device node 'disk'"
    jobs.dismiss("j")
    statuses = ["created", "running", "aborting", "concluded", "null"]
    assert told == [("JOB_STATUS_CHANGE", status) for status in statuses]
    with pytest.raises(UsageError, match=r"^Job not found$"):
        jobs.refuse("j", "cancel")


def test_there_are_only_so_many_jobs() -> None:
    jobs = Jobs(lambda _name, _data: None)
    for index in range(JOBS_MAX):
        jobs.fail_snapshot(f"j{index}", JobType.SNAPSHOT_DELETE, [])
    with pytest.raises(UsageError, match="already"):
        jobs.fail_snapshot("more", JobType.SNAPSHOT_DELETE, [])
