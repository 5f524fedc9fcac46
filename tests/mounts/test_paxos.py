"""Two mounts of one store with leases on the storage: what two hosts do, and what is told to the user.

What needs real time (a host that must count as dead, a lease that is not renewed) is in the scenarios of
test_paxos_time.py.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockfs.mount import control
from lockfs.records.geometry import MIB
from tests.mounts.test_leases import PATIENCE_S, Holder, ctl, opens_soon, refused
from tests.support.mounts import POLL_S, Mount, TwoMounts, two_mounts

SIZE = 64 << 10
HOST_ID = 7


def paxos(base: Path, *more: str) -> str:
    """Options of a mount whose machine keeps its host ids below `base`."""
    return ",".join(("backend=paxos", "io_timeout=1", f"state_dir={base}/state", *more))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoMounts]:
    """Two hosts that have joined; hostA with a host id of its own, hostB with a free one."""
    base = tmp_path_factory.mktemp("paxos")
    common = paxos(base, "join=wait", "wait=0.3")
    with two_mounts(base, f"{common},host_id={HOST_ID}", b_options=common) as made:
        yield made


@pytest.fixture
def image(request: pytest.FixtureRequest, hosts: TwoMounts) -> str:
    """An image in the store, of this test alone."""
    name = f"{request.node.originalname}.img"
    (hosts.store / name).write_bytes(bytes(SIZE))
    return name


def wait_for(condition: Callable[[], object], what: str, within: float = PATIENCE_S) -> None:
    """Return once the condition holds."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, f"not within {within:.0f} s: {what}"
        time.sleep(POLL_S)


def logged(mount: Mount, words: str, times: int = 1, within: float = PATIENCE_S) -> None:
    """Return once the mount has logged the words so often; its log is written behind what it does."""
    mount.logs(words, times=times, within=within)


def ask(mount: Mount, operation: str) -> control.Message:
    """A question to the mount's control socket."""
    socket = control.directory() / control.socket_name(str(mount.path), mount.process.pid)
    return control.request(socket, {"op": operation}, PATIENCE_S)


def lease_file(store: Path, image: str) -> Path:
    """Where the lease of an image lies."""
    return store / ".lockfs" / "leases" / f"i{(store / image).stat().st_ino:016x}"


# --- Two hosts


def test_second_writer_is_refused_by_name(hosts: TwoMounts, image: str) -> None:
    """While one host writes, the other is refused, by the holder's name; readers are not."""
    with open(hosts.a.path / image, "r+b"):
        assert refused(hosts.b.path / image)
        program = Path(sys.executable).resolve().name
        logged(hosts.b, f"'{image}': {image} is held by {program} (pid {os.getpid()}) on hostA")
        assert not refused(hosts.b.path / image, os.O_RDONLY)
    opens_soon(hosts.b.path / image)


def test_the_next_writer_takes_over(hosts: TwoMounts, image: str) -> None:
    """After a close the other host writes on what was written, and keeps the first one out in turn."""
    with open(hosts.a.path / image, "r+b") as file:
        file.write(b"from A")
    opens_soon(hosts.b.path / image)
    with open(hosts.b.path / image, "r+b") as file:
        assert file.read(6) == b"from A"
        assert refused(hosts.a.path / image)
        file.write(b" and B")
    opens_soon(hosts.a.path / image)
    assert (hosts.a.path / image).read_bytes()[:12] == b"from A and B"


def test_a_waiting_writer_gets_its_turn(hosts: TwoMounts, image: str) -> None:
    """A holder's death is a close, and the one that waits has the image then."""
    holder = Holder(hosts.a.path / image)
    assert refused(hosts.b.path / image)
    holder.process.kill()
    holder.process.communicate()
    opens_soon(hosts.b.path / image)


def test_destruction_is_refused(hosts: TwoMounts, image: str) -> None:
    """What another host holds can be neither truncated nor removed nor replaced."""
    (hosts.store / "other").write_bytes(b"other")
    with open(hosts.a.path / image, "r+b"):
        for change in (
            lambda: os.truncate(hosts.b.path / image, 0),
            lambda: os.unlink(hosts.b.path / image),
            lambda: os.rename(hosts.b.path / "other", hosts.b.path / image),
        ):
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno == errno.EBUSY
    assert (hosts.store / image).stat().st_size == SIZE


