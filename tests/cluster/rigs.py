"""The storage that hosts share, of two kinds: a disk with leases beside a store, and an NFS server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lockfs.records import sectors
from tests.cluster import guests, root, witness
from tests.cluster.guests import IMAGE, STORE, Cluster, Guest
from tests.support.qemu import eventually

IO_TIMEOUT = 2
WATCHDOG = 10
STOPS = 8 * IO_TIMEOUT
"""A host that could not renew starts no write after so many seconds (docs/paxos.md)."""
DEAD = STOPS + WATCHDOG
"""Another host may take over after so many seconds, and not before."""
PAXOS = (
    f"backend=paxos,lease_area=/dev/vdb,io_timeout={IO_TIMEOUT},watchdog_timeout={WATCHDOG},"
    "state_dir=/run/state,join=wait,wait=0.5,handover_wait=1"
)
FCNTL = "backend=fcntl,wait=0.5,handover_wait=1"
NFS_LEASE = 10
"""Seconds that the NFS server keeps what a silent client holds, if another wants it."""
NFS_GRACE = 60
"""Seconds that it waits after a start for the clients it knew, if they do not all come earlier. They find out
that it is back when their TCP repeats a segment, which it does ever more rarely."""
_AREA_LEASES = 8
_SECTOR = 512
_EXPORT_BYTES = 512 << 20
_PROGRAM_S = 60.0
HOSTS = {"A": 1, "B": 2}
"""The hosts' names, and their numbers in the lockspace and on the network."""
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")


def virtiofsd() -> str | None:
    """The program that shows a directory to a guest, if it is installed."""
    return next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None)


def _make_image(directory: Path) -> None:
    with open(directory / IMAGE, "wb") as file:
        file.truncate(witness.IMAGE_BYTES)


@dataclass
class SharedDisk:
    """A raw disk that every host has as /dev/vdb, with paxos leases; the store is a directory that each
    sees through virtiofs without a cache. The leases of a host that was started with `detour` go through a
    server of its own, which can be stopped; so can its way to the store.
    """

    cluster: Cluster
    _area: Path = field(init=False)
    _servers: dict[str, list[subprocess.Popen[bytes]]] = field(default_factory=dict)
    _pid_files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        work = self.cluster.fleet.work
        self._store = work / "store"
        self._store.mkdir()
        _make_image(self._store)
        self._area = work / "leases.raw"
        command = [sys.executable, "-m", "lockfs.cli.ctl", "init", str(self._area), "--lockspace", "images"]
        subprocess.run(
            [*command, "--leases", str(_AREA_LEASES), "--io-timeout", str(IO_TIMEOUT)],
            check=True, capture_output=True, timeout=_PROGRAM_S, cwd=root.CHECKOUT,
        )  # fmt: skip

    def host(self, name: str, options: str, *, detour: bool = False, watchdog: bool = False) -> Guest:
        """Boot a host with the disk and the store, and mount lockfs there; with `watchdog` it has one."""
        straight = f"file={self._area},format=raw,cache=none,file.locking=off"
        area = self._detour(name) if detour else straight
        memory = f"{guests.MEMORY_MIB}M"
        guest = self.cluster.boot(
            name,
            [
                "-drive", f"{area},if=none,id=leases", "-device", "virtio-blk-pci,drive=leases",
                "-object", f"memory-backend-memfd,id=memory,size={memory},share=on",
                "-machine", "memory-backend=memory",
                "-chardev", f"socket,id=store,path={self._virtiofsd(name)}",
                "-device", "vhost-user-fs-pci,chardev=store,tag=store",
            ],
        )  # fmt: skip
        guest.busybox("mount", "-t", "virtiofs", "store", STORE)
        if watchdog:
            for module in ("watchdog", "softdog"):
                guest.busybox("insmod", f"/modules/{module}.ko")
            options = f"{options},watchdog=/dev/watchdog"
        guests.mount(guest, f"{PAXOS},host_id={HOSTS[name]},{options}")
        return guest

    def renewal(self, name: str) -> float:
        """When the host last renewed its lease, as its boot clock had it in whole seconds (cut off)."""
        with open(self._area, "rb") as file:
            file.seek(sectors.delta_sector(HOSTS[name]) * _SECTOR)
            return float(sectors.decode_leader(file.read(_SECTOR)).timestamp)

    def _virtiofsd(self, name: str) -> Path:
        program = virtiofsd()
        assert program is not None
        path = self.cluster.fleet.work / f"{name}.fs"
        options = ("cache=none", "sandbox=chroot", "allow_direct_io", f"source={self._store}")
        words = [word for option in options for word in ("-o", option)]
        process = self.cluster.fleet.spawn([program, f"--socket-path={path}", *words])
        self._servers[name] = [*self._servers.get(name, []), process]
        self._pid_files.append(Path("/run/virtiofsd", f"{str(path).replace('/', '.')}.pid"))
        eventually(path.exists, "virtiofsd listens")
        return path

    def _detour(self, name: str) -> str:
        path = self.cluster.fleet.work / f"{name}.nbd"
        disk = f"driver=raw,file.driver=file,file.filename={self._area},file.locking=off,file.cache.direct=on"
        command = [self.cluster.build.program("qemu-nbd"), "-t", "-k", str(path), "--image-opts", disk]
        process = self.cluster.fleet.spawn([*command, "--cache=none"])
        self._servers[name] = [process]
        eventually(path.exists, "qemu-nbd listens")
        return f"driver=nbd,server.type=unix,server.path={path}"

    def cut_off(self, name: str, *, store: bool) -> None:
        """Let the host's requests to the leases hang, and with `store` those to the store too."""
        for process in self._servers[name][: 2 if store else 1]:
            process.send_signal(signal.SIGSTOP)

    def reconnect(self, name: str) -> None:
        """Let what hangs go on."""
        for process in self._servers[name]:
            process.send_signal(signal.SIGCONT)

    def forget(self, name: str) -> None:
        """End the way to the store of a host that was reset: what its adapter had to send went with it."""
        _, adapter = self._servers[name]
        adapter.kill()
        adapter.wait(_PROGRAM_S)

    def landed(self) -> list[witness.Term]:
        """What is on the storage."""
        return witness.examine(str(self._store / IMAGE))

    def end(self) -> None:
        """Remove what the fleet does not."""
        for servers in self._servers.values():
            for process in servers:
                if process.poll() is None:
                    process.kill()
                    process.wait(_PROGRAM_S)
        for path in self._pid_files:
            path.unlink(missing_ok=True)


