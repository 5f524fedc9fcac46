"""Command lines become MountOptions or one sentence of complaint."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lockfs.backends.fcntl_options import FcntlOptions
from lockfs.backends.paxos.options import LayoutKind, PaxosOptions
from lockfs.cli import options, words
from lockfs.errors import UsageError
from lockfs.keeper.policy import Local, OnLost, Policy, Readers
from lockfs.mirror.modes import IoMode
from lockfs.mount.options import MountOptions

PAXOS_WORDS = (
    "host_id=1",
    "lease_area=/l",
    "lockspace=a",
    "io_timeout=10",
    "watchdog_timeout=60",
    "sector=512",
    "align=1",
    "layout=auto",
    "join=later",
    "state_dir=/s",
)


def parsed(*argv: str) -> MountOptions:
    """The options of a command line that asks for a mount."""
    made = options.parse(argv).options
    assert made is not None
    return made


def with_o(text: str) -> MountOptions:
    """The options of `lockfs -o TEXT /s /m`."""
    return parsed("-o", text, "/s", "/m")


def test_defaults() -> None:
    """Without options the defaults of the README's table hold."""
    made = parsed("/s", "/m")
    assert made == MountOptions("/s", "/m", "/s", os.uname().nodename)
    assert (made.io, made.backend, made.policy) == (IoMode.AUTO, "fcntl", Policy())


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("io=daemon", "io", IoMode.DAEMON),
        ("io=passthrough", "io", IoMode.PASSTHROUGH),
        ("backend=nop", "backend", "nop"),
        ("wait=0", "policy", Policy(wait=0)),
        ("wait=1.5,handover_wait=20", "policy", Policy(wait=1.5, handover_wait=20)),
        ("readers=shared", "policy", Policy(readers=Readers.SHARED)),
        ("local=host", "policy", Policy(local=Local.HOST)),
        ("guests=vmm:qemu-*", "policy", Policy(guests=("vmm", "qemu-*"))),
        ("managers=", "policy", Policy(managers=())),
        ("incoming=-incoming", "policy", Policy(incoming=("-incoming",))),
        ("virtlockd=off", "fcntl", FcntlOptions(virtlockd=False)),
        ("qemu=off", "fcntl", FcntlOptions(qemu=False)),
        ("lock_dir=/l,lock_path=/i", "fcntl", FcntlOptions(lock_dir="/l", lock_path="/i")),
        ("host=a-1.example", "host", "a-1.example"),
        ("log=rel.log", "log", "rel.log"),
        ("fsname=one\\,two\\\\three\\x", "fsname", "one,two\\three\\x"),
        ("subtype=other", "subtype", "other"),
        ("max_read=65536", "kernel_options", ("max_read=65536",)),
        ("allow_other,default_permissions", "kernel_options", ("allow_other",)),
        ("ro", "read_only", True),
        ("rw", "read_only", False),
        ("ro", "mount_flags", words.MS_RDONLY),
        ("nosuid,nodev,noexec,noatime", "mount_flags", 2 | 4 | 8 | 1024),
        ("sync,dirsync", "mount_flags", 16 | 128),
        ("defaults,rw,suid,dev,exec,async,auto,nouser,_netdev,nofail,x-systemd.automount", "mount_flags", 0),
        ("comment=what,user=joe,x-a.b=c,,users,owner,group,noauto,ro,ro", "mount_flags", 1),
        ("wait=3,wait=3.0", "policy", Policy()),
        ("backend=paxos", "backend", "paxos"),
        ("backend=paxos", "paxos", PaxosOptions()),
        ("backend=paxos", "io", IoMode.AUTO),
        ("backend=paxos,io=daemon", "io", IoMode.DAEMON),
        ("backend=paxos,host_id=1", "paxos", PaxosOptions(host_id=1)),
        ("backend=paxos,host_id=2000", "paxos", PaxosOptions(host_id=2000)),
        ("lease_area=/dev/vg/a,backend=paxos", "paxos", PaxosOptions(lease_area="/dev/vg/a")),
        ("backend=paxos,lockspace=a.B-c_9", "paxos", PaxosOptions(lockspace="a.B-c_9")),
        ("backend=paxos,lockspace=" + "n" * 48, "paxos", PaxosOptions(lockspace="n" * 48)),
        (
            "backend=paxos,io_timeout=1,watchdog_timeout=10",
            "paxos",
            PaxosOptions(io_timeout=1, watchdog_timeout=10),
        ),
        ("backend=paxos,io_timeout=60", "paxos", PaxosOptions(io_timeout=60)),
        ("backend=paxos,sector=4096,align=8", "paxos", PaxosOptions(sector=4096, align=8 << 20)),
        ("backend=paxos,layout=index", "paxos", PaxosOptions(layout=LayoutKind.INDEX)),
        (
            "backend=paxos,layout=libvirt,lease_area=/l,lock_path=/i",
            "paxos",
            PaxosOptions(layout=LayoutKind.LIBVIRT, lease_area="/l", lock_path="/i"),
        ),
        ("backend=paxos,join=wait", "paxos", PaxosOptions(join_wait=True)),
        ("backend=paxos,join=later", "paxos", PaxosOptions()),
        ("backend=paxos,state_dir=/s", "paxos", PaxosOptions(state_dir="/s")),
        ("backend=paxos,io=passthrough,unsafe_no_fence", "io", IoMode.PASSTHROUGH),
        ("backend=paxos,unsafe_no_fence", "paxos", PaxosOptions()),
        ("backend=paxos,io=passthrough", "io", IoMode.PASSTHROUGH),
        ("on_lost=kill", "policy", Policy(on_lost=OnLost.KILL)),
        ("watchdog=wdmd", "watchdog", "wdmd"),
        ("watchdog=/dev/watchdog1", "watchdog", "/dev/watchdog1"),
        ("watchdog=none", "watchdog", "none"),
    ],
)
def test_options_are_understood(text: str, field: str, value: object) -> None:
    """Each option, alone or with others, ends in its field."""
    assert getattr(with_o(text), field) == value


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("wiat=3", "wiat.*wait"),
        ("frobnicate", "frobnicate"),
        ("io=fast", "io=.*auto, passthrough, guarded, daemon"),
        ("io", "io needs a value"),
        ("backend=paxos9", "fcntl, paxos, nop"),
        ("on_lost=maim", "revoke, kill"),
        ("backend=paxos,watchdog=wdmd,watchdog_timeout=30", "within 60 seconds"),
        ("watchdog=dog", "watchdog.*absolute"),
        ("wait=-1", "wait=.*0 to 3600"),
        ("wait=nan", "wait"),
        ("wait=inf", "wait"),
        ("wait=1e3", "wait"),
        ("wait=99999", "wait"),
        ("wait=", "wait"),
        ("wait=\u0661", "wait"),
        ("wait=3,wait=4", "wait= is given twice"),
        ("wait=3,x-y,wait=4", "wait= is given twice"),
        ("guests=a::b", "guests"),
        ("guests=" + ":".join("a" * 65), "guests"),
        ("virtlockd=yes", "virtlockd.*on, off"),
        ("lock_dir=/l", "belong together"),
        ("lock_path=/l", "belong together"),
        ("lock_dir=l,lock_path=/p", "lock_dir.*absolute"),
        ("lock_dir=/l,lock_path=/p,virtlockd=off", "contradict"),
        ("backend=nop,qemu=on", "backend=fcntl"),
        ("host=a b", "host"),
        ("host=", "host"),
        ("host=" + "a" * 65, "host"),
        ("log=", "log"),
        ("fsname=a\nb", "control character"),
        ("subtype=a.b", "subtype"),
        ("max_read=12", "max_read.*4096"),
        ("max_read=99999999999999999999", "max_read"),
        ("backend=paxos,host_id=0", "host_id=.*1 to 2000"),
        ("backend=paxos,host_id=2001", "host_id"),
        ("backend=paxos,host_id=\u0661", "host_id"),
        ("backend=paxos,host_id=", "host_id"),
        ("backend=paxos,host_id=1,host_id=2", "host_id= is given twice"),
        ("backend=paxos,lease_area=a", "lease_area.*absolute"),
        ("backend=paxos,state_dir=", "state_dir.*absolute"),
        ("backend=paxos,lockspace=", "lockspace"),
        ("backend=paxos,lockspace=" + "n" * 49, "lockspace.*48"),
        ("backend=paxos,lockspace=a b", "lockspace"),
        ("backend=paxos,io_timeout=0", "io_timeout=.*1 to 60"),
        ("backend=paxos,io_timeout=61", "io_timeout"),
        ("backend=paxos,io_timeout=1.5", "io_timeout.*whole"),
        ("backend=paxos,watchdog_timeout=9", "watchdog_timeout=.*10 to 600"),
        ("backend=paxos,watchdog_timeout=601", "watchdog_timeout"),
        ("backend=paxos,sector=1024", "sector=.*512, 4096"),
        ("backend=paxos,align=3", "align=.*1, 2, 4, 8"),
        ("backend=paxos,layout=files2", "layout=.*auto, files, index, libvirt"),
        ("backend=paxos,layout=libvirt,lease_area=/l", "needs lock_path="),
        ("backend=paxos,lock_path=/i", "lock_path= is for layout=libvirt"),
        ("backend=paxos,join=never", "join=.*wait, later"),
        ("backend=paxos,unsafe_no_fence=yes", "unsafe_no_fence takes no value"),
        ("backend=paxos,virtlockd=on", "backend=fcntl"),
        ("backend=paxos,qemu=on", "backend=fcntl"),
        ("backend=paxos,lock_dir=/l,lock_path=/i", "lock_dir= needs backend=fcntl"),
        ("unsafe_no_fence", "needs backend=paxos"),
        ("backend=nop,unsafe_no_fence", "needs backend=paxos"),
        *((f"{word}", f"{word.partition('=')[0]}= needs backend=paxos") for word in PAXOS_WORDS),
        *((f"backend=nop,{word}", f"{word.partition('=')[0]}= needs backend=paxos") for word in PAXOS_WORDS),
        ("backend=nop,lock_path=/i", "lock_path= needs backend=fcntl"),
        ("ro,rw", "ro and rw contradict"),
        ("nosuid,noatime,suid", "nosuid and suid contradict"),
        ("ro=1", "ro takes no value"),
        ("nofail=1", "nofail takes no value"),
        ("remount,ro", "umount"),
        ("auto_unmount", "unguarded"),
        ("io=auto\\", "backslash"),
        ("x-" + "a" * 70000, "longer"),
    ],
)
def test_wrong_options_are_named(text: str, names: str) -> None:
    """What is unknown, malformed or contradictory is a UsageError that names it and what would do."""
    with pytest.raises(UsageError) as raised:
        with_o(text)
    assert re.search(names, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "argv",
    [[], ["/s"], ["/s", "/m", "/x"], ["-q", "/s", "/m"], ["/s", "/m", "-o"], ["", "/m"], ["/s\0", "/m"]],
)
def test_wrong_command_lines(argv: list[str]) -> None:
    """Two paths and known letters, else a UsageError."""
    with pytest.raises(UsageError):
        options.parse(argv)


