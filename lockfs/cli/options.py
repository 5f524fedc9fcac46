"""The command lines of lockfs and mount.lockfs, turned into MountOptions or one sentence of complaint."""

from __future__ import annotations

import getopt
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lockfs import __version__
from lockfs.backends.fcntl_options import FcntlOptions
from lockfs.backends.paxos.options import LayoutKind, PaxosOptions
from lockfs.cli import words
from lockfs.cli.words import shown
from lockfs.errors import UsageError
from lockfs.keeper.policy import Local, OnLost, Policy, Readers
from lockfs.mirror.modes import IoMode
from lockfs.mount.options import BACKENDS, MountOptions
from lockfs.paxos.timing import IO_TIMEOUT_MAX, IO_TIMEOUT_MIN
from lockfs.records.geometry import HOSTS_MAX, MIB

WAIT_S_MAX = 3600.0
MAX_READ_MIN, MAX_READ_MAX = 4096, 1 << 24
LIST_ITEMS_MAX = 64
WATCHDOG_MIN, WATCHDOG_MAX = 10, 600
WDMD_S = 60
PATH_CHARS_MAX = 4095

USAGE = """\
usage: lockfs [-f] [-d] [-o OPTION[,OPTION...]] SOURCE MOUNTPOINT
       mount -t fuse.lockfs SOURCE MOUNTPOINT -o OPTION[,OPTION...]

Mirrors the directory SOURCE at MOUNTPOINT and lets only one host at a time open an image for
writing. SOURCE and MOUNTPOINT may be the same directory.

  -f             stay in the foreground, log to standard error
  -d             as -f, and log what is done in detail
  -o OPTIONS     see below; may be repeated
  -V, --version  print the version
  -h, --help     print this text

options:
  io=auto|passthrough|guarded|daemon   who moves the data of images (auto)
  backend=fcntl|paxos|nop              what decides who may write: locks of the store (fcntl), leases on
                                       storage without locks, or nothing: this host alone
  wait=SECONDS                         how long an open waits for a held image (3)
  handover_wait=SECONDS                the same while a guest migrates (10)
  readers=allow|shared                 reading needs no lease, or a shared one (allow)
  local=process|host                   who may write together on one host (process)
  on_lost=revoke|kill                  what happens to openers whose lease is lost: their handles fail,
                                       or they are killed (revoke)
  guests=, managers=, incoming=        colon-separated: programs that are guests, programs that
                                       manage them, arguments of a guest that takes over
  virtlockd=on|off, qemu=on|off        keep out hosts that lock without lockfs (on)
  lock_dir=DIR, lock_path=PATH         virtlockd's lockspace directory, and the store's path in
                                       the domains' XML
  host_id=N, lockspace=NAME            paxos: this host's number (a free one), the lockspace's name
  lease_area=PATH                      paxos: directory, file or device of the leases (in the store)
  layout=auto|files|index|libvirt      paxos: how leases lie there
  io_timeout=S, watchdog_timeout=S     paxos: times of the protocol (10, 60; see docs/paxos.md)
  sector=512|4096, align=1|2|4|8       paxos: geometry of what is yet to be made
  join=wait|later                      paxos: whether mounting waits for the lockspace (later)
  state_dir=DIR                        paxos: where this machine keeps its host ids (/var/lib/lockfs)
  watchdog=none|wdmd|DEVICE            what resets this machine should lockfs not be able to fence (none)
  host=NAME                            this machine's name for the others (its host name)
  log=FILE                             write the log there too
  fsname=NAME, subtype=NAME            what the mount table shows
  max_read=BYTES                       largest read request of the kernel
  ro, noatime, nosuid, nodev, noexec, sync, dirsync and their opposites, as mount(8) has them
"""


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for: `text` to be printed, or a mount. `fake`: check, but do not mount."""

    options: MountOptions | None = None
    text: str | None = None
    fake: bool = False


def _choice(*values: str) -> Callable[[str, str], str]:
    def parse(name: str, value: str) -> str:
        if value not in values:
            raise UsageError(f"{name}={shown(value)} is not known: give one of {', '.join(values)}.")
        return value

    return parse


def _switch(name: str, value: str) -> bool:
    return _choice("on", "off")(name, value) == "on"


def _seconds(name: str, value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", value) or float(value) > WAIT_S_MAX:
        raise UsageError(f"{name}={shown(value)} is not a time: give 0 to {WAIT_S_MAX:.0f} seconds.")
    return float(value)


def _list(name: str, value: str) -> tuple[str, ...]:
    items = tuple(value.split(":")) if value else ()
    if "" in items or len(items) > LIST_ITEMS_MAX:
        raise UsageError(
            f"{name}={shown(value)} is not a list: give up to {LIST_ITEMS_MAX} words, colons between them."
        )
    return items


def _path(name: str, value: str) -> str:
    if not value.startswith("/") or len(value) > PATH_CHARS_MAX:
        raise UsageError(f"{name}={shown(value)} is not an absolute path: give one that starts with a slash.")
    return value


def _text(name: str, value: str) -> str:
    if not 0 < len(value) <= PATH_CHARS_MAX:
        raise UsageError(f"{name}={shown(value)} does not fit: give 1 to {PATH_CHARS_MAX} characters.")
    return value


def _host(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise UsageError(f"{name}={shown(value)} cannot name a host: use up to 64 of A-Z, a-z, 0-9, '._-'.")
    return value


def _subtype(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", value):
        raise UsageError(f"{name}={shown(value)} cannot be a subtype: use up to 32 of A-Z, a-z, 0-9, '_-'.")
    return value


def _number(least: int, most: int) -> Callable[[str, str], int]:
    def parse(name: str, value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
            raise UsageError(
                f"{name}={shown(value)} does not fit: give a whole number from {least} to {most}."
            )
        return int(value)

    return parse


def _lockspace(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,48}", value):
        raise UsageError(f"{name}={shown(value)} cannot name a lockspace: up to 48 of A-Z, a-z, 0-9, '._-'.")
    return value


def _size(*sizes: int) -> Callable[[str, str], int]:
    choice = _choice(*map(str, sizes))
    return lambda name, value: int(choice(name, value))


def _watchdog(name: str, value: str) -> str:
    return value if value in ("none", "wdmd") else _path(name, value)


def _max_read(name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value) or not MAX_READ_MIN <= int(value) <= MAX_READ_MAX:
        raise UsageError(f"{name}={shown(value)} does not fit: give {MAX_READ_MIN} to {MAX_READ_MAX} bytes.")
    return int(value)


_OWN: dict[str, Callable[[str, str], object]] = {
    "io": _choice(*(mode.value for mode in IoMode)),
    "backend": _choice(*BACKENDS),
    "wait": _seconds,
    "handover_wait": _seconds,
    "readers": _choice(*(rule.value for rule in Readers)),
    "local": _choice(*(rule.value for rule in Local)),
    "on_lost": _choice(*(rule.value for rule in OnLost)),
    "guests": _list,
    "managers": _list,
    "incoming": _list,
    "virtlockd": _switch,
    "qemu": _switch,
    "lock_dir": _path,
    "lock_path": _path,
    "host": _host,
    "log": _text,
    "fsname": _text,
    "subtype": _subtype,
    "max_read": _max_read,
    "host_id": _number(1, HOSTS_MAX),
    "lease_area": _path,
    "lockspace": _lockspace,
    "io_timeout": _number(IO_TIMEOUT_MIN, IO_TIMEOUT_MAX),
    "watchdog_timeout": _number(WATCHDOG_MIN, WATCHDOG_MAX),
    "sector": _size(512, 4096),
    "align": _size(1, 2, 4, 8),
    "layout": _choice(*(kind.value for kind in LayoutKind)),
    "join": _choice("wait", "later"),
    "state_dir": _path,
    "watchdog": _watchdog,
}
_FCNTL_ONLY = ("virtlockd", "qemu", "lock_dir")
_PAXOS_ONLY = (
    "host_id", "lease_area", "lockspace", "io_timeout", "watchdog_timeout", "sector", "align", "layout",
    "join", "state_dir",
)  # fmt: skip
_NO_FENCE = "unsafe_no_fence"
"""Was needed for io=passthrough with paxos before a lost lease was fenced; accepted, without effect."""


@dataclass
class _Words:
    """The words of all `-o` of one command line, as far as they were read."""

    sloppy: bool = False
    own: dict[str, object] = field(default_factory=dict)
    flags: dict[str, tuple[str, int]] = field(default_factory=dict)
    allow_other: bool = False
    no_fence: bool = False

    def read(self, text: str) -> None:
        for name, value in words.split(text):
            self._word(name, value)

    def _word(self, name: str, value: str | None) -> None:
        if name in _OWN:
            self._own_word(name, value)
        elif name in words.FLAG_WORDS and value is None:
            subject, bits = words.FLAG_WORDS[name]
            earlier, earlier_bits = self.flags.setdefault(subject, (name, bits))
            if earlier_bits != bits:
                raise UsageError(f"The options {earlier} and {name} contradict each other: give one of them.")
        elif name == "allow_other" and value is None:
            self.allow_other = True
        elif name == _NO_FENCE and value is None:
            self.no_fence = True
        elif name in words.REFUSED:
            raise UsageError(words.REFUSED[name])
        elif not words.is_ignored(name, value) and not self.sloppy:
            raise UsageError(_unknown(name, value))

    def _own_word(self, name: str, value: str | None) -> None:
        if value is None:
            raise UsageError(f"The option {name} needs a value: write {name}=VALUE (see lockfs --help).")
        if any(character < " " or character == "\x7f" for character in value):
            raise UsageError(f"The value of {name}= contains a control character: {shown(value)}.")
        parsed = _OWN[name](name, value)
        if self.own.setdefault(name, parsed) != parsed:
            raise UsageError(f"The option {name}= is given twice with different values: give it once.")


def _unknown(name: str, value: str | None) -> str:
    if name in words.FLAG_WORDS or words.is_ignored(name, None) or name in ("allow_other", _NO_FENCE):
        return f"The option {name} takes no value, not {shown(value or '')}: write just {name}."
    known = [*_OWN, *words.FLAG_WORDS]
    import difflib  # noqa: PLC0415  (takes memory that the guardian would keep)

    near = difflib.get_close_matches(name[:32], known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"its own options are {', '.join(_OWN)}."
    return f"The option {shown(name)} is unknown to lockfs: {hint}"


def _cross_checks(own: dict[str, object], *, no_fence: bool) -> None:
    backend = own.get("backend", BACKENDS[0])
    for names, owner in ((_FCNTL_ONLY, "fcntl"), (_PAXOS_ONLY, "paxos")):
        for name in names:
            if backend != owner and own.get(name) not in (None, False):
                raise UsageError(
                    f"The option {name}= needs backend={owner}: leave it out with backend={backend}."
                )
    if backend == "paxos":
        _check_paxos(own)
        return
    if backend == "nop" and "lock_path" in own:
        raise UsageError("The option lock_path= needs backend=fcntl: leave it out with backend=nop.")
    if no_fence:
        raise UsageError(f"The option {_NO_FENCE} needs backend=paxos: leave it out with backend={backend}.")
    if ("lock_dir" in own) != ("lock_path" in own):
        raise UsageError("The options lock_dir= and lock_path= belong together: give both or neither.")
    if "lock_dir" in own and own.get("virtlockd") is False:
        raise UsageError("The options virtlockd=off and lock_dir= contradict each other: give one of them.")


def _check_paxos(own: dict[str, object]) -> None:
    if own.get("watchdog") == "wdmd" and cast(int, own.get("watchdog_timeout", WDMD_S)) < WDMD_S:
        raise UsageError(
            f"watchdog=wdmd resets a machine within {WDMD_S} seconds: watchdog_timeout= must not be less."
        )
    if own.get("layout") == LayoutKind.LIBVIRT.value and "lock_path" not in own:
        raise UsageError(
            "layout=libvirt needs lock_path=, the path of the images as the domains' XML has it."
        )
    if "lock_path" in own and own.get("layout") != LayoutKind.LIBVIRT.value:
        raise UsageError("With backend=paxos, lock_path= is for layout=libvirt: leave it out.")


def _paxos(own: dict[str, Any]) -> PaxosOptions:
    names = (
        "host_id",
        "lease_area",
        "lockspace",
        "io_timeout",
        "watchdog_timeout",
        "sector",
        "state_dir",
        "lock_path",
    )
    given = {name: own[name] for name in names if name in own}
    if "align" in own:
        given["align"] = own["align"] * MIB
    if "layout" in own:
        given["layout"] = LayoutKind(own["layout"])
    return PaxosOptions(**given, join_wait=own.get("join") == "wait")


def _policy(own: dict[str, Any]) -> Policy:
    names = ("wait", "handover_wait", "guests", "managers", "incoming")
    given = {name: own[name] for name in names if name in own}
    if "readers" in own:
        given["readers"] = Readers(own["readers"])
    if "local" in own:
        given["local"] = Local(own["local"])
    if "on_lost" in own:
        given["on_lost"] = OnLost(own["on_lost"])
    return Policy(**given)


def _build(read: _Words, source: str, mountpoint: str, *, foreground: bool, debug: bool) -> MountOptions:
    own = cast(dict[str, Any], read.own)
    _cross_checks(own, no_fence=read.no_fence)
    flags = 0
    for _, bits in read.flags.values():
        flags |= bits
    kernel = ["allow_other"] if read.allow_other else []
    if "max_read" in own:
        kernel.append(f"max_read={own['max_read']}")
    return MountOptions(
        source=source,
        mountpoint=mountpoint,
        fsname=own.get("fsname", source),
        host=own.get("host") or _host("host", os.uname().nodename),
        io=IoMode(own.get("io", IoMode.AUTO.value)),
        backend=own.get("backend", BACKENDS[0]),
        policy=_policy(own),
        fcntl=FcntlOptions(**{name: own[name] for name in (*_FCNTL_ONLY, "lock_path") if name in own}),
        paxos=_paxos(own),
        subtype=own.get("subtype", "lockfs"),
        read_only=bool(flags & words.MS_RDONLY),
        mount_flags=flags,
        kernel_options=tuple(kernel),
        foreground=foreground or debug,
        debug=debug,
        log=own.get("log"),
        watchdog=own.get("watchdog", "none"),
    )


def _two_paths(arguments: Sequence[str]) -> tuple[str, str]:
    if len(arguments) != 2:
        raise UsageError(
            f"Give two paths, SOURCE and MOUNTPOINT, not {len(arguments)} (lockfs --help shows how)."
        )
    for path in arguments:
        if not path or "\0" in path or len(path) > PATH_CHARS_MAX:
            raise UsageError(f"{shown(path)} cannot be a path: give 1 to {PATH_CHARS_MAX} characters.")
    return arguments[0], arguments[1]


def _getopt(argv: Sequence[str], short: str, long: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        return getopt.gnu_getopt(list(argv), short, long)
    except getopt.GetoptError as error:
        raise UsageError(f"On the command line, {error.msg:.120} (lockfs --help shows how).") from error


def parse(argv: Sequence[str]) -> Invocation:
    """Read lockfs's arguments (without the program's name).

    Raises:
        UsageError: unknown, malformed or contradictory; never anything else, whatever the strings are.
    """
    given, arguments = _getopt(argv, "fdo:hV", ["help", "version"])
    names = [name for name, _ in given]
    if "-h" in names or "--help" in names:
        return Invocation(text=USAGE)
    if "-V" in names or "--version" in names:
        return Invocation(text=f"lockfs {__version__}\n")
    read = _Words()
    for name, value in given:
        if name == "-o":
            read.read(value)
    source, mountpoint = _two_paths(arguments)
    foreground, debug = "-f" in names, "-d" in names
    return Invocation(options=_build(read, source, mountpoint, foreground=foreground, debug=debug))


def parse_mount_helper(argv: Sequence[str]) -> Invocation:
    """Read what mount(8) gives to mount.lockfs: `SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`.

    `-f` is mount(8)'s --fake and `-s` lets unknown options pass; `-n` and `-v` mean nothing here.

    Raises:
        UsageError: as `parse`.
    """
    given, arguments = _getopt(argv, "sfnvo:t:N:hV", ["help", "version"])
    names = [name for name, _ in given]
    if {"-h", "--help", "-V", "--version"} & set(names):
        return parse([name for name in names if name in ("-h", "--help", "-V", "--version")])
    read = _Words(sloppy="-s" in names)
    for name, value in given:
        if name == "-o":
            read.read(value)
    source, mountpoint = _two_paths(arguments)
    return Invocation(
        options=_build(read, source, mountpoint, foreground=False, debug=False), fake="-f" in names
    )
