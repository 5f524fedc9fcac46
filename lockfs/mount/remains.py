"""What is left of a lockfs whose processes were all killed: found, fenced, and taken away for the next mount.

Its device is closed, so the kernel answers every request with ENOTCONN. But files that were open in
passthrough go on being read and written through backing files that the kernel holds:

* With fcntl the locks lie on the same open file descriptions: whoever writes still has its lease, stays, and
  the next mount is refused the image as any host is until that program closes it.
* With paxos nobody renews the leases, and with nop nobody remembers who has an image. Whoever can still write
  an image without lockfs is ended before the next mount may let anybody else in. Those whose writes went
  through lockfs fail and stay, as do readers.

Only a mount that says ENOTCONN is dead. One that does not answer may be served again any moment (by a new
worker, or from a service manager that keeps the device), and is left alone.
"""

from __future__ import annotations

import enum
import errno
import logging
import mmap
import os
import re
import subprocess
from collections.abc import Iterable

from lockfs.errors import SetupError
from lockfs.linux import calls
from lockfs.linux.bounded import in_child
from lockfs.linux.proc import kill_all, process_of
from lockfs.linux.users import FileUser, users_of
from lockfs.mount import table
from lockfs.mount.kernelmount import KernelMount
from lockfs.mount.options import MountOptions
from lockfs.mount.table import Mounted

ANSWER_S = 5.0
"""How long a mount is waited for that may be alive."""
PROBE_S = 5.0
KILL_S = 5.0
ROUNDS_MAX = 5
"""How often it is looked for writers anew: a program may clone itself while it is ended."""
STACKED_MAX = 8
SHOWN_MAX = 20
_UNLOCKED_BACKENDS_WHY = {
    "paxos": "nobody renews the leases",
    "nop": "nobody knows any more who had which image",
}
_KEPT = (
    ", with the locks that the kernel keeps until they close them: what the kernel reads and writes for them "
    "goes on, all else (fsync too) fails until the images are opened anew"
)
_UNKNOWN_WHY = "its options are not known to be those of now, so its leases may not be renewed"
_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
_MNT_DETACH = 2
_PAGE = 4096

_log = logging.getLogger(__name__)


class State(enum.Enum):
    """DEAD: no process can answer any more. LIVE: there was an answer. SILENT: none, within ANSWER_S."""

    DEAD = "dead"
    LIVE = "live"
    SILENT = "silent"


def state_of(mount: Mounted) -> State:
    """Ask a mount whether somebody serves it; never waits much longer than ANSWER_S."""

    def ask() -> int:
        try:
            os.statvfs(mount.point)
        except OSError as error:
            return 1 if error.errno in _DEAD else 0
        return 0

    answer = in_child(ask, ANSWER_S)
    if answer is None:
        return State.SILENT
    return State.DEAD if answer == 1 else State.LIVE


def silence(mount: Mounted) -> str:
    """The complaint about a mount that does not answer."""
    return (
        f"{mount.point} has a lockfs of {mount.source} that does not answer, and is not known to be dead: "
        "wait for it, see its log, or end its processes; then mount again."
    )


def clear(options: MountOptions) -> None:
    """Fence and take away what killed lockfs left on the mount point; return if there is nothing of that.

    `options` went through `source.absolute`. Blocks for seconds.

    Raises:
        SetupError: what is there may be alive, is not ours, or may still be written; says what to do.
    """
    for _ in range(STACKED_MAX):
        mounts = table.read()
        mount = table.at(options.mountpoint, mounts)
        if mount is None or not _is_lockfs(mount, options):
            return
        state = state_of(mount)
        if state is State.SILENT:
            raise SetupError(silence(mount))
        if state is State.LIVE:
            return
        _refuse_foreign(mount, mounts)
        _fence(mount, options)
        _uncover(mount)
        _log.warning("The dead mount on %s is gone: it is mounted anew.", mount.point)
    raise SetupError(f"Too many dead mounts are on {options.mountpoint}: run `umount` on it first.")


def _is_lockfs(mount: Mounted, options: MountOptions) -> bool:
    """Whether a mount is lockfs's, be it under the other name that the options give it."""
    named = mount.fstype == f"fuse.{options.subtype}" and mount.source == options.fsname
    return mount.is_lockfs or named


def _owner(mount: Mounted) -> int | None:
    """The user who made a FUSE mount, from its option user_id."""
    found = (re.fullmatch(r"user_id=([0-9]{1,10})", word) for word in mount.data)
    return next((int(match[1]) for match in found if match), None)


def _refuse_foreign(mount: Mounted, mounts: list[Mounted]) -> None:
    owner = _owner(mount)
    if owner != os.geteuid():
        raise SetupError(
            f"{mount.point} is a dead lockfs mount of another user (user id {owner}): it must be unmounted "
            "by that user."
        )
    above = [other.point for other in mounts if other.parent == mount.identity]
    if above:
        raise SetupError(
            f"{mount.point} is a dead lockfs mount with other file systems mounted on it: unmount "
            f"{_listed(above)} first."
        )


def keeps_locks(mount: Mounted, options: MountOptions) -> bool:
    """Whether what is open of a dead mount is known to be locked still: it was one of fcntl.

    The dead mount's backend is written nowhere: it is taken for that of the options if it bears their names.
    """
    return options.backend == "fcntl" and _has_names(mount, options)


