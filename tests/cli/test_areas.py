"""lockfsctl init and dump: what they make, what they refuse, and every line that they print."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lockfs.cli import areas, areas_table, ctl
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, EXIT_USAGE
from lockfs.linux import ofd
from lockfs.records import sectors
from lockfs.records.geometry import FILE_GEOMETRY, GEOMETRIES, MIB, Geometry
from tests.cli.conftest import ROOT
from tests.records.loading import load

EXIT_DAMAGE = 1
NAME = "images"
DELTA = sectors.new_delta(FILE_GEOMETRY, NAME.encode(), 10)
LEASED = ("init", "--lockspace", NAME, "--leases", "4")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def area(tmp_path: Path) -> Path:
    """A place for a lease file; skips where the file system has no O_DIRECT."""
    path = tmp_path / "area"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("the file system of the temporary directory has no O_DIRECT")
    path.unlink()
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs lockfsctl; returns its exit code and what it printed, on standard output and error."""

    def run_one(*words: str | Path) -> tuple[int, str, str]:
        code = ctl.run([str(word) for word in words])
        return code, *capsys.readouterr()

    return run_one


@pytest.fixture
def prepared(area: Path, run: Run) -> Path:
    """A lease file with room for four leases."""
    assert run(*LEASED, area)[0] == EXIT_OK
    return area


def put(path: Path, offset: int, data: bytes) -> None:
    """Write into a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def delta(host_id: int, name: bytes, generation: int = 1, timestamp: int = 77) -> bytes:
    """A delta lease of a host."""
    leader = replace(
        DELTA, owner_id=host_id, owner_generation=generation, timestamp=timestamp, io_timeout=5,
        resource_field=sectors.name_field(name),
    )  # fmt: skip
    return sectors.encode_delta(leader.summed())


# --- init


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_init_in_every_geometry(area: Path, run: Run, shape: Geometry) -> None:
    """The lockspace, the index and its lease; a file is as long as needed, and sparse."""
    sizes = ("--sector", str(shape.sector_size), "--align", str(shape.area_size // MIB))
    code, out, err = run("init", area, "--lockspace", NAME, "--leases", "3", "--io-timeout", "7", *sizes)
    assert (code, err) == (EXIT_OK, "")
    assert out == (
        f"{area} now has lockspace images for {shape.hosts_max} hosts and room for 3 leases ({shape}).\n"
    )
    made = area.read_bytes()
    size = shape.area_size
    assert len(made) == 6 * size
    assert made[:size] == sectors.new_lockspace(shape, NAME.encode(), 7)
    assert made[size : 2 * size] == sectors.new_index(shape, NAME.encode(), size, 3).encode().ljust(
        size, b"\0"
    )
    guard = sectors.new_leader(shape, NAME.encode(), sectors.INDEX_LEASE_NAME)
    assert made[2 * size :] == sectors.new_resource(guard).ljust(4 * size, b"\0")
    assert os.stat(area).st_blocks * 512 < 4 * size
    assert os.stat(area).st_mode & 0o777 == 0o600


def test_init_by_default(area: Path, run: Run) -> None:
    """Room for 4096 leases, in the sectors that the storage takes, with the largest areas."""
    code, out, _ = run("init", area, "--lockspace", NAME)
    assert code == EXIT_OK
    assert "for 2000 hosts and room for 4096 leases" in out
    assert os.stat(area).st_size in (4099 * MIB, 4099 * 8 * MIB)


def test_init_takes_what_is_left_open_from_the_rest(area: Path, run: Run) -> None:
    """--sector 4096 means areas of 8 MiB, --align 2 means sectors of 4096."""
    assert "sectors of 4096, areas of 8 MiB" in run(*LEASED, area, "--sector", "4096")[1]
    area.unlink()
    assert "sectors of 4096, areas of 2 MiB" in run(*LEASED, area, "--align", "2")[1]


def test_init_of_an_empty_or_a_longer_file(area: Path, run: Run) -> None:
    """A file is made longer, never shorter, and stays its owner's."""
    area.touch(0o640)
    os.chmod(area, 0o640)
    assert run(*LEASED, area)[0] == EXIT_OK
    os.truncate(area, 0)
    os.truncate(area, 20 * MIB)
    assert run(*LEASED, area)[0] == EXIT_OK
    assert (os.stat(area).st_size, os.stat(area).st_mode & 0o777) == (20 * MIB, 0o640)


