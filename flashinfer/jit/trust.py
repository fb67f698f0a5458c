# SPDX-License-Identifier: Apache-2.0
"""Who made a set: the signature of its registry, which holds the sha256 of each file of machine code.

    registry.json.sig    Ed25519, the 64 bytes of RFC 8032 over registry.json as it lies there

`openssl pkeyutl -verify -rawin` checks the same. `flashinfer.aot.signing` makes one. Nothing here runs, and
`cryptography` is not imported, unless FLASHINFER_AOT_TRUST or a command asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashinfer import env, packages

SIGNATURE = "registry.json.sig"
SIGNATURE_BYTES = 64  # of any Ed25519 signature

_TOO_LARGE_FOR_A_KEY = 1 << 16
_HOW_TO_SIGN = "next step: flashinfer aot sign SET --key KEY.pem, or a set that is signed"


class Untrusted(ValueError):
    """A set is not signed with a trusted key, or that cannot be found out. The message says why and what to do."""


def check(root: Path, registry: bytes, keys: Path) -> Path:
    """The key that the registry of a set is signed with.

    Args:
        root: the folder of the set.
        registry: the content of its registry.json.
        keys: a public key of Ed25519 in PEM, or a folder of such files, *.pem.

    Raises:
        Untrusted: there is no signature, no key that it fits, no usable key, or no `cryptography`.
    """
    library = cryptography()
    trusted, unusable = _public_keys(keys, library)
    signature = _signature(root)
    for path, key in trusted:
        with contextlib.suppress(library.mismatch):
            key.verify(signature, registry)
            return path
    tried = ", ".join(str(path) for path, _ in trusted)
    raise Untrusted(
        f"{SIGNATURE} does not fit: registry.json was changed after it was signed, or signed with another key than "
        f"{tried}{''.join(f'; {why}' for why in unusable)}; {_HOW_TO_SIGN}"
    )


def _signature(root: Path) -> bytes:
    path = root / SIGNATURE
    if not path.exists() and not path.is_symlink():
        raise Untrusted(f"it is not signed: there is no {SIGNATURE}; {_HOW_TO_SIGN}")
    if not path.is_file():  # opening a pipe would wait
        raise Untrusted(f"{SIGNATURE} is no file; {_HOW_TO_SIGN}")
    try:
        with open(path, "rb") as file:
            signature = file.read(SIGNATURE_BYTES + 1)
    except OSError as error:
        raise Untrusted(f"{SIGNATURE} is unreadable: {error.strerror}") from None
    if len(signature) != SIGNATURE_BYTES:
        found = f"{len(signature)} bytes" if len(signature) < SIGNATURE_BYTES else "more"
        raise Untrusted(f"{SIGNATURE} has {found}; expected {SIGNATURE_BYTES}, of Ed25519; {_HOW_TO_SIGN}")
    return signature


# ---------------------------------------------------------------------------------------------------------------- keys


def _public_keys(where: Path, library: Cryptography) -> tuple[list[tuple[Path, Any]], list[str]]:
    """The keys of a file or folder, and what is wrong with the other files. Raises Untrusted where there is no key."""
    if not where.exists():
        raise Untrusted(
            f"there is no {where}; expected a public key in PEM, or a folder of them ({env.AOT_TRUST.name})"
        )
    keys, unusable = [], []
    folder = [path for path in sorted(where.glob("*.pem")) if path.is_file()]
    for path in folder if where.is_dir() else [where]:
        try:
            keys.append((path, _public_key(path, library)))
        except ValueError as error:
            unusable.append(f"{path} {error}")
    if not keys:
        raise Untrusted("; ".join(unusable) or f"{where} holds no public key; expected files *.pem")
    return keys, unusable


def _public_key(path: Path, library: Cryptography) -> Any:
    """Raises ValueError; the message goes on from the name of the file."""
    text = _read(path)
    if b"PRIVATE KEY" in text:
        raise ValueError(f"is a private key; expected the public one: openssl pkey -in {path} -pubout")
    return _of_kind(library.public, lambda: library.load_pem_public_key(text), "public", library)


def private_key(path: Path) -> Any:
    """The key of a file, of Ed25519. Raises Untrusted, a ValueError, when it is none or cannot be read."""
    library = cryptography()
    try:
        text = _read(path)
        if b"PUBLIC KEY" in text:
            raise ValueError("is a public key; expected the private one of Ed25519")
        if b"ENCRYPTED" in text:
            raise ValueError(
                f"is encrypted; next step: openssl pkey -in {path} | flashinfer aot sign SET --key /dev/stdin, which "
                "asks for the password"
            )
        return _of_kind(library.private, lambda: library.load_pem_private_key(text, None), "private", library)
    except ValueError as error:
        raise Untrusted(f"{path} {error}") from None


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_TOO_LARGE_FOR_A_KEY)
    except OSError as error:
        raise ValueError(f"is unreadable: {error.strerror}") from None


def _of_kind(kind: type, load: Callable[[], Any], what: str, library: Cryptography) -> Any:
    try:
        key = load()
    except library.refusals as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"is no {what} key in PEM ({why:.80}); expected one of Ed25519") from None
    if not isinstance(key, kind):
        raise ValueError(f"is a {what} key of another kind, {type(key).__name__.strip('_')}; expected one of Ed25519")
    return key


# -------------------------------------------------------------------------------------------------------- cryptography


@dataclass(frozen=True)
class Cryptography:
    """What is used of the package."""

    load_pem_public_key: Any
    load_pem_private_key: Any
    public: Any  # classes of keys
    private: Any
    refusals: tuple[type[Exception], ...]  # of a file that is no key
    mismatch: type[Exception]  # of a signature


def cryptography() -> Cryptography:
    """Raises Untrusted where it cannot be imported."""
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise Untrusted(
            f"signatures cannot be checked or made without the package cryptography ({error}); next step: "
            f"{packages.pip_install(packages.TRUST.values())}, as the extra flashinfer[trust] does"
        ) from None
    refusals = (ValueError, TypeError, UnsupportedAlgorithm)
    keys = Ed25519PublicKey, Ed25519PrivateKey
    return Cryptography(load_pem_public_key, load_pem_private_key, *keys, refusals, InvalidSignature)
