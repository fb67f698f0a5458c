# SPDX-License-Identifier: Apache-2.0
"""Signing a set: `flashinfer.jit.trust` says with what, and checks it."""

from __future__ import annotations

from pathlib import Path

from flashinfer.aot import verify
from flashinfer.errors import FlashInferError
from flashinfer.jit import trust
from flashinfer.jit.stores import Registry

_MAX_LISTED = 10


def sign(root: Path, key: Path) -> int:
    """Sign the registry of a set, in place of a signature that it may have. Returns how many kernels it is of.

    Args:
        root: the folder of the set.
        key: a private key of Ed25519 in PEM (PKCS 8), not encrypted.

    Raises:
        FlashInferError: there is no set, one of its files is not what the registry says, the key is none or of another
            kind, the signature cannot be written, or `cryptography` is not there. The set is as it was.
    """
    try:
        registry = Registry(root)
    except (OSError, ValueError) as error:
        raise FlashInferError(f"{root}: no usable registry: {error}") from None
    try:
        private = trust.private_key(key)
    except trust.Untrusted as error:
        raise FlashInferError(str(error)) from None
    wrong = [f"{entry.file} {why}" for entry in registry.entries for why in verify.damage(root, entry)]
    if wrong:
        more = f"\n  ... and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        lines = "".join(f"\n  {line}" for line in wrong[:_MAX_LISTED])
        raise FlashInferError(f"{root} is damaged and is not signed; build it again:{lines}{more}")
    path, partial = root / trust.SIGNATURE, root / f"{trust.SIGNATURE}.partial"
    try:
        partial.write_bytes(private.sign(registry.content))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FlashInferError(f"{path} cannot be written: {error.strerror}; expected a folder of your own") from None
    return len(registry.entries)
