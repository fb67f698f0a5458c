# SPDX-License-Identifier: Apache-2.0
"""Signed sets: FLASHINFER_AOT_TRUST lets what a trusted key has signed answer, and nothing else, whatever is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashinfer import env
from flashinfer.aot import advice, build
from flashinfer.aot.config import read_specs
from flashinfer.jit import trust
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.stores import AotStore, Hit, Registry, Rejected
from tests.aot.kit import HOST, artifacts, change_registry, copy_set, rmsnorm_rows, run_cli, tree, write_config
from tests.kit import PATIENCE_SECONDS, CountingCxx, miss_records, rmsnorm_spec, run_rmsnorm

pytest.importorskip("cryptography", reason="signatures need cryptography (extra trust)")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519

PRIVATE = serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo
OPEN = serialization.NoEncryption()


class Key:
    """A key pair, in two files of a folder."""

    def __init__(self, folder: Path, key: Any = None, encryption: Any = OPEN) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        key = key or ed25519.Ed25519PrivateKey.generate()
        self.private, self.public = folder / "private.key", folder / "public.pem"
        self.private.write_bytes(key.private_bytes(serialization.Encoding.PEM, PRIVATE, encryption))
        self.public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, PUBLIC))


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key(tmp_path / "key")


@pytest.fixture
def signed(host_copy: Path, key: Key) -> Path:
    assert run_cli("aot", "sign", host_copy, "--key", key.private) == 0
    return host_copy


@pytest.fixture
def trusting(key: Key, monkeypatch: pytest.MonkeyPatch) -> Key:
    monkeypatch.setenv(env.AOT_TRUST.name, str(key.public))
    return key


def reason(*roots: Path) -> str:
    answer = AotStore(list(roots)).find(rmsnorm_spec())
    assert isinstance(answer, Rejected), "the set answered"
    return answer.reason


# ----------------------------------------------------------------------------------------------------------- it answers


def test_a_signed_set_answers(signed: Path, trusting: Key, tmp_path: Path) -> None:
    compiler = CountingCxx()
    run_rmsnorm(Resolver(AotStore([signed]), tmp_path / "cache", lambda kind: compiler).load(rmsnorm_spec()))
    assert compiler.num_compiles == 0 and not (tmp_path / "cache" / "misses").exists()


def test_any_key_of_a_folder_will_do(signed: Path, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    Key(keys)
    (keys / "README").write_text("who has which key")
    (keys / "broken.pem").write_text("no key")
    (keys / "folder.pem").mkdir()
    os.mkfifo(keys / "pipe.pem")
    monkeypatch.setenv(env.AOT_TRUST.name, str(keys))
    assert "broken.pem is no public key in PEM" in reason(signed)
    shutil.copy(key.public, keys / "release.pem")
    assert isinstance(AotStore([signed]).find(rmsnorm_spec()), Hit)


def test_a_set_without_trust_asks_for_no_signature(signed: Path) -> None:
    """Nor for `cryptography`."""
    code = """
import sys
from pathlib import Path
from flashinfer.jit.stores import AotStore
from tests.kit import rmsnorm_spec
answer = AotStore([Path(sys.argv[1])]).find(rmsnorm_spec())
print(type(answer).__name__, "cryptography" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(signed)], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout.split() == ["Hit", "False"]


