"""Real libvirt daemons, several of them on one machine, each in namespaces of its own.

A host is a process-id, mount and (privileged) UTS namespace: its first process dies when it is killed, and
with it every daemon and QEMU in it, so that nothing outlives a test. The image directory of the test is
bound to IMAGES inside, the same path on every host, as migration needs it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.guest import COUNTER
from tests.support.qemu import POLL_S, Build, Ran

IMAGES = Path("/var/lib/libvirt/images")
READY_S = 60.0
VIRSH_S = 60.0
END_S = 20.0
NOBODY = 65534

_DOMAIN = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid>
 <memory unit='MiB'>32</memory><vcpu>1</vcpu>
 <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
 <devices><emulator>{emulator}</emulator>
  <disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{image}'/>
   <target dev='vda' bus='virtio'/></disk>
  <memballoon model='none'/></devices></domain>
"""

# Where KVM is there and yet does not work, libvirt 9.0 would probe QEMU anew, for seconds, at every start.
_HIDE_KVM = "[ ! -e /dev/kvm ] || {{ install -m 0 /dev/null {home}/kvm; mount --bind {home}/kvm /dev/kvm; }}"


def why_not_libvirt() -> str | None:
    """The reason why libvirt cannot run here, or None."""
    for program in ("libvirtd", "virtlockd", "virsh", "unshare", "setpriv"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "namespaces need root"
    return None


class VirshError(Exception):
    """virsh failed; the text is what it printed."""


@dataclass
class Host:
    """One libvirt host; see `privileged` and `unprivileged`. `home` holds its state and logs."""

    name: str
    home: Path
    images: Path  # as the host sees the image directory
    process: subprocess.Popen[bytes]
    uri: str
    domains: dict[str, str] = field(default_factory=dict)

    def virsh(self, *args: str | Path, timeout: float = VIRSH_S) -> str:
        """Run virsh against this host and return what it printed.

        Raises:
            VirshError: it failed.
        """
        ran = self.try_virsh(*args, timeout=timeout)
        if ran.code:
            raise VirshError(f"{self.name}: virsh {' '.join(map(str, args))}: {ran.text.strip()}")
        return ran.text

    def try_virsh(self, *args: str | Path, timeout: float = VIRSH_S) -> Ran:
        """Run virsh, whatever comes of it."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *map(str, args)], timeout=timeout, check=False, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout)

    def define_xml(self, name: str, image: str, image_format: str, build: Build) -> Path:
        """Write the XML of a one-disk guest; `image` is relative to the image directory."""
        path = self.home / f"{name}.xml"
        path.write_text(
            _DOMAIN.format(
                name=name,
                uuid=uuid.uuid5(uuid.NAMESPACE_DNS, name),
                format=image_format,
                image=self.images / image,
                emulator=build.program("qemu-system-x86_64"),
            )
        )
        return path

    def create(self, name: str, image: str, image_format: str, build: Build, *flags: str) -> None:
        """Start a transient guest."""
        self.virsh("create", *flags, self.define_xml(name, image, image_format, build))

    def state(self, name: str) -> str:
        """libvirt's word for the guest's state, or "gone"."""
        ran = self.try_virsh("domstate", name)
        return ran.text.strip() if ran.code == 0 else "gone"

    def written(self, name: str) -> int:
        """How many writes were acknowledged to the guest."""
        text = self.virsh("qemu-monitor-command", name, "--hmp", f"xp /1wx {COUNTER:#x}")
        return int(text.split(":")[1].strip(), 16)

    def wait_written(self, name: str, more: int = 5, timeout: float = VIRSH_S) -> int:
        """Wait until the guest has made `more` further writes."""
        end = time.monotonic() + timeout
        start = self.written(name)
        while (now := self.written(name)) < start + more:
            if time.monotonic() > end:
                raise AssertionError(f"{name} on {self.name} stands at write {now}, {self.state(name)}")
            time.sleep(POLL_S)
        return now

    def log(self) -> str:
        """What the daemons and QEMUs of this host logged."""
        logs = [*self.home.glob("*.log"), *self.home.glob("log/**/*.log")]
        return "\n".join(f"--- {self.name} {path.name}:\n{path.read_text(errors='replace')}" for path in logs)

    def end(self) -> None:
        """Kill everything on this host and wait until it is gone."""
        for pid in _children(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            self.process.wait(END_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(END_S)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@dataclass(frozen=True)
class Settings:
    """What a host's configuration says beyond the stock one. `lock_manager` needs virtlockd and starts it."""

    lock_manager: bool = False
    lockspace: Path | None = None  # virtlockd's file_lockspace_dir, as the host sees it
    remember: bool = True  # dynamic_ownership and remember_owner, on in the stock configuration
    cache: Path | None = None  # shared by hosts, so that only the first has to find out what QEMU can do


def privileged(work: Path, name: str, images: Path, settings: Settings | None = None) -> Host:
    """A host with system daemons and Debian's own settings: QEMU as libvirt-qemu, labels and owners managed.

    Only what a machine without systemd lacks is turned off: virtlogd, control groups, device namespaces.
    """
    settings = settings or Settings()
    home = work / name
    for part in ("etc", "run", "lib/images", "log", "cache"):
        (home / part).mkdir(parents=True)
    for path in (home, home / "lib", home / "lib/images"):
        path.chmod(0o755)
    _configure(home / "etc", settings)
    logs, pids = "/var/log/libvirt", "/run/libvirt"
    lockd = f"virtlockd -f /etc/libvirt/virtlockd.conf -p {pids}/virtlockd.pid > {logs}/virtlockd.log 2>&1 &"
    script = f"""
        set -e
        hostname {name}
        {_HIDE_KVM.format(home=home)}
        mkdir -p /run/libvirt
        mount --bind {home}/etc /etc/libvirt
        mount --bind {home}/run /run/libvirt
        mount --bind {home}/log /var/log/libvirt
        mount --bind {settings.cache or home / "cache"} /var/cache/libvirt
        mount --bind {home}/lib /var/lib/libvirt
        mount --bind {images} {IMAGES}
        {lockd + _wait_for("/run/libvirt/virtlockd-sock") if settings.lock_manager else ""}
        libvirtd -f /etc/libvirt/libvirtd.conf -p {pids}/libvirtd.pid > {logs}/libvirtd.log 2>&1 &
        wait -n
        echo "a daemon ended with $?"
    """
    uri = f"qemu+unix:///system?socket={home}/run/libvirt-sock"
    return _start(Host(name, home, IMAGES, _unshare(home, script, "-u"), uri))


def _wait_for(socket: str) -> str:
    """Shell: libvirtd asks virtlockd for its lockspace while it starts, and ends if nobody answers."""
    return f"\nfor try in $(seq 500); do [ -S {socket} ] && break; sleep 0.02; done"


def _configure(etc: Path, settings: Settings) -> None:
    lines = ['stdio_handler = "file"', "cgroup_controllers = [ ]", "namespaces = [ ]"]
    if settings.lock_manager:
        lines.append('lock_manager = "lockd"')
    if not settings.remember:
        lines += ['user = "root"', 'group = "root"', "dynamic_ownership = 0", "remember_owner = 0"]
    (etc / "qemu.conf").write_text("\n".join(lines) + "\n")
    (etc / "libvirtd.conf").write_text(
        'auth_unix_rw = "none"\nauth_unix_ro = "none"\nlog_outputs = "3:stderr"\n'
        f'host_uuid = "{uuid.uuid4()}"\n'
    )
    (etc / "virtlockd.conf").write_text('log_outputs = "3:stderr"\n')
    lockspace = f'file_lockspace_dir = "{settings.lockspace}"\n' if settings.lockspace else ""
    (etc / "qemu-lockd.conf").write_text(lockspace)


def unprivileged(work: Path, name: str, images: Path, settings: Settings | None = None) -> Host:
    """A host with one user's session daemons, as nobody; the images must belong to that user (chown them)."""
    settings = settings or Settings(lock_manager=True)
    home = work / name
    for part in ("run", "cfg/libvirt", "cache", "images"):
        (home / part).mkdir(parents=True)
    config = home / "cfg/libvirt"
    if settings.lock_manager:
        (config / "qemu.conf").write_text('lock_manager = "lockd"\n')
    if settings.lockspace:
        (config / "qemu-lockd.conf").write_text(f'file_lockspace_dir = "{settings.lockspace}"\n')
    for path in [home, *home.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    (home / "run").chmod(0o700)
    lockd = f"as virtlockd > {home}/virtlockd.log 2>&1 &"
    environment = " ".join(
        f"{key}={value}"
        for key, value in {
            "PATH": os.environ["PATH"], "HOME": home, "XDG_RUNTIME_DIR": home / "run",
            "XDG_CONFIG_HOME": home / "cfg", "XDG_CACHE_HOME": home / "cache",
        }.items()
    )  # fmt: skip
    script = f"""
        set -e
        mount --bind {images} {home}/images
        cd {home}
        as() {{ setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups env -i {environment} "$@"; }}
        {lockd + _wait_for(f"{home}/run/libvirt/virtlockd-sock") if settings.lock_manager else ""}
        as libvirtd > {home}/libvirtd.log 2>&1 &
        wait -n
        echo "a daemon ended with $?"
    """
    uri = f"qemu+unix:///session?socket={home}/run/libvirt/libvirt-sock"
    return _start(Host(name, home, home / "images", _unshare(home, script), uri))


def _unshare(home: Path, script: str, *flags: str) -> subprocess.Popen[bytes]:
    command = ["unshare", "-m", "-p", "-f", "--kill-child=KILL", "--mount-proc", *flags, "bash", "-c", script]
    with open(home / "namespace.log", "wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _start(host: Host) -> Host:
    """Wait until the daemons answer."""
    end = time.monotonic() + READY_S
    try:
        while (ran := host.try_virsh("list")).code:
            if host.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"libvirt does not answer on {host.name}: {ran.text}\n{host.log()}")
            time.sleep(0.1)
    except BaseException:
        host.end()
        raise
    return host