def test_init_again(prepared: Path, run: Run) -> None:
    """Nobody was there: it is prepared anew."""
    code, out, err = run(*LEASED[:-1], "9", prepared)
    assert (code, err) == (EXIT_OK, "")
    assert "room for 9 leases" in out


def test_init_of_an_area_in_use(prepared: Path, run: Run) -> None:
    """It says who is there, and changes nothing."""
    put(prepared, 6 * 512, delta(7, b"host-b"))
    before = prepared.read_bytes()
    code, out, err = run("init", prepared, "--lockspace", "other")
    assert (code, out) == (EXIT_SYSTEM, "")
    assert err == (
        f"lockfsctl: {prepared} is in use: host id 7 ('host-b') joined lockspace 'images' there and did not "
        "leave. Nothing was changed. Unmount there first; if the host is gone for good, see that no other "
        "uses the area, overwrite it with zeros (or remove the file) and try again.\n"
    )
    assert prepared.read_bytes() == before


def test_init_over_something_else(area: Path, run: Run) -> None:
    """A text, an image, another lockspace: nothing is changed, not even the length."""
    area.write_bytes(b"hello\n")
    assert run(*LEASED, area) == (
        EXIT_SYSTEM,
        "",
        f"lockfsctl: {area} is 6 bytes long: it is no lease area, and it is not empty.\n",
    )
    assert area.read_bytes() == b"hello\n"
    area.write_bytes(b"QFI\xfb".ljust(8192, b"\0"))
    assert run(*LEASED, area) == (
        EXIT_SYSTEM,
        "",
        f"lockfsctl: {area} has something that is no lease area, such as a file system or an image, at "
        "byte 0. Nothing was changed. If nobody needs it, overwrite it with zeros (or remove the file) and "
        "try again.\n",
    )
    assert os.stat(area).st_size == 8192
    area.unlink()
    assert run(*LEASED, area)[0] == EXIT_OK
    code, _, err = run("init", area, "--lockspace", "other")
    assert code == EXIT_SYSTEM
    assert "has lockspace 'images' at byte 0. Nothing was changed." in err


def test_init_of_a_file_that_is_locked(area: Path, run: Run) -> None:
    """A new disk of a virtual machine is all zeros too; its locks tell that it is one."""
    area.touch()
    with open(area, "r+b") as file:
        file.truncate(10 * MIB)
        assert ofd.try_lock(file.fileno(), ofd.READ, 100)
        assert run(*LEASED, area)[::2] == (
            EXIT_SYSTEM,
            f"lockfsctl: {area} is in use: another program has locks on it, as a virtual machine has on its "
            "disk. Nothing was changed.\n",
        )
    assert not any(area.read_bytes())
    assert run(*LEASED, area)[0] == EXIT_OK


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "the following arguments are required: --lockspace (lockfsctl --help shows how)."),
        (("--lockspace", ""), "--lockspace must be a name of 1 to 48 bytes."),
        (("--lockspace", "ä" * 25), "--lockspace must be a name of 1 to 48 bytes."),
        (("--lockspace", "x", "--io-timeout", "0"), "--io-timeout must be within 1 and 60 seconds."),
        (("--lockspace", "x", "--io-timeout", "61"), "--io-timeout must be within 1 and 60 seconds."),
        (
            ("--lockspace", "x", "--io-timeout", "1.5"),
            "argument --io-timeout: '1.5' is no whole number (lockfsctl --help shows how).",
        ),
        (("--lockspace", "x", "--leases", "0"), "--leases must be within 1 and 128000 for this geometry."),
        (
            ("--lockspace", "x", "--leases", "16001", "--sector", "512"),
            "--leases must be within 1 and 16000 for this geometry.",
        ),
        (
            ("--lockspace", "x", "--sector", "512", "--align", "2"),
            "--align 2 does not go with --sector 512; with 512 it can only be 1.",
        ),
        (
            ("--lockspace", "x", "--sector", "1024"),
            "argument --sector: invalid choice: 1024 (choose from 512, 4096) (lockfsctl --help shows how).",
        ),
        (
            ("--lockspace", "x", "--lease", "3"),
            "unrecognized arguments: --lease 3 (lockfsctl --help shows how).",
        ),
    ],
)
def test_wrong_usage_of_init(area: Path, run: Run, words: tuple[str, ...], sentence: str) -> None:
    """One sentence, and no file."""
    assert run("init", area, *words) == (EXIT_USAGE, "", f"lockfsctl: {sentence}\n")
    assert not area.exists()


