"""Migrations that shall be encrypted: this build cannot, and sends none of them in the clear."""

from __future__ import annotations

from typing import Final

from engine.control.host import Host
from engine.errors import MigrationError, shown

CREDENTIALS: Final = "tls-creds-"  #: how the types of credentials begin


def check_encryption(host: Host) -> None:
    """Before anything is said to a peer.

    :raise MigrationError: `tls-creds` is set; QEMU's texts where it does not name credentials."""
    identity = host.parameters.tls_creds
    if not identity:
        return
    named = host.objects.find(identity)
    if named is None:
        raise MigrationError(f"No TLS credentials with id '{shown(identity)}'")
    if not named.type.startswith(CREDENTIALS):
        raise MigrationError(f"Object with id '{shown(identity)}' is not TLS credentials")
    raise MigrationError(
        "this build of ramferry encrypts no migration yet; without tls-creds it goes in the clear"
    )