def test_options_anywhere_and_repeated() -> None:
    """-o may be repeated and may stand behind the paths, as mount.fuse and libmount put it."""
    made = parsed("/s", "/m", "-o", "ro,wait=1", "-f", "-o", "io=daemon")
    assert (made.read_only, made.policy.wait, made.io, made.foreground) == (True, 1, IoMode.DAEMON, True)
    assert parsed("--", "-s", "-m").source == "-s"


def test_debug_implies_foreground() -> None:
    """-d is -f with more to read."""
    made = parsed("-d", "/s", "/m")
    assert made.foreground
    assert made.debug


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["-V"], ["--version"], ["/s", "-V"]])
def test_texts(argv: list[str]) -> None:
    """Help and version need no paths and make no mount; every option of the parser is in the help."""
    made = options.parse(argv)
    assert made.options is None
    assert made.text
    assert all(f"{name}=" in options.USAGE for name in options._OWN)


def test_mount_helper() -> None:
    """mount.lockfs takes what mount(8) gives: -f means fake, -s lets unknown options pass."""
    argv = ["/s", "/m", "-sfnv", "-N", "7", "-o", "rw,ro_typo,wait=2", "-t", "lockfs"]
    made = options.parse_mount_helper(argv)
    assert made.fake
    assert made.options is not None
    assert made.options.policy.wait == 2
    assert not made.options.foreground
    with pytest.raises(UsageError, match="ro_typo"):
        options.parse_mount_helper([*argv[:2], *argv[3:]])
    with pytest.raises(UsageError, match="wait"):
        options.parse_mount_helper([*argv, "-o", "wait=x"])
    assert options.parse_mount_helper(["-V"]).text