def test_the_lease_area_is_hidden(hosts: TwoMounts, image: str) -> None:
    """The directory of the leases is in the store, and on no mount."""
    with open(hosts.a.path / image, "r+b"):
        assert lease_file(hosts.store, image).stat().st_size == MIB
    for mount in (hosts.a.path, hosts.b.path):
        assert ".lockfs" not in os.listdir(mount)
        assert not (mount / ".lockfs").exists()
        assert not (mount / ".lockfs" / "leases" / "lockspace").exists()
        with pytest.raises(PermissionError):
            (mount / ".lockfs").mkdir()
        with pytest.raises(PermissionError):
            os.rename(mount / image, mount / ".lockfs")


def test_data_is_guarded_by_itself(hosts: TwoMounts, image: str) -> None:
    """io=auto never hands the writes of a lease that may be lost to the kernel alone."""
    status = {mount["host"]: mount for mount in json.loads(ctl("status", "--json").stdout)["mounts"]}
    for mount in (hosts.a, hosts.b):
        found = ask(mount, "status")
        assert (found["backend"], found["io"]) == ("paxos", "guarded" if found["passthrough"] else "daemon")
    assert {"hostA", "hostB"} <= set(status)


# --- What is told


def test_who(hosts: TwoMounts, image: str) -> None:
    """Both hosts name the holder: host, process and program."""
    with open(hosts.a.path / image, "r+b"):
        for mount, remote in ((hosts.a, False), (hosts.b, True)):
            (told,) = json.loads(ctl("who", "--json", str(mount.path / image)).stdout)["images"]
            opener = told["openers"][0]
            assert (told["host"], told["mode"], told["remote"]) == ("hostA", "exclusive", remote)
            assert opener["pid"] == os.getpid()
    assert json.loads(ctl("who", "--json", str(hosts.b.path / image)).stdout)["images"] == []


def test_hosts(hosts: TwoMounts, image: str) -> None:
    """Each mount names every host of the lockspace, and how many leases are its own."""
    with open(hosts.a.path / image, "r+b"):
        for mount, own in ((hosts.a, "hostA"), (hosts.b, "hostB")):
            answer = json.loads(ctl("hosts", "--json", str(mount.path)).stdout)
            told = {host["name"]: host for host in answer["hosts"]}
            assert set(told) == {"hostA", "hostB"}
            assert told["hostA"]["host_id"] == HOST_ID != told["hostB"]["host_id"]
            assert {name for name, host in told.items() if host["own"]} == {own}
            assert told[own]["leases"] == (1 if own == "hostA" else 0)
            assert {host["io_timeout"] for host in told.values()} == {1}
            assert told[own]["state"] == "live"
            table = ctl("hosts", str(mount.path)).stdout
            assert f"{own} (this mount)" in table and "hostA" in table and "hostB" in table


def test_collecting_leases_of_images_that_are_gone(hosts: TwoMounts, image: str) -> None:
    """`gc` removes what was left by images that are gone; neither those of images nor one that is held."""
    (hosts.store / "gone.img").write_bytes(bytes(SIZE))
    (hosts.store / "open.img").write_bytes(bytes(SIZE))
    for name in (image, "gone.img"):
        opens_soon(hosts.a.path / name)
    kept = lease_file(hosts.store, image)
    removed, held = (lease_file(hosts.store, name) for name in ("gone.img", "open.img"))
    with open(hosts.a.path / "open.img", "r+b"):
        os.unlink(hosts.a.path / "open.img")
        os.unlink(hosts.a.path / "gone.img")
        assert all(lease.exists() for lease in (kept, removed, held))
        done = ctl("gc", str(hosts.b.path))
        assert (done.returncode, done.stderr) == (0, ""), done
        assert int(done.stdout.split()[0]) >= 1 and "removed." in done.stdout
        assert (kept.exists(), removed.exists(), held.exists()) == (True, False, True)
    opens_soon(hosts.b.path / image)
    assert ask(hosts.b, "gc")["done"]
    assert kept.exists() and not held.exists(), "closed at last, and so collected"


# --- What is refused at mounting