def _has_names(mount: Mounted, options: MountOptions) -> bool:
    return (mount.fstype, mount.source) == (f"fuse.{options.subtype}", options.fsname)


def _fence(mount: Mounted, options: MountOptions) -> None:
    """Make sure that nobody writes without a lease what was open of a dead mount, and tell what was found."""
    found = users_of(mount.device)
    head = f"{mount.point} has a lockfs of {mount.source} whose processes are all gone; "
    if not found.found:
        head += "no program has images of it open"
    elif len(found.found) == 1:
        head += f"1 program has images of it open: {_listed(map(_name, found.found))}"
    else:
        head += f"{len(found.found)} programs have images of it open: {_listed(map(_name, found.found))}"
    if keeps_locks(mount, options):
        _log.warning("%s%s.", head, _KEPT if found.found else "")
        return
    _log.warning("%s.", head)
    why = _UNLOCKED_BACKENDS_WHY.get(options.backend, "") if _has_names(mount, options) else _UNKNOWN_WHY
    if _owner(mount) == 0:  # the kernel lets nobody else hand it files for a passthrough
        _end_writers(mount, why)
    left = users_of(mount.device).found
    if left:
        _log.warning(
            "%s of %s can only read, or fail to write, and may go on.", _listed(map(_name, left)), mount.point
        )


def _end_writers(mount: Mounted, why: str) -> None:
    """Kill whoever can write images of a dead mount, until there is nobody.

    Raises:
        SetupError: somebody cannot be ended, or cannot be looked at.
    """
    for _ in range(ROUNDS_MAX):
        users = users_of(mount.device)
        if users.unseen:
            raise SetupError(
                f"{mount.point} is a dead lockfs mount, and {users.unseen} processes that may write its "
                "images cannot be looked at: give lockfs CAP_SYS_PTRACE, or end them and run "
                f"`umount -l {mount.point}`."
            )
        writers = [user for user in users.found if can_write(user)]
        if not writers:
            return
        names = _listed(map(_name, writers))
        left = kill_all(((user.pid, user.started) for user in writers), KILL_S)
        if left:
            shown = _listed(_name(user) for user in writers if (user.pid, user.started) in left)
            raise SetupError(
                f"{shown} can still write images of the dead lockfs mount {mount.point} and could not be "
                "ended within a few seconds: only a reset of this machine is sure to stop it from writing."
            )
        _log.warning(
            "Of %s, %s could write on past lockfs and %s ended (SIGKILL), because %s.",
            mount.point,
            names,
            "was" if len(writers) == 1 else "were",
            why,
        )
    raise SetupError(
        f"Programs keep coming that write images of the dead lockfs mount {mount.point}: end them first."
    )


def can_write(user: FileUser) -> bool:
    """Whether a process can change images of a dead mount: through a mapping, or a passthrough.

    A passthrough is told from a file that lockfs served by reading a byte through the very same open file
    (pidfd_getfd(2)): the latter says ENOTCONN. What cannot be found out in time counts as able to write.
    """
    if user.maps:
        return True
    if not user.writable:
        return False
    return in_child(lambda: _served(user), PROBE_S) != 0


def _served(user: FileUser) -> int:
    """0 if lockfs served all that the process has open for writing, 1 if not; system calls only."""
    pidfd = os.pidfd_open(user.pid)
    page = mmap.mmap(-1, _PAGE)  # as O_DIRECT wants it
    for number in user.writable:
        descriptor = calls.pidfd_getfd(pidfd, number)
        try:
            os.preadv(descriptor, [page], 0)
        except OSError as error:
            if error.errno not in _DEAD:
                return 1
        else:
            return 1
    return 0


def _uncover(mount: Mounted) -> None:
    """Unmount a dead mount lazily: that very one, and nothing that came into its place meanwhile."""
    try:
        if os.geteuid() == 0:
            _detach(mount)
        elif table.at(mount.point, table.read()) == mount:
            KernelMount(-1, mount.point, as_root=False).unmount(lazy=True)
    except (OSError, subprocess.SubprocessError) as error:
        now = table.at(mount.point, table.read())
        if now is not None and now.identity == mount.identity:
            raise SetupError(
                f"The dead lockfs mount on {mount.point} cannot be unmounted ({error}): run "
                f"`umount -l {mount.point}`."
            ) from error


def _detach(mount: Mounted) -> None:
    """Unmount by a descriptor of the mount's root: a path could name another mount by then."""
    descriptor = os.open(mount.point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        at = table.mount_of(descriptor, [mount])
        if at is not None:
            calls.umount(f"/proc/self/fd/{descriptor}", _MNT_DETACH)
    finally:
        os.close(descriptor)


def _name(user: FileUser) -> str:
    return f"{process_of(user.pid).program} (pid {user.pid})"


def _listed(names: Iterable[str]) -> str:
    """The first SHOWN_MAX names and the number of the others."""
    known = list(names)
    more = f" and {len(known) - SHOWN_MAX} more" if len(known) > SHOWN_MAX else ""
    return ", ".join(known[:SHOWN_MAX]) + more
