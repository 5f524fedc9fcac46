"""What the guests boot: a kernel, an initramfs that mounts the root, and a root with all that lockfs needs.

The root is an ext4 image that all guests share read-only, with a tmpfs laid over it. It has the interpreter
and the packages that run this test, the checkout's lockfs, the programs of an NFS server and client, and
busybox for everything else. So the guests run what the other tests run.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests.support import backports

CHECKOUT = Path(__file__).resolve().parents[2]
BUILD_S = 120
_EARLY = ("virtio_blk", "overlay")
_LATER = ("virtio_net", "nfsv4", "nfsd", "softdog")
PROGRAMS = ("mount.nfs", "rpc.nfsd", "exportfs", "rpc.mountd", "nfsdcld")
TOOLS = ("depmod", "modprobe", "cpio", "mke2fs", "busybox", "ldd")
_IN_GUEST = ("agent.py", "writer.py", "witness.py")
_SLACK_BYTES = 64 << 20
_NOT_NEEDED = shutil.ignore_patterns(
    "test", "tests", "idlelib", "ensurepip", "lib2to3", "tkinter", "config-*", "dist-packages", "pydoc_data"
)

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
while read name; do /bin/busybox insmod "/modules/$name.ko"; done </modules/order
/bin/busybox mount -t ext4 -o ro /dev/vda /lower
/bin/busybox mount -t tmpfs tmpfs /upper
/bin/busybox mkdir /upper/data /upper/work
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /root
for name in proc sys dev; do /bin/busybox mount -o move "/$name" "/root/$name"; done
exec /bin/busybox switch_root /root /sbin/start
"""
_START = """#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin HOME=/root PYTHONPATH=/lockfs PYTHONDONTWRITEBYTECODE=1
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox mount -t tmpfs tmpfs /run
/bin/busybox ip link set lo up
%s /lockfs/tests/cluster/agent.py
/bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Root:
    """What every guest is started from."""

    kernel: Path
    initramfs: Path
    image: Path


def missing() -> list[str]:
    """The programs of this machine that a root cannot be made without."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in (*TOOLS, *PROGRAMS) if shutil.which(name, path=search) is None]


def build(kernel: backports.Kernel, work: Path) -> Root:
    """Make the initramfs and the root image in `work`."""
    modules = work / "modules"
    modules.mkdir()
    early = _modules(kernel, _EARLY, modules)
    later = [name for name in _modules(kernel, _LATER, modules) if name not in early]
    tree = work / "tree"
    _make_tree(tree)
    (tree / "modules").mkdir()
    for name in later:
        shutil.copy(modules / f"{name}.ko", tree / "modules")
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in later))
    root = Root(kernel.image, _initramfs(work, early, modules), _image(work, tree))
    for path in (tree, modules):
        shutil.rmtree(path)
    return root


def _program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def _run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
        **options,
    )
    if done.returncode:
        raise AssertionError(f"{command[0]}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return str(done.stdout)


# --- modules


def _modules(kernel: backports.Kernel, names: tuple[str, ...], into: Path) -> list[str]:
    """Unpack these modules and what they depend on; their names in the order to load them."""
    release = kernel.release
    if not (kernel.root / "lib/modules" / release / "modules.dep").exists():
        _run(_program("depmod"), "-b", kernel.root, release)
    order: list[str] = []
    for name in names:
        lines = _run(_program("modprobe"), "-d", kernel.root, "-S", release, "--show-depends", name)
        for file in map(Path, re.findall(r"^insmod (\S+)", lines, re.MULTILINE)):
            module = file.name.partition(".")[0]
            if module in order:
                continue
            order.append(module)
            content = file.read_bytes()
            (into / f"{module}.ko").write_bytes(lzma.decompress(content) if file.suffix == ".xz" else content)
    return order


# --- the two file systems


def _initramfs(work: Path, order: list[str], modules: Path) -> Path:
    tree = work / "initramfs"
    for name in ("bin", "proc", "sys", "dev", "lower", "upper", "root", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy(_program("busybox"), tree / "bin/busybox")
    for name in order:
        shutil.copy(modules / f"{name}.ko", tree / "modules")
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))
    (tree / "init").write_text(_INIT)
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = work / "initramfs.cpio"
    with open(archive, "wb") as file:
        subprocess.run(
            [_program("cpio"), "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=file,
            check=True, timeout=BUILD_S,
        )  # fmt: skip
    shutil.rmtree(tree)
    return archive


def _image(work: Path, tree: Path) -> Path:
    image = work / "root.img"
    used = sum(path.lstat().st_size + 4096 for path in tree.rglob("*"))
    with open(image, "wb") as file:
        file.truncate(used + _SLACK_BYTES)
    _run(_program("mke2fs"), "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", tree, image)
    return image


def _make_tree(tree: Path) -> None:
    for name in (
        "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "sys", "dev", "tmp", "run", "root", "etc",
        "mnt", "srv", "var/lib/nfs", "lockfs/tests/cluster",
    ):  # fmt: skip
        (tree / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    (tree / "var/run").symlink_to("/run")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    (tree / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (tree / "etc/exports").write_text("")
    (tree / "etc/mtab").symlink_to("/proc/mounts")
    for name in ("netconfig", "services", "protocols", "nsswitch.conf"):
        if Path("/etc", name).exists():
            shutil.copy(Path("/etc", name), tree / "etc")
    shutil.copy(_program("busybox"), tree / "usr/bin/busybox")
    (tree / "usr/bin/sh").symlink_to("busybox")
    programs = [_program(name) for name in PROGRAMS]
    for program in programs:
        _put(tree, program)
    python = os.path.realpath(sys.executable)
    _put(tree, python)
    (tree / "sbin/start").write_text(_START % python)
    (tree / "sbin/start").chmod(0o755)
    extensions = _put_python(tree)
    for library in _libraries([python, *programs, *extensions]):
        _put(tree, library)


def _put(tree: Path, path: str) -> None:
    place = tree / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, place)


def _put_python(tree: Path) -> list[str]:
    """The standard library, the packages of requirements.lock and lockfs; returns the extensions' paths."""
    standard = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(standard, tree / str(standard).lstrip("/"), ignore=_NOT_NEEDED, dirs_exist_ok=True)
    extensions = [str(path) for path in (standard / "lib-dynload").glob("*.so") if "_test" not in path.name]
    place = tree / "lockfs"
    lock = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8")
    for name in re.findall(r"^([A-Za-z0-9_.-]+)==", lock, re.MULTILINE):
        for file in importlib.metadata.files(name) or ():
            if ".." in file.parts or "_tests" in file.parts:
                continue
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(str(file.locate()), place / file)
            if file.suffix == ".so":
                extensions.append(str(file.locate()))
    shutil.copytree(CHECKOUT / "lockfs", place / "lockfs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in _IN_GUEST:
        shutil.copy2(CHECKOUT / "tests/cluster" / name, place / "tests/cluster")
    compileall.compile_dir(str(place), quiet=2, stripdir=str(tree))
    return extensions


def _libraries(files: list[str]) -> set[str]:
    """The shared libraries that these programs and extensions need, the loader included."""
    found = set()
    for file in files:
        done = subprocess.run(
            [_program("ldd"), file], capture_output=True, text=True, timeout=BUILD_S, check=False
        )
        found |= set(re.findall(r"(?:=>\s+|^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE))
    return found