def mount_fails(store: Path, point: Path, options: str) -> tuple[int, str]:
    """Try to mount; returns the exit code and the one sentence. Nothing may be left mounted."""
    point.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "lockfs.cli.main", "-o", options, str(store), str(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert not os.path.ismount(point)
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("lockfs: ") and sentence.endswith("."), sentence
    return done.returncode, sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("layout=heap", "layout='heap' is not known: give one of auto, files, index, libvirt"),
        ("lock_path=/images", "lock_path= is for layout=libvirt"),
        ("layout=libvirt,lease_area=/", "layout=libvirt needs lock_path="),
        ("host_id=0", "host_id='0' does not fit: give a whole number from 1 to 2000"),
        ("host_id=2001", "host_id='2001' does not fit"),
        ("watchdog_timeout=9", "watchdog_timeout='9' does not fit"),
        ("io_timeout=61", "io_timeout='61' does not fit"),
        ("sector=1024", "sector='1024' is not known: give one of 512, 4096"),
        ("lockspace=a/b", "cannot name a lockspace"),
        ("lock_dir=/x", "The option lock_dir= needs backend=fcntl"),
    ],
)
def test_wrong_words(tmp_path: Path, options: str, words: str) -> None:
    """Options that cannot be meant are refused before anything is looked at."""
    base = "" if "io_timeout" in options else "io_timeout=1,"
    code, sentence = mount_fails(tmp_path, tmp_path / "mount", f"backend=paxos,{base}{options}")
    assert code == 1 and words in sentence, sentence


@pytest.mark.parametrize("option", ["host_id=1", "lease_area=/x", "join=wait", "io_timeout=1"])
def test_options_of_this_backend_alone(tmp_path: Path, option: str) -> None:
    """With file locks they mean nothing, and are not passed over in silence."""
    code, sentence = mount_fails(tmp_path, tmp_path / "mount", option)
    name, _, _ = option.partition("=")
    assert code == 1 and f"The option {name}= needs backend=paxos" in sentence, sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("lockspace=other", "it belongs to lockspace 'lockfs', not 'other' (-226); give its name"),
        ("sector=4096", "sector= does not fit"),
        ("sector=512,align=2", "align= does not fit"),
        ("layout=index", "layout=index needs lease_area="),
        ("lease_area={base}/nowhere", "nowhere cannot be used: No such file or directory"),
        ("lease_area={base}/blank", "prepare one with `lockfsctl init {base}/blank --lockspace NAME`"),
        ("lease_area={base}/empty", "prepare one with `lockfsctl init {base}/empty --lockspace NAME`"),
        ("layout=files,lease_area={base}/blank", "layout=files needs a directory"),
        ("layout=index,lease_area={base}", "layout=index needs a file or a block device"),
        ("lease_area=/dev/null", "neither a file nor a block device"),
        (f"host_id={HOST_ID},join=wait", f"host id {HOST_ID} is in use by host hostA; give another"),
    ],
)
def test_areas_that_do_not_fit(hosts: TwoMounts, tmp_path: Path, options: str, words: str) -> None:
    """An area that is missing, unprepared or another than meant is refused, says what to do, and stays."""
    (tmp_path / "blank").write_bytes(bytes(MIB))
    (tmp_path / "empty").touch()
    lockspace = hosts.store / ".lockfs" / "leases" / "lockspace"
    before = lockspace.stat().st_size, sorted(os.listdir(lockspace.parent))
    code, sentence = mount_fails(
        hosts.store, tmp_path / "mount", paxos(tmp_path, "host=hostC", options.format(base=tmp_path))
    )
    assert code == 32 and words.format(base=tmp_path) in sentence, sentence
    assert (tmp_path / "blank").read_bytes() == bytes(MIB)
    assert (tmp_path / "empty").stat().st_size == 0
    assert (lockspace.stat().st_size, sorted(os.listdir(lockspace.parent))) == before


def test_host_id_that_the_area_has_no_room_for(tmp_path: Path) -> None:
    """A host id beyond the geometry is refused at mounting, not at the first write."""
    store = tmp_path / "store"
    store.mkdir()
    small = paxos(tmp_path, "sector=4096", "align=1", "host_id=251")
    code, sentence = mount_fails(store, tmp_path / "mount", small)
    assert code == 32 and "is for host ids up to 250; give one of these" in sentence, sentence


def test_storage_without_direct_io(tmp_path: Path) -> None:
    """Storage that only works through a cache is refused: leases there would be one host's own dream."""
    cached = tmp_path / "cached"
    cached.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(cached)], check=True)
    try:
        (cached / "leases").mkdir()
        store = tmp_path / "store"
        store.mkdir()
        code, sentence = mount_fails(
            store, tmp_path / "mount", paxos(tmp_path, f"lease_area={cached}/leases")
        )
        assert code == 32 and "lies on a file system without O_DIRECT" in sentence, sentence
        assert os.listdir(cached / "leases") == []
    finally:
        subprocess.run(["umount", str(cached)], check=True)