@dataclass
class NfsServer:
    """A guest that exports a store over NFS 4.2, and a private link from it to each host."""

    cluster: Cluster
    server: Guest | None = None

    def __post_init__(self) -> None:
        tree = self.cluster.fleet.work / "export"
        (tree / "images").mkdir(parents=True)
        (tree / "state/nfsdcld").mkdir(parents=True)
        (tree / "state/v4recovery").mkdir()
        (tree / "state/rpc_pipefs").mkdir()
        _make_image(tree / "images")
        self._disk = self.cluster.fleet.work / "export.img"
        with open(self._disk, "wb") as file:
            file.truncate(_EXPORT_BYTES)
        mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        subprocess.run(
            [str(mke2fs), "-q", "-t", "ext4", "-d", str(tree), str(self._disk)],
            check=True,
            timeout=_PROGRAM_S,
        )
        shutil.rmtree(tree)
        self.start()

    def _link(self, name: str, here: str) -> list[str]:
        """One network card, whose other end is `here`'s counterpart."""
        ends = {"server": f"s{name}", "host": f"h{name}"}
        mine, other = ends.pop(here), next(iter(ends.values()))
        work, identity = self.cluster.fleet.work, f"net{0 if here == 'host' else HOSTS[name]}"
        mac = f"52:54:00:00:0{HOSTS[name]}:0{1 if here == 'server' else 2}"
        return [
            "-netdev", f"dgram,id={identity},local.type=unix,local.path={work / mine},"
            f"remote.type=unix,remote.path={work / other}",
            "-device", f"virtio-net-pci,netdev={identity},mac={mac}",
        ]  # fmt: skip

    def start(self, *, forget: bool = False) -> None:
        """Boot the server, the first time or after a power cut, and export the store; with `forget` it does
        not know the clients it had.
        """
        cards = [word for name in HOSTS for word in self._link(name, "server")]
        drive = f"file={self._disk},format=raw,if=none,id=export,cache=none"
        server = self.cluster.boot("S", ["-drive", drive, "-device", "virtio-blk-pci,drive=export", *cards])
        self.server = server
        server.load_modules()
        for number, _ in enumerate(HOSTS):
            server.busybox("ip", "addr", "add", f"10.0.{number + 1}.1/24", "dev", f"eth{number}")
            server.busybox("ip", "link", "set", f"eth{number}", "up")
        server.busybox("mkdir", "-p", "/export")
        server.busybox("mount", "-t", "ext4", "/dev/vdb", "/export")
        if forget:
            server.busybox("rm", "-f", "/export/state/nfsdcld/main.sqlite")
        server.busybox("mount", "-o", "bind", "/export/state", "/var/lib/nfs")
        server.busybox("mount", "-t", "rpc_pipefs", "rpc_pipefs", "/var/lib/nfs/rpc_pipefs")
        server.busybox("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        server.busybox("touch", "/var/lib/nfs/etab", "/var/lib/nfs/rmtab")
        server.run("nfsdcld")
        server.run("exportfs", "-o", "rw,sync,no_root_squash,no_subtree_check,fsid=0", "*:/export/images")
        server.run("rpc.mountd", "-N", "2", "-N", "3", "-p", "20048")
        server.run(
            "rpc.nfsd", "-N", "3", "-V", "4.2", "-U", "-G", str(NFS_GRACE), "-L", str(NFS_LEASE), "4"
        )  # fmt: skip

    def cut_power(self) -> None:
        """End the server at once; `start` boots it again."""
        assert self.server is not None
        # nfsdcld commits by removing a journal, which is on the disk only some time later.
        self.server.busybox("sync")
        self.server.cut_power()

    def host(self, name: str, options: str) -> Guest:
        """Boot a host, mount the store there, and lockfs over it."""
        guest = self.cluster.boot(name, self._link(name, "host"))
        guest.load_modules()
        guest.busybox("hostname", f"host-{name}")
        address = f"10.0.{HOSTS[name]}"
        guest.busybox("ip", "addr", "add", f"{address}.2/24", "dev", "eth0")
        guest.busybox("ip", "link", "set", "eth0", "up")
        guest.run("mount.nfs", f"{address}.1:/", STORE, "-o", "vers=4.2,hard,proto=tcp")
        guests.mount(guest, f"{FCNTL},{options}")
        return guest

    def landed(self) -> list[witness.Term]:
        """What is on the storage, as the server has it."""
        assert self.server is not None
        text = self.server.run(guests.PYTHON, "/lockfs/tests/cluster/witness.py", f"/export/images/{IMAGE}")
        return [
            witness.Term(**{**term, "stale": tuple(term["stale"]), "holes": tuple(term["holes"])})
            for term in json.loads(text)
        ]


def both(boot: Callable[[str], Guest]) -> tuple[Guest, Guest]:
    """Boot hosts A and B at the same time."""
    with ThreadPoolExecutor(len(HOSTS)) as pool:
        a, b = pool.map(boot, HOSTS)
    return a, b
