"""A newer QEMU, and a kernel for guests, from the release's backports.

Both are unpacked into a cache and never installed.

The mirror, the keys and the components are those of this machine's own apt sources; apt works with a
private list and a private state, so nothing of the machine's package state changes. The cache is
$LOCKFS_TEST_CACHE, or lockfs-tests in the user's cache directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.qemu import Build

PACKAGES = ("qemu-system-x86", "qemu-utils")
KERNEL = "linux-image-cloud-amd64"
UPDATE_S = 180
DOWNLOAD_S = 600
MAJOR = 10  # the oldest release that counts as new
_DONE = "complete"


@dataclass(frozen=True)
class Unavailable:
    """Why something cannot be had here, as a sentence."""

    reason: str


@dataclass(frozen=True)
class Kernel:
    """A kernel that lies below `root`, as its package has it, modules included."""

    release: str
    image: Path
    root: Path


@dataclass(frozen=True)
class _Source:
    uri: str
    components: str
    options: str


def cache_directory() -> Path:
    """Where tests keep what they download."""
    named = os.environ.get("LOCKFS_TEST_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockfs-tests"


def backported_qemu() -> Build | Unavailable:
    """The newer QEMU, downloaded the first time, or the reason why it cannot be had."""
    root = _unpacked("qemu", PACKAGES, lambda name: True)
    return root if isinstance(root, Unavailable) else _build(root)


def backported_kernel() -> Kernel | Unavailable:
    """The kernel for guests, downloaded the first time, or the reason why it cannot be had."""
    root = _unpacked("kernel", (KERNEL,), lambda name: name.startswith("linux-image-"))
    if isinstance(root, Unavailable):
        return root
    images = sorted((root / "boot").glob("vmlinuz-*"))
    if not images:
        return Unavailable(f"{KERNEL} brought no kernel")
    return Kernel(images[-1].name.removeprefix("vmlinuz-"), images[-1], root)


def _unpacked(what: str, packages: Sequence[str], needed: Callable[[str], bool]) -> Path | Unavailable:
    """Where `packages` lie unpacked, with those of their dependencies that are `needed`."""
    release = _release()
    if not release:
        return Unavailable("this machine's release has no code name, hence no backports")
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return Unavailable(f"apt-get is needed to fetch {packages[0]} from backports")
    place = cache_directory() / f"{what}-{release}-backports"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / _DONE).exists():
            try:
                _fetch(place, release, packages, needed)
            except (_CannotFetch, subprocess.TimeoutExpired) as error:
                return Unavailable(f"{packages[0]} from backports cannot be fetched: {error}")
    return place / "root"


class _CannotFetch(Exception):
    pass


def _release() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return ""


def _sources(release: str) -> list[_Source]:
    """The machine's own apt entries for `release` itself."""
    found: list[_Source] = []
    directory = Path("/etc/apt/sources.list.d")
    for file in sorted(directory.glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", file.read_text()):
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE))
            if "deb" in fields.get("Types", "").split() and release in fields.get("Suites", "").split():
                signed = fields.get("Signed-By", "")
                options = f"[signed-by={signed}]" if signed.startswith("/") else ""
                found += [_Source(uri, fields["Components"], options) for uri in fields["URIs"].split()]
    for file in [Path("/etc/apt/sources.list"), *sorted(directory.glob("*.list"))]:
        text = file.read_text() if file.exists() else ""
        for match in re.finditer(r"^deb\s+(\[[^\]]*\])?\s*(\S+)\s+(\S+)\s+(.*)$", text, re.MULTILINE):
            if match[3] == release:
                found.append(_Source(match[2], match[4], match[1] or ""))
    return found


def _apt(place: Path, *args: str, timeout: float, cwd: Path | None = None) -> str:
    command = [
        "apt-get", "-q",
        "-o", f"Dir::Etc::SourceList={place}/sources.list", "-o", "Dir::Etc::SourceParts=/dev/null",
        "-o", f"Dir::State::Lists={place}/lists", "-o", f"Dir::Cache={place}/cache",
        "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30", "-o", "APT::Sandbox::User=root", *args,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=cwd, timeout=timeout, check=False, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise _CannotFetch(f"apt-get {args[0]}: {done.stdout.strip()[-300:]}")
    return done.stdout


def _fetch(place: Path, release: str, packages: Sequence[str], needed: Callable[[str], bool]) -> None:
    sources = _sources(release)
    if not sources:
        raise _CannotFetch(f"no apt source of this machine has {release}")
    suite = f"{release}-backports"
    for name in ("lists/partial", "cache/archives/partial"):
        (place / name).mkdir(parents=True, exist_ok=True)
    lines = [
        f"deb {s.options} {s.uri} {where} {s.components}\n" for s in sources for where in (release, suite)
    ]
    (place / "sources.list").write_text("".join(lines))
    _apt(place, "update", timeout=UPDATE_S)
    # What is installed here already would be left out of the plan.
    (place / "status").touch()
    bare = ("-o", f"Dir::State::status={place}/status") if packages == (KERNEL,) else ()
    plan = _apt(place, *bare, "-s", "--no-install-recommends", "-t", suite, "install", *packages, timeout=60)
    wanted = re.findall(r"^Inst (\S+) (?:\[[^\]]*\] )?\((\S+) ", plan, re.MULTILINE)
    if not any(name in packages for name, _ in wanted):
        raise _CannotFetch(f"{suite} has no {packages[0]} newer than the one installed")
    wanted = [(name, version) for name, version in wanted if needed(name)]
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        _apt(
            place, "download", *(f"{name}={version}" for name, version in wanted),
            timeout=DOWNLOAD_S, cwd=Path(scratch),
        )  # fmt: skip
        root = Path(scratch) / "root"
        for package in sorted(Path(scratch).glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(root)], check=True, timeout=120)
        shutil.rmtree(place / "root", ignore_errors=True)
        root.rename(place / "root")
    for name in ("lists", "cache"):
        shutil.rmtree(place / name, ignore_errors=True)
    (place / _DONE).touch()


def _build(root: Path) -> Build | Unavailable:
    libraries = tuple(root / name for name in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))
    build = Build("", root, libraries)
    ran = build.run("qemu-system-x86_64", "--version", check=False)
    found = re.search(r"version ((\d+)\.\d+)", ran.text)
    if ran.code or not found:
        return Unavailable(f"QEMU from backports does not run here: {ran.text.strip()[:300]}")
    if int(found[2]) < MAJOR:
        return Unavailable(f"backports have QEMU {found[1]}, older than {MAJOR}")
    return Build(found[1], root, libraries)