def test_openssl_agrees(signed: Path, key: Key) -> None:
    """The signature is plain Ed25519 of the file, so that a key store or an auditor needs nothing of ours."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", key.public, "-rawin", "-in", signed / "registry.json"]
    subprocess.run(
        [*command, "-sigfile", signed / trust.SIGNATURE], check=True, timeout=PATIENCE_SECONDS, capture_output=True
    )


def test_it_is_checked_once(signed: Path, trusting: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    check = trust.check
    monkeypatch.setattr(trust, "check", lambda *args: calls.append(args) or check(*args))
    store = AotStore([signed])
    for hidden_size in (64, 128, 64, 192):
        store.find(rmsnorm_spec(hidden_size))
    assert len(calls) == 1


def test_what_is_loaded_is_what_was_checked(signed: Path, trusting: Key, tmp_path: Path) -> None:
    """Another may write to the folder between the check of a library and its loading."""
    answer = AotStore([signed]).find(rmsnorm_spec())
    assert isinstance(answer, Hit) and answer.path is None


# ------------------------------------------------------------------------------------------------------------ it is not


def unsigned(root: Path, key: Key) -> None:
    (root / trust.SIGNATURE).unlink()


def truncated(root: Path, key: Key) -> None:
    (root / trust.SIGNATURE).write_bytes((root / trust.SIGNATURE).read_bytes()[:63])


def lengthened(root: Path, key: Key) -> None:
    (root / trust.SIGNATURE).write_bytes((root / trust.SIGNATURE).read_bytes() + b"\n")


def empty(root: Path, key: Key) -> None:
    (root / trust.SIGNATURE).write_bytes(b"")


def a_folder(root: Path, key: Key) -> None:
    unsigned(root, key)
    (root / trust.SIGNATURE).mkdir()


def a_pipe(root: Path, key: Key) -> None:
    unsigned(root, key)
    os.mkfifo(root / trust.SIGNATURE)


def a_link_to_nothing(root: Path, key: Key) -> None:
    unsigned(root, key)
    (root / trust.SIGNATURE).symlink_to("nowhere")


def a_bit_of_the_signature(root: Path, key: Key) -> None:
    signature = bytearray((root / trust.SIGNATURE).read_bytes())
    signature[5] ^= 1
    (root / trust.SIGNATURE).write_bytes(signature)


def the_registry_after_signing(root: Path, key: Key) -> None:
    change_registry(root, version="9.9")


def a_space_of_the_registry(root: Path, key: Key) -> None:
    with open(root / "registry.json", "a") as file:
        file.write(" ")


def signed_by_another(root: Path, key: Key) -> None:
    assert run_cli("aot", "sign", root, "--key", Key(key.private.parent.parent / "other").private) == 0


def no_key(root: Path, key: Key) -> None:
    key.public.unlink()


def a_folder_without_keys(root: Path, key: Key) -> None:
    key.public.unlink()
    key.public.mkdir()


def the_private_key(root: Path, key: Key) -> None:
    shutil.copy(key.private, key.public)


def a_key_cut_short(root: Path, key: Key) -> None:
    key.public.write_bytes(key.public.read_bytes()[:-40])


def a_key_of(make: Callable[[], Any]) -> Callable[[Path, Key], None]:
    def other(root: Path, key: Key) -> None:
        shutil.copy(Key(key.private.parent.parent / "other", make()).public, key.public)

    return other


DOES_NOT_FIT = "does not fit: registry.json was changed after it was signed, or signed with another key than"
FAULTS = [
    (unsigned, "it is not signed: there is no registry.json.sig; next step: flashinfer aot sign"),
    (truncated, "registry.json.sig has 63 bytes; expected 64"),
    (lengthened, "registry.json.sig has more; expected 64"),
    (empty, "registry.json.sig has 0 bytes; expected 64"),
    (a_folder, "registry.json.sig is no file"),
    (a_pipe, "registry.json.sig is no file"),
    (a_link_to_nothing, "registry.json.sig is no file"),
    (a_bit_of_the_signature, DOES_NOT_FIT),
    (the_registry_after_signing, DOES_NOT_FIT),
    (a_space_of_the_registry, DOES_NOT_FIT),
    (signed_by_another, DOES_NOT_FIT),
    (no_key, "expected a public key in PEM, or a folder of them (FLASHINFER_AOT_TRUST)"),
    (a_folder_without_keys, "holds no public key; expected files *.pem"),
    (the_private_key, "is a private key; expected the public one"),
    (a_key_cut_short, "is no public key in PEM"),
    (a_key_of(lambda: rsa.generate_private_key(65537, 2048)), "is a public key of another kind, RSAPublicKey"),
    (a_key_of(lambda: ec.generate_private_key(ec.SECP256R1())), "of another kind, E"),
    (a_key_of(ed448.Ed448PrivateKey.generate), "of another kind, Ed448PublicKey; expected one of Ed25519"),
    (a_key_of(x25519.X25519PrivateKey.generate), "of another kind, X25519PublicKey"),
]


@pytest.mark.parametrize("fault, why", FAULTS)
def test_it_is_rejected_and_says_why(
    fault: Callable[[Path, Key], None],
    why: str,
    signed: Path,
    trusting: Key,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
) -> None:
    fault(signed, trusting)
    assert reason(signed).startswith(f"the kernel registry in {signed} is not trusted: ") and why in reason(signed)
    assert len(warnings()) == 1
    compiler = CountingCxx()
    run_rmsnorm(Resolver(AotStore([signed]), tmp_path / "cache", lambda kind: compiler).load(rmsnorm_spec()))
    assert compiler.num_compiles == 1
    (miss,) = miss_records(tmp_path / "cache" / "misses")
    assert miss.reason == reason(signed)
    assert advice.next_step(miss.reason).startswith("flashinfer aot sign, or a set that a key of FLASHINFER_AOT_TRUST")


def test_machine_code_changed_after_signing(signed: Path, trusting: Key) -> None:
    for path in artifacts(signed):
        path.write_bytes(path.read_bytes() + b"\0")
    assert reason(signed).startswith("sha256 mismatch of ")


def test_a_signed_set_answers_behind_one_that_is_not(signed: Path, trusting: Key, tmp_path: Path) -> None:
    other = copy_set(signed, tmp_path / "other")
    (other / trust.SIGNATURE).unlink()
    store = AotStore([other, signed])
    assert isinstance(store.find(rmsnorm_spec()), Hit)
    assert [registry.root for registry in store.registries] == [signed]


PACKAGES = {
    "absent": None,
    "in part": "",
    "broken": "raise ImportError('libssl.so.3: cannot open shared object file')",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_without_cryptography(
    package: str,
    signed: Path,
    trusting: Key,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What cannot be checked is not trusted."""
    before = tree(signed)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    if PACKAGES[package] is None:
        monkeypatch.setitem(sys.modules, "cryptography", None)
    else:
        (tmp_path / "site" / "cryptography").mkdir(parents=True)
        (tmp_path / "site" / "cryptography" / "__init__.py").write_text(PACKAGES[package] or "")
        monkeypatch.syspath_prepend(tmp_path / "site")
    assert "signatures cannot be checked or made without the package cryptography" in reason(signed)
    assert "next step: pip install 'cryptography>=3.4', as the extra flashinfer[trust] does" in reason(signed)
    assert advice.next_step(reason(signed)) == 'pip install "flashinfer[trust]"'
    assert run_cli("aot", "sign", signed, "--key", trusting.private) == 1
    assert run_cli("aot", "verify", signed) == 1
    assert capsys.readouterr().err.count("pip install 'cryptography>=3.4'") == 2
    assert tree(signed) == before


