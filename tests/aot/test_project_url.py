# SPDX-License-Identifier: Apache-2.0
"""Where the packages' pages lead: to the repository that they were packed from, and never to its credentials."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.aot.wheels_kit import FORK_URL, PROJECT_URL, build_index, metadata_of

pytest.importorskip("setuptools", minversion="77", reason="building wheels offline needs setuptools (group test)")

import packing

SECRET = "s3cr3t"


# ------------------------------------------------------------------------------------------------- what an address is


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/owner/name.git", "https://github.com/owner/name"),
        ("https://github.com/owner/name/", "https://github.com/owner/name"),
        ("http://code.example.com:8080/group/sub/name", "http://code.example.com:8080/group/sub/name"),
        ("git@github.com:owner/name.git", "https://github.com/owner/name"),
        ("gitlab.example.com:group/sub/name.git", "https://gitlab.example.com/group/sub/name"),
        ("ssh://git@code.example.com:2222/~owner/name.git", "https://code.example.com/~owner/name"),
        ("HTTPS://GitHub.com/Owner/Name", "https://github.com/Owner/Name"),
    ],
)
def test_a_remote_has_a_page(remote: str, address: str) -> None:
    assert packing.web_address(remote) == address


@pytest.mark.parametrize(
    "remote",
    [
        f"https://user:{SECRET}@github.com/owner/name.git",
        f"https://{SECRET}@github.com/owner/name",
        f"ssh://user:{SECRET}@github.com/owner/name.git",
        f"{SECRET}@github.com:owner/name.git",
        f"https://github.com/owner/name?private_token={SECRET}#{SECRET}",
    ],
)
def test_credentials_stay_behind(remote: str) -> None:
    assert packing.web_address(remote) == "https://github.com/owner/name"


@pytest.mark.parametrize(
    "remote",
    [
        "",
        "/srv/git/name.git",
        "../name",
        "file:///srv/git/name.git",
        "git@code.example.com:/srv/git/name.git",
        "git://code.example.com/owner/name",
        "github.com",
        "https://github.com",
        "work:owner/name.git",  # a host of somebody's own ~/.ssh/config
        "http://localhost/owner/name",
        "http://proxy@127.0.0.1:34567/git/owner/name",
        "http://[::1]/owner/name",
        "https://github.com:port/owner/name",
        "https://github.com/owner/na me",
        "https://github.com/owner/name\nRequires-Dist: evil",
        # credentials spelt wrongly
        f"https://user:pass/{SECRET}@github.com/owner/name",
        f"https://us.er/{SECRET}@github.com/owner/name",
        f"user:{SECRET}@github.com/owner/name",
        f"user:{SECRET}@github.com:owner/name",
    ],
)
def test_what_has_no_page(remote: str) -> None:
    assert packing.web_address(remote) == ""


def test_links_lead_into_repositories_of_known_hosts() -> None:
    for url, inside in (
        ("https://github.com/owner/name", "https://github.com/owner/name"),
        ("https://gitlab.example.com/a/b/name", "https://gitlab.example.com/a/b/name/-"),
    ):
        assert packing.project_urls(url) == {
            "Homepage": url,
            "Source": url,
            "Documentation": f"{inside}/tree/HEAD/docs",
            "Changelog": f"{inside}/blob/HEAD/CHANGELOG.md",
            "Issues": f"{inside}/issues",
        }
    other = "https://code.example.com/github/name"
    assert packing.project_urls(other) == {"Homepage": other, "Source": other}
    assert packing.project_urls("") == {}


# ------------------------------------------------------------------------------------------------------ who names it


def checkout(folder: Path, remote: str) -> Path:
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    subprocess.run(["git", "-C", folder, "remote", "add", "origin", remote], check=True)
    return folder


def test_the_variable_comes_before_the_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path / "fork", f"https://user:{SECRET}@github.com/fork/name.git")
    monkeypatch.delenv(packing.PROJECT_URL, raising=False)
    assert packing.project_url(root) == FORK_URL
    assert packing.project_url(root / "flashinfer_aot", root) == FORK_URL
    for value, expected in ((PROJECT_URL, PROJECT_URL), ("git@github.com:owner/name.git", PROJECT_URL), ("", "")):
        monkeypatch.setenv(packing.PROJECT_URL, value)
        assert packing.project_url(root) == expected
    monkeypatch.setenv(packing.PROJECT_URL, f"https://{SECRET}/name")
    with pytest.raises(ValueError, match="is no address of a repository; expected https://host/owner/name") as caught:
        packing.project_url(root)
    assert SECRET not in str(caught.value)


def test_folders_without_a_remote_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lies in somebody else's repository has not the address of that, and git may be missing."""
    monkeypatch.delenv(packing.PROJECT_URL, raising=False)
    root = checkout(tmp_path / "outer", FORK_URL)
    (root / "unpacked").mkdir()
    assert packing.project_url(root / "unpacked") == ""
    (root / "unpacked" / ".git").mkdir()  # of no repository
    assert packing.project_url(root / "unpacked") == ""
    with monkeypatch.context() as hook:
        hook.setenv("GIT_DIR", str(checkout(tmp_path / "other", PROJECT_URL) / ".git"))
        assert packing.project_url(root) == FORK_URL
    monkeypatch.setenv("PATH", str(tmp_path))
    assert packing.project_url(root) == ""


@pytest.mark.parametrize("made_with", ["", FORK_URL])
def test_an_sdist_knows_what_it_was_made_with(made_with: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes the wheel; test_packaging.py compares the wheels."""
    root = checkout(tmp_path / "unpacked", PROJECT_URL)
    said = "".join(f"Project-URL: {label}, {url}\n" for label, url in packing.project_urls(made_with).items())
    (root / "PKG-INFO").write_text(f"Metadata-Version: 2.4\nName: flashinfer\n{said}Requires-Dist: torch\n")
    monkeypatch.setenv(packing.PROJECT_URL, PROJECT_URL)
    assert packing.project_url(root) == packing.project_url(root / "flashinfer_aot", root) == made_with


def test_every_distribution_says_it(front_wheel: Path, host_wheel: Path, tmp_path: Path) -> None:
    build_index(front_wheel, out=tmp_path / "index", stand_ins=("0.7.2",))
    (stand_in,) = (tmp_path / "index" / "files").glob("flashinfer_python-*.whl")
    for wheel in (front_wheel, host_wheel, stand_in):
        said = metadata_of(wheel).get_all("Project-URL", [])
        assert said == [f"{label}, {url}" for label, url in packing.project_urls(PROJECT_URL).items()], wheel.name