_PIECES = st.sampled_from(
    [
        *(*options._OWN, *words.FLAG_WORDS, options._NO_FENCE, "backend=paxos,", *PAXOS_WORDS),
        *("=", ",", "\\", ":", "/", "x-", "on", "1", "9" * 400),
    ]
)
_STRINGS = st.one_of(
    st.text(max_size=80),
    st.binary(max_size=80).map(os.fsdecode),
    st.lists(st.one_of(_PIECES, st.text(max_size=4)), max_size=12).map("".join),
)


@given(
    st.lists(st.one_of(_STRINGS, st.sampled_from(["-o", "-f", "-d", "-V", "--", "-oro", "/s"])), max_size=8)
)
@example(["/s", "/m", "-o", "wait=" + "9" * 5000])
@example(["--help=x"])
@example(["-o", "io=\udcff,guests=\udc80:\0", "/s", "/m"])
def test_any_command_line(argv: list[str]) -> None:
    """Whatever the strings are: valid options or a UsageError of one line that can be printed."""
    for parse in (options.parse, options.parse_mount_helper):
        try:
            made = parse(argv)
        except UsageError as error:
            str(error).encode("utf-8", "backslashreplace")
        else:
            assert (made.options is None) != (made.text is None)


def _check_paxos(made: MountOptions) -> None:
    """What no accepted command line may lead to, whatever the backend."""
    paxos = made.paxos
    if made.backend != "paxos":
        assert paxos == PaxosOptions(lock_path=paxos.lock_path)  # which the fcntl backend has as well
        return
    assert paxos.host_id is None or 1 <= paxos.host_id <= 2000
    assert 1 <= paxos.io_timeout <= 60
    assert 10 <= paxos.watchdog_timeout <= 600
    assert paxos.lockspace is None or re.fullmatch("[A-Za-z0-9._-]{1,48}", paxos.lockspace)
    assert (paxos.lock_path is None) == (paxos.layout is not LayoutKind.LIBVIRT)
    for path in (paxos.lease_area, paxos.state_dir, paxos.lock_path):
        assert path is None or (path.startswith("/") and "\0" not in path)