def test_the_geometry_decides_how_many_leases_there_can_be(area: Path, run: Run) -> None:
    """Also when it is the storage that decides it."""
    code, _, err = run("init", area, "--lockspace", NAME, "--leases", "128000", "--align", "1")
    assert code == EXIT_USAGE
    assert "--leases must be within 1 and 16000" in err
    assert not area.exists()


def test_init_where_no_file_can_be(tmp_path: Path, run: Run) -> None:
    """A missing directory, a directory, something that is no file."""
    missing = tmp_path / "none" / "area"
    assert run(*LEASED, missing)[::2] == (
        EXIT_SYSTEM,
        f"lockfsctl: {missing} cannot be made: No such file or directory.\n",
    )
    for path in (tmp_path, Path("/dev/null")):
        assert run(*LEASED, path)[::2] == (
            EXIT_SYSTEM,
            f"lockfsctl: {path} is neither a file nor a block device; leases need one of these.\n",
        )


def test_a_new_file_goes_when_nothing_comes_of_it(
    area: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure before the first write leaves no file behind, one after it does."""

    async def fails(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(areas, "check_unused", fails)
    assert run(*LEASED, area)[::2] == (EXIT_SYSTEM, "lockfsctl: [Errno 5] Input/output error\n")
    assert not area.exists()
    monkeypatch.undo()
    monkeypatch.setattr(areas, "write_plan", fails)
    assert run(*LEASED, area)[0] == EXIT_SYSTEM
    assert os.stat(area).st_size == 7 * MIB


# --- dump


def test_dump_of_a_new_area(prepared: Path, run: Run) -> None:
    """What init made."""
    assert run("dump", prepared) == (
        EXIT_OK,
        "Lockspace images at byte 0: sectors of 512, areas of 1 MiB, 2000 hosts, io_timeout 10 s. No host "
        "was ever there.\n"
        "\n"
        "Resource index of lockspace images at byte 1048576: sectors of 512, areas of 1 MiB, 0 of 4 "
        "resources.\n"
        "\n"
        "BYTE     LEASE         LOCKSPACE  STATE  HOLDER  VERSION  HOSTS  NOTE\n"
        "2097152  rindex_lease  images     free   -       0        2000   -\n",
        "",
    )


def _used(path: Path) -> None:
    """Hosts that are there, that left and that came back; leases held in every way; damage."""
    hosts = {1: delta(1, b"host-a", 4), 2: delta(2, b"host-b", 2, 0), 5: delta(5, b"evil\x1b[1m", 9)}
    for host_id, sector in hosts.items():
        put(path, sectors.delta_sector(host_id) * 512, sector)
    bits = sectors.bitmap_with(frozenset({2, 5}))
    put(path, 256, bits)
    put(path, 9 * 512 + 40, b"\1")
    names = [b"held", b"shared", b"void", b"stray"]
    for number, name in enumerate(names):
        new = sectors.new_leader(FILE_GEOMETRY, NAME.encode(), name, 16)
        if name == b"held":
            new = replace(new, owner_id=1, owner_generation=4, lver=3, timestamp=5, write_id=1).summed()
        if name == b"void":
            new = replace(new, owner_id=2, owner_generation=2, lver=1, timestamp=5, write_id=2).summed()
        offset = sectors.entry_area(number, FILE_GEOMETRY, MIB)
        put(path, offset, sectors.new_resource(new))
        if name != b"stray":
            entry = sectors.IndexEntry(offset, 0, sectors.name_field(name))
            put(path, MIB + 512 + 64 * number, entry.encode())
    put(path, 3 * MIB + 512, sectors.Request(lver=4, force_mode=sectors.FORCE_KILL).encode(512))
    for host_id, generation in ((1, 4), (5, 8), (9, 1)):
        record = sectors.HostRecord(mode=sectors.ModeBlock(sectors.SHARED, generation))
        put(path, 4 * MIB + sectors.host_sector(host_id) * 512, record.encode(512))
    put(path, 6 * MIB + 2 * 512, b"junk")


def test_dump_of_an_area_in_use(prepared: Path, run: Run) -> None:
    """Hosts, leases, who holds them and whether that still counts, and damage; nothing upsets a terminal."""
    _used(prepared)
    code, out, err = run("dump", prepared)
    assert (code, err) == (EXIT_DAMAGE, "")
    assert out == (
        "Lockspace images at byte 0: sectors of 512, areas of 1 MiB, 2000 hosts, io_timeout 10 s. Whether a "
        "host that joined is alive cannot be told in one look.\n"
        "HOST ID  NAME         STATE   GENERATION  TIMESTAMP  IO TIMEOUT  SIGNALS TO\n"
        "1        host-a       joined  4           77         5 s         2, 5\n"
        "2        host-b       left    2           -          5 s         -\n"
        "5        evil\\x1b[1m  joined  9           77         5 s         -\n"
        "\n"
        "Resource index of lockspace images at byte 1048576: sectors of 512, areas of 1 MiB, 3 of 4 "
        "resources.\n"
        "\n"
        "BYTE     LEASE         LOCKSPACE  STATE      HOLDER                                             "
        "                         VERSION  HOSTS  NOTE\n"
        "2097152  rindex_lease  images     free       -                                                  "
        "                         0        2000   -\n"
        "3145728  held          images     exclusive  host-a (1)                                         "
        "                         3        16     asked to be let go by force\n"
        "4194304  shared        images     shared     host-a (1); evil\\x1b[1m (5, void: it left); host id "
        "9 (void: never joined)  0        16     -\n"
        "5242880  void          images     exclusive  host-b (2, void: it left)                          "
        "                         1        16     -\n"
        "6291456  stray         images     free       -                                                  "
        "                         0        16     not in the index\n"
        "\n"
        "AREA AT BYTE  SECTOR  DAMAGE\n"
        "0             9       the record is damaged: its checksum is wrong (-229)\n"
        "6291456       2       the ballot record is damaged: its checksum is wrong (-214)\n"
    )


def test_dump_as_json(prepared: Path, run: Run) -> None:
    """Everything, for programs; the exit code as without."""
    _used(prepared)
    code, out, err = run("dump", prepared, "--json")
    assert (code, err) == (EXIT_DAMAGE, "")
    told = json.loads(out)
    assert (told["area"], told["size"], told["damaged"]) == (str(prepared), 7 * MIB, True)
    assert [one["kind"] for one in told["areas"]] == ["lockspace", "index", *["resource"] * 5]
    assert told["areas"][0]["damage"] == [
        {"sector": 9, "problem": "the record is damaged: its checksum is wrong (-229)"}
    ]
    assert told["areas"][0]["hosts"][0] == {
        "host_id": 1, "name": "host-a", "generation": 4, "timestamp": 77, "io_timeout": 5,
        "event": [0, 0, 0], "signals": [2, 5],
    }  # fmt: skip


def test_dump_never_writes(prepared: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not even open the file for writing."""
    _used(prepared)
    before = prepared.read_bytes(), os.stat(prepared).st_mtime_ns
    opened = []

    def noted(path: str, flags: int, *more: object, **named: object) -> int:
        if path == str(prepared):
            opened.append(flags & os.O_ACCMODE)
        return really_open(path, flags, *more, **named)  # type: ignore[arg-type]

    really_open = os.open
    monkeypatch.setattr(os, "open", noted)
    run("dump", prepared)
    run("dump", prepared, "--json", "--offset", "1M")
    monkeypatch.undo()
    assert opened == [os.O_RDONLY, os.O_RDONLY]
    assert (prepared.read_bytes(), os.stat(prepared).st_mtime_ns) == before


def test_dump_from_a_byte_on(prepared: Path, run: Run) -> None:
    """Leases alone, without the names of their lockspace's hosts."""
    _used(prepared)
    code, out, _ = run("dump", prepared, "--offset", "3M")
    assert code == EXIT_DAMAGE
    lines = out.splitlines()
    assert lines[1].startswith("3145728  held    images     exclusive  host id 1  ")
    assert lines[1].endswith("asked to be let go by force")
    assert "rindex_lease" not in out
    assert "not in the index" not in out


def test_dump_of_one_lease(area: Path, run: Run) -> None:
    """As in a file that libvirt made; one that is held shared while it is acquired."""
    area.write_bytes(load("libvirt-resource-512-1M").area())
    code, out, _ = run("dump", area)
    assert code == EXIT_OK
    assert "__LIBVIRT__DISKS__  free " in out
    held = load("res-ex-host1-512-1M").area()
    sharer = sectors.HostRecord(mode=sectors.ModeBlock(sectors.SHARED, 1)).encode(512)
    area.write_bytes(held[: 3 * 512] + sharer + held[4 * 512 :])
    assert "changing  host id 1; host id 2" in run("dump", area)[1]


def test_dump_of_a_lockspace_that_is_all_in_use(area: Path, run: Run) -> None:
    """No free delta lease states an io_timeout; a removed lease is no stray one."""
    area.write_bytes(b"".join(delta(host_id, b"h") for host_id in range(1, 2001)).ljust(MIB, b"\0"))
    code, out, _ = run("dump", area)
    assert code == EXIT_OK
    assert "2000 hosts. Whether" in out
    assert len(out.splitlines()) == 2002


def test_dump_of_much_damage(area: Path, run: Run) -> None:
    """Not more than a hundred lines of it; JSON has all."""
    wrong = replace(DELTA, checksum=0).encode().ljust(512, b"\0")
    area.write_bytes((wrong * 2000).ljust(MIB, b"\0"))
    code, out, _ = run("dump", area)
    assert code == EXIT_DAMAGE
    assert out.count("checksum is wrong") == areas_table.DAMAGE_LINES_MAX
    assert out.endswith("\n\n1900 more damaged sectors; --json names all.\n")
    assert run("dump", area, "--json")[1].count("checksum is wrong") == 2000


def test_dump_of_other_things(area: Path, run: Run) -> None:
    """Garbage, zeros, too little, nothing."""
    area.write_bytes(b"garbage " * (3 * MIB // 8) + b"x" * 4096)
    told = f"DAMAGE: {3 * MIB + 4096} bytes at byte 0 are no lease area.\n"
    assert run("dump", area) == (EXIT_DAMAGE, told, "")
    area.write_bytes(bytes(3 * MIB))
    assert run("dump", area) == (EXIT_OK, "There is nothing: 3 MiB of zeros.\n", "")
    area.write_bytes(b"hello\n")
    sentence = f"lockfsctl: {area} is 6 bytes long: too short for a lease area.\n"
    assert run("dump", area) == (EXIT_SYSTEM, "", sentence)
    area.unlink()
    sentence = f"lockfsctl: {area} does not exist; check the path, or prepare it with lockfsctl init.\n"
    assert run("dump", area) == (EXIT_SYSTEM, "", sentence)
    assert not area.exists()


def test_dump_without_o_direct(run: Run) -> None:
    """What a cache shows is not what the other hosts see: refused, with the reason."""
    code, out, err = run("dump", "/proc/version")
    assert (code, out) == (EXIT_SYSTEM, "")
    assert "a file system without O_DIRECT" in err


@pytest.mark.parametrize(
    ("word", "code", "sentence"),
    [
        ("5", EXIT_USAGE, "--offset must be a multiple of 4096."),
        ("9M", EXIT_SYSTEM, "{area} is 7340032 bytes long: nothing begins at byte 9437184."),
        ("1x", EXIT_USAGE, "argument --offset: '1x' is no whole number (lockfsctl --help shows how)."),
        ("", EXIT_USAGE, "argument --offset: '' is no whole number (lockfsctl --help shows how)."),
        ("M", EXIT_USAGE, "argument --offset: '' is no whole number (lockfsctl --help shows how)."),
    ],
)
def test_wrong_offsets(prepared: Path, run: Run, word: str, code: int, sentence: str) -> None:
    """One sentence."""
    told = f"lockfsctl: {sentence.format(area=prepared)}\n"
    assert run("dump", prepared, "--offset", word) == (code, "", told)


def test_offsets() -> None:
    """Bytes, or with a suffix of either case."""
    parse = areas.byte_count
    assert [parse(word) for word in ("0", "8192", "4k", "1M", "2g", "1T")] == [
        0, 8192, 4096, MIB, 2 << 30, 1 << 40,
    ]  # fmt: skip
    with pytest.raises(argparse.ArgumentTypeError):
        parse("²")


def test_as_a_program(area: Path) -> None:
    """The command itself, and its help."""

    def program(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lockfs.cli.ctl", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    made = program(*LEASED, area)
    assert (made.returncode, made.stderr) == (EXIT_OK, "")
    shown = program("dump", area)
    assert (shown.returncode, shown.stderr) == (EXIT_OK, "")
    assert "rindex_lease" in shown.stdout
    for command in ("init", "dump"):
        told = program(command, "--help")
        assert told.returncode == EXIT_OK
        assert "AREA" in told.stdout


# --- devices


@pytest.fixture(params=[512, 4096])
def device(request: pytest.FixtureRequest, area: Path) -> Iterator[tuple[str, int]]:
    """A loop device of 40 MiB with sectors of a given size."""
    if os.geteuid() != 0 or shutil.which("losetup") is None or not Path("/dev/loop-control").exists():
        pytest.skip("needs root, losetup and loop devices")
    with open(area, "xb") as file:
        file.truncate(40 * MIB)
    command = ["losetup", "--find", "--show", "--sector-size", str(request.param), str(area)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if made.returncode != 0:
        pytest.skip(f"no loop device can be made: {made.stderr.strip()}")
    path = made.stdout.strip()
    yield path, request.param
    subprocess.run(["losetup", "--detach", path], check=True, timeout=60)


def test_a_device(device: tuple[str, int], run: Run) -> None:
    """As many leases as fit, in the device's sectors; never more than fit."""
    path, sector_size = device
    shape = FILE_GEOMETRY if sector_size == 512 else GEOMETRIES[-1]
    code, out, _ = run("init", path, "--lockspace", NAME)
    assert code == EXIT_OK
    assert f"room for {40 * MIB // shape.area_size - 3} leases ({shape})" in out
    code, out, _ = run("dump", path)
    assert code == EXIT_OK
    assert "rindex_lease" in out
    code, _, err = run("init", path, "--lockspace", NAME, "--leases", "38", "--align", "1")
    assert (code, err) == (
        EXIT_SYSTEM,
        f"lockfsctl: {path} is too small: it has 40 MiB, and 38 leases need 41 MiB.\n",
    )
    if sector_size == 4096:
        assert run("init", path, "--lockspace", NAME, "--sector", "512")[::2] == (
            EXIT_USAGE,
            f"lockfsctl: The storage of {path} needs --sector 4096; leave --sector out.\n",
        )


def test_a_device_that_is_mounted(device: tuple[str, int], run: Run, tmp_path: Path) -> None:
    """Whatever its bytes say, it is not touched; nor are those of a file system that is not mounted."""
    path, _ = device
    subprocess.run(["mkfs.ext4", "-q", path], check=True, timeout=60)
    code, _, err = run("init", path, "--lockspace", NAME)
    assert code == EXIT_SYSTEM
    assert "such as a file system or an image, at byte 0." in err
    point = tmp_path / "point"
    point.mkdir()
    subprocess.run(["mount", path, point], check=True, timeout=60)
    try:
        code, _, err = run("init", path, "--lockspace", NAME)
    finally:
        subprocess.run(["umount", point], check=True, timeout=60)
    assert code == EXIT_SYSTEM
    assert err.startswith(f"lockfsctl: {path} is in use by this system: it is mounted")
