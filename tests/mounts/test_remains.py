"""All processes of a mount are killed: the next lockfs there tells what it found, fences it, and mounts anew.

Who still has its lease (fcntl) goes on; who could write without one is ended before anybody else is let in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockfs.cli import options as command_line
from lockfs.errors import SetupError
from lockfs.linux import calls
from lockfs.mount import remains, table
from lockfs.mount.options import MountOptions
from tests.mounts.test_leases import opens_soon, refused
from tests.support import guest, qemu
from tests.support.mounts import POLL_S, Mount, mounted, start

SIZE = 1 << 20
PATIENCE_S = 20.0
TAKEOVER_S = 90.0
PAXOS = "backend=paxos,io_timeout=1,watchdog_timeout=10,join=wait,host=hostA"
_WALL = 0x40000000  # waitpid(2): children whose end sends no SIGCHLD too

_CLIENT = """\
import errno, mmap, os, sys
descriptor = os.open(sys.argv[1], getattr(os, sys.argv[2]))
if "map" in sys.argv[3:]:
    memory = mmap.mmap(descriptor, 4096)
print("open", flush=True)
for line in sys.stdin:
    try:
        if line == "read\\n":
            os.pread(descriptor, 512, 0)
        else:
            os.pwrite(descriptor, line.encode().ljust(512, b"."), 0)
        print("done", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


class Client:
    """A program that has an image open, and reads or writes it when told to."""

    def __init__(self, image: Path, flags: str = "O_RDWR", *words: str, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, "-c", _CLIENT, str(image), flags, *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "open"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def does(self, what: str) -> str:
        """Let it "read", or write what else is said: "done" or the error's name."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def ended(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def clients() -> Iterator[contextlib.ExitStack]:
    """What is entered here ends before the mounts do."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one image, and a mount point beside it."""
    made = tmp_path / "store"
    made.mkdir()
    (made / "disk").write_bytes(bytes(SIZE))
    (tmp_path / "a").mkdir()
    return made


def client(stack: contextlib.ExitStack, image: Path, *words: str, prefix: tuple[str, ...] = ()) -> Client:
    """A client that ends with the stack."""
    made = Client(image, *words, prefix=prefix)
    stack.callback(made.end)
    return made


def processes_at(point: Path) -> list[int]:
    """Every process of a mount: they share the command line of the one that was started."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if b"lockfs.cli.main" in words and os.fsencode(point) in words:
                found.append(int(name))
    return found


def kill_processes_at(point: Path) -> None:
    """End every process of a mount, so that none can replace another."""
    end = time.monotonic() + PATIENCE_S
    while pids := processes_at(point):
        assert time.monotonic() < end, f"processes {pids} do not end"
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(POLL_S)


def kill_all_of(mount: Mount) -> None:
    """End every process of a mount of start(), those included that were made beside the one it started."""
    kill_processes_at(mount.path)
    mount.process.wait(PATIENCE_S)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG | _WALL)[0]:
            pass


@contextlib.contextmanager
def mounted_anew(dead: Mount, options: str) -> Iterator[Mount]:
    """The next mount on the mount point of one whose processes were killed."""
    log = dead.path.parent / f"{dead.path.name}-anew.log"
    try:
        made = start(dead.source, dead.path, options, log_file=log)
    finally:
        if not remains_is_cleared(dead.path):
            subprocess.run(["umount", "-l", str(dead.path)], check=False)
    try:
        yield made
    finally:
        made.stop()


def remains_is_cleared(point: Path) -> bool:
    """Whether no dead mount is at the mount point."""
    mount = table.at(str(point), table.read())
    return mount is None or remains.state_of(mount) is not remains.State.DEAD


def given(store: Path, point: Path, text: str) -> MountOptions:
    """The options of a command line with absolute paths."""
    made = command_line.parse(["-o", text, str(store), str(point)]).options
    assert made is not None
    return made


# --- file locks: whoever has an image keeps it


def test_fcntl_keeps_its_writers(store: Path, tmp_path: Path, clients: contextlib.ExitStack) -> None:
    """The writer writes on under its lock; neither the next mount nor another host gets the image."""
    with mounted(store, tmp_path / "b", "host=hostB,wait=0.2") as other:
        dead = start(store, tmp_path / "a", "host=hostA")
        writer = client(clients, dead.path / "disk")
        reader = client(clients, dead.path / "disk", "O_RDONLY")
        kill_all_of(dead)
        with mounted_anew(dead, "host=hostA,wait=0.2") as anew, clients:
            anew.logs(
                f"{dead.path} has a lockfs of {store} whose processes are all gone",
                "2 programs have images of it open: ",
                f"(pid {writer.process.pid})",
                "with the locks that the kernel keeps until they close them",
            )
            assert writer.does("after") == "done"
            assert reader.does("read") == "done"
            assert refused(anew.path / "disk") and refused(other.path / "disk")
            writer.end()
            assert refused(other.path / "disk"), "the kernel keeps the backing file for the reader"
            reader.end()
            opens_soon(anew.path / "disk")
            opens_soon(other.path / "disk")
            assert (anew.path / "disk").read_bytes()[:5] == b"after"


def test_fcntl_keeps_a_guest(store: Path, tmp_path: Path, clients: contextlib.ExitStack) -> None:
    """A guest on a passthrough image writes on while lockfs is dead and once it is mounted anew."""
    build = qemu.installed()
    if build is None:
        pytest.skip("there is no QEMU")
    guest.make_image(store / "vm.raw", "raw")
    dead = start(store, tmp_path / "a", "host=hostA,io=passthrough")
    fleet = qemu.Fleet()
    clients.callback(fleet.end)
    words = qemu.disk("auto", "raw", dead.path / "vm.raw", direct=True)
    # Each write of this guest would be flushed, and fsync goes through lockfs in every mode.
    machine = fleet.start(build, [word.replace('"no-flush": false', '"no-flush": true') for word in words])
    machine.wait_written(10)
    kill_all_of(dead)
    machine.wait_written(10)
    with mounted_anew(dead, "host=hostA,wait=0.2") as anew, clients:
        anew.logs(f"qemu-system-x86_64 (pid {machine.pid})")
        machine.wait_written(10)
        assert refused(anew.path / "vm.raw")
        acknowledged = machine.halt()
        fleet.end()
        guest.check(guest.read_record(store / "vm.raw", "raw"), acknowledged)
        opens_soon(anew.path / "vm.raw")


def test_other_names_are_not_trusted(store: Path, tmp_path: Path, clients: contextlib.ExitStack) -> None:
    """A dead mount of another name need not have been one of file locks: its writers are ended."""
    dead = start(store, tmp_path / "a", "backend=nop,fsname=other")
    writer = client(clients, dead.path / "disk")
    kill_all_of(dead)
    with mounted_anew(dead, "host=hostA") as anew, clients:
        assert writer.ended() == -signal.SIGKILL
        anew.logs("was ended (SIGKILL), because its options are not known")


# --- leases that nobody renews, and none at all


def taken_over(image: Path) -> None:
    """Return once the image can be opened for writing, its former lease having run out."""
    qemu.eventually(lambda: not refused(image), f"{image} is free", timeout=TAKEOVER_S)


def test_nop_ends_its_writers(store: Path, tmp_path: Path, clients: contextlib.ExitStack) -> None:
    """Nobody remembers the writer, so it ends before another is let in; readers go on."""
    dead = start(store, tmp_path / "a", "backend=nop")
    writer = client(clients, dead.path / "disk")
    reader = client(clients, dead.path / "disk", "O_RDONLY")
    kill_all_of(dead)
    assert writer.does("still") == "done"
    with mounted_anew(dead, "backend=nop") as anew, clients:
        assert writer.ended() == -signal.SIGKILL
        assert reader.does("read") == "done"
        anew.logs(
            f"(pid {writer.process.pid}) could write on past lockfs and was ended (SIGKILL)",
            f"(pid {reader.process.pid}) of {dead.path} can only read",
        )
        opens_soon(anew.path / "disk")


def test_a_writer_in_another_namespace(store: Path, tmp_path: Path, clients: contextlib.ExitStack) -> None:
    """A program that sees the mount in a namespace of its own, as libvirt's guests do, is found too."""
    dead = start(store, tmp_path / "a", "backend=nop")
    writer = client(clients, dead.path / "disk", prefix=("unshare", "-m", "--propagation", "private"))
    kill_all_of(dead)
    with mounted_anew(dead, "backend=nop"), clients:
        assert writer.ended() == -signal.SIGKILL


@pytest.mark.slow
def test_paxos_passthrough_ends_its_writers(
    store: Path, tmp_path: Path, clients: contextlib.ExitStack
) -> None:
    """Its lease runs out while it writes: it is ended, and the next mount takes the image over."""
    options = f"{PAXOS},io=passthrough,state_dir={tmp_path}/state"
    dead = start(store, tmp_path / "a", options)
    writer = client(clients, dead.path / "disk")
    kill_all_of(dead)
    assert writer.does("still") == "done"
    with mounted_anew(dead, options) as anew, clients:
        assert writer.ended() == -signal.SIGKILL
        anew.logs("because nobody renews the leases")
        taken_over(anew.path / "disk")


@pytest.mark.slow
def test_paxos_guarded_ends_mappers_alone(store: Path, tmp_path: Path, clients: contextlib.ExitStack) -> None:
    """A writer whose data went through lockfs fails and stays; one that maps the image is ended."""
    (store / "mapped").write_bytes(bytes(SIZE))
    options = (
        f"backend=paxos,io_timeout=1,watchdog_timeout=10,join=wait,host=hostA,state_dir={tmp_path}/state"
    )
    dead = start(store, tmp_path / "a", options)
    writer = client(clients, dead.path / "disk")
    mapper = client(clients, dead.path / "mapped", "O_RDWR", "map")
    kill_all_of(dead)
    assert writer.does("late") == "ENOTCONN"
    with mounted_anew(dead, options) as anew, clients:
        assert mapper.ended() == -signal.SIGKILL
        assert writer.ended() is None
        assert writer.does("late") == "ENOTCONN"
        taken_over(anew.path / "disk")
        taken_over(anew.path / "mapped")


# --- what is left alone


def test_a_mount_that_hangs_is_not_dead(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its processes are stopped it is refused within the time given, and it serves on afterwards."""
    monkeypatch.setattr(remains, "ANSWER_S", 0.5)
    with mounted(store, tmp_path / "a", "backend=nop") as alive:
        pids = processes_at(alive.path)
        options = given(store, alive.path, "backend=nop")
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(SetupError, match="does not answer, and is not known to be dead"):
                remains.clear(options)
        finally:
            for pid in reversed(pids):
                os.kill(pid, signal.SIGCONT)
        assert (alive.path / "disk").stat().st_size == SIZE
        remains.clear(options)
        assert alive.is_mounted()


@contextlib.contextmanager
def dead_fuse(point: Path, fstype: str, source: str, user: int = 0) -> Iterator[table.Mounted]:
    """A dead FUSE mount that no lockfs needs to have made."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        data = f"fd={device},rootmode=40755,user_id={user},group_id=0,allow_other"
        calls.mount(source, str(point), fstype, 0, data)
    finally:
        os.close(device)
    made = table.at(str(point), table.read())
    assert made is not None
    try:
        yield made
    finally:
        if made in table.read():
            subprocess.run(["umount", "-l", str(point)], check=True)


def test_other_file_systems_are_left_alone(store: Path, tmp_path: Path) -> None:
    """A dead mount that is not lockfs's, or another user's, stays."""
    point = tmp_path / "a"
    options = given(store, point, "backend=nop")
    with dead_fuse(point, "fuse.sshfs", str(store)) as mount:
        remains.clear(options)
        assert mount in table.read()
    with dead_fuse(point, "fuse.lockfs", str(store), user=1234) as mount:
        with pytest.raises(SetupError, match="of another user"):
            remains.clear(options)
        assert mount in table.read()


def test_what_came_into_its_place_is_left_alone(store: Path, tmp_path: Path) -> None:
    """A mount made at the same place after the dead one was found is not unmounted for it."""
    point = tmp_path / "a"
    with dead_fuse(point, "fuse.lockfs", str(store)) as first:
        pass
    with dead_fuse(point, "fuse.lockfs", str(store)) as second:
        remains._uncover(table.Mounted(**{**vars(first), "identity": second.identity + 1}))
        assert second in table.read()


def test_a_store_mounted_over_itself(store: Path) -> None:
    """The dead mount hides the very store: it is cleared away before that is looked at."""
    dead = start(store, store, "backend=nop")
    kill_all_of(dead)
    with mounted_anew(dead, "backend=nop") as anew:
        assert (anew.path / "disk").stat().st_size == SIZE
        assert remains_is_cleared(store)


def test_other_mounts_on_it(store: Path, tmp_path: Path) -> None:
    """What is mounted on a dead mount is not torn away with it."""
    point = tmp_path / "a"
    alive = start(store, point, "backend=nop")
    (point / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", point / "below"], check=True)
    try:
        kill_all_of(alive)
        with pytest.raises(
            SetupError, match=r"with other file systems mounted on it: unmount .*/below first"
        ):
            remains.clear(given(store, point, "backend=nop"))
        assert table.at(str(point / "below"), table.read()) is not None
    finally:
        subprocess.run(["umount", "-l", point], check=True)


def test_stacked_and_renamed(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Several dead mounts on one point go, be they under the names that the options give."""
    point = tmp_path / "a"
    options = given(store, point, "backend=nop,subtype=images,fsname=pool")
    with dead_fuse(point, "fuse.lockfs", str(store)), dead_fuse(point, "fuse.images", "pool"):
        remains.clear(options)
        assert table.at(str(point), table.read()) is None
    assert caplog.text.count("is gone: it is mounted anew") == 2


@pytest.fixture
def users_place(tmp_path: Path) -> Iterator[int]:
    """A process in a mount namespace in which ordinary users may open /dev/fuse; its id."""
    device = tmp_path / "fuse"
    script = 'mknod -m 666 "$0" c 10 229 && mount --bind "$0" /dev/fuse && echo ready && read -r line'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, str(device)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
    finally:
        process.communicate("end\n")


@pytest.fixture
def users_directory() -> Iterator[Path]:
    """A directory that an ordinary user can reach; pytest's own is root's alone."""
    with tempfile.TemporaryDirectory(prefix="lockfs-user-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_an_ordinary_user_clears_its_own(users_directory: Path, users_place: int) -> None:
    """Without privileges a dead mount goes by fusermount3, and the next one serves."""
    store, point, runtime = (users_directory / name for name in ("store", "a", "run"))
    for path in (store, point, runtime):
        path.mkdir()
        os.chown(path, 65534, 65534)
    command = ["nsenter", "-t", str(users_place), "-m"]
    command += ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    command += ["env", f"XDG_RUNTIME_DIR={runtime}"]
    command += [sys.executable, "-m", "lockfs.cli.main", "-o", "backend=nop", str(store), str(point)]
    for expected in ("", "whose processes are all gone; no program has images of it open."):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert expected in done.stderr
        kill_processes_at(point)