_PAXOS_PIECES = st.lists(
    st.sampled_from(
        [
            *(
                *PAXOS_WORDS,
                "io=passthrough",
                "io=daemon",
                options._NO_FENCE,
                "layout=libvirt",
                "layout=index",
            ),
            *("lock_path=/i", "host_id=2001", "io_timeout=61", "sector=4096", "align=8", "backend=nop", "ro"),
        ]
    ),
    max_size=8,
)


@given(_PAXOS_PIECES)
def test_any_choice_of_paxos_options(pieces: list[str]) -> None:
    """Whatever is combined: a mount within the bounds, or one sentence."""
    try:
        made = with_o(",".join(["backend=paxos", *pieces]))
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert made.backend == "paxos"
    _check_paxos(made)


@given(_STRINGS)
def test_any_option_string(text: str) -> None:
    """Whatever stands behind -o: what is accepted is within the bounds of every field."""
    try:
        made = with_o(text)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert 0 <= made.policy.wait <= options.WAIT_S_MAX
    assert made.read_only == bool(made.mount_flags & words.MS_RDONLY)
    assert re.fullmatch("[A-Za-z0-9._-]+", made.host)
    assert "\0" not in made.fsname
    _check_paxos(made)
    assert all(re.fullmatch("allow_other|max_read=[0-9]+", word) for word in made.kernel_options)