def test_resolve_and_doctor_say_why(
    signed: Path, trusting: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.AOT_PATH.name, str(signed))
    config = write_config(tmp_path, rmsnorm_rows(64))
    asked = ["resolve", "--config", config, "--target", HOST, "--require", "aot"]
    assert run_cli(*asked) == 0
    run_cli("doctor")
    assert f"in {signed}, signed with {trusting.public}" in capsys.readouterr().out
    the_registry_after_signing(signed, trusting)
    assert run_cli(*asked) == 1
    assert "registry.json was changed after it was signed" in capsys.readouterr().out
    assert run_cli("doctor") == 1
    assert f"{signed} is not trusted: registry.json.sig does not fit" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- sign, verify


def test_verify_checks_the_signature(signed: Path, key: Key, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "verify", signed, "--key", key.public) == 0
    assert f"all sound, signed with {key.public}" in capsys.readouterr().out
    assert run_cli("aot", "verify", signed) == 0
    assert "all sound, its signature not checked (--key PUBLIC)" in capsys.readouterr().out
    unsigned(signed, key)
    assert run_cli("aot", "verify", signed) == 0
    assert capsys.readouterr().out.endswith("all sound\n")
    assert run_cli("aot", "verify", signed, "--key", key.public) == 1
    assert "it is not signed" in capsys.readouterr().err


def test_verify_asks_the_setting(signed: Path, trusting: Key, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "verify", signed) == 0
    assert f"signed with {trusting.public}" in capsys.readouterr().out
    signed_by_another(signed, trusting)
    assert run_cli("aot", "verify", signed) == 1


def test_signing_again_changes_nothing(signed: Path, key: Key) -> None:
    before = tree(signed)
    assert run_cli("aot", "sign", signed, "--key", key.private) == 0
    assert tree(signed) == before


def refused_keys(folder: Path) -> dict[str, Path]:
    encryption = serialization.BestAvailableEncryption(b"secret")
    (folder / "empty").write_bytes(b"")
    return {
        "is a public key": Key(folder / "public").public,
        "is encrypted; next step: openssl pkey -in": Key(folder / "encrypted", None, encryption).private,
        "of another kind, RSAPrivateKey": Key(folder / "rsa", rsa.generate_private_key(65537, 2048)).private,
        "of another kind, Ed448PrivateKey": Key(folder / "448", ed448.Ed448PrivateKey.generate()).private,
        "is no private key in PEM": folder / "empty",
        "is unreadable: No such file": folder / "nowhere",
        "is unreadable: Is a directory": folder,
    }


def test_keys_that_cannot_sign(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(signed)
    for why, path in refused_keys(tmp_path).items():
        assert run_cli("aot", "sign", signed, "--key", path) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"flashinfer: {path} ") and why in err
    assert tree(signed) == before


def test_what_is_damaged_is_not_signed(host_copy: Path, key: Key, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts(host_copy)[0].write_bytes(b"")
    before = tree(host_copy)
    assert run_cli("aot", "sign", host_copy, "--key", key.private) == 1
    assert "is damaged and is not signed" in capsys.readouterr().err
    (host_copy / "registry.json").write_text("{")
    assert run_cli("aot", "sign", host_copy, "--key", key.private) == 1
    assert "no usable registry" in capsys.readouterr().err
    assert tree(host_copy).keys() == before.keys()


def test_a_signature_that_cannot_be_written(host_copy: Path, key: Key, capsys: pytest.CaptureFixture[str]) -> None:
    (host_copy / trust.SIGNATURE).mkdir()
    before = tree(host_copy)
    assert run_cli("aot", "sign", host_copy, "--key", key.private) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert tree(host_copy) == before


def test_a_build_that_changes_a_set_takes_its_signature_off(signed: Path, key: Key, tmp_path: Path) -> None:
    def add(*hidden_sizes: int) -> None:
        build.build(read_specs([write_config(tmp_path, rmsnorm_rows(*hidden_sizes))], [HOST]), signed)

    add(64)
    assert Registry(signed, key.public).signer == key.public, "nothing was to be done"
    add(192)
    assert not (signed / trust.SIGNATURE).exists()
