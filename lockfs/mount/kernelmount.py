"""Mounting: a /dev/fuse descriptor put on a mount point, by mount(2) as root and by fusermount3 otherwise.

The strings of the data argument are those of the kernel's documentation (Documentation/filesystems/fuse);
fusermount3 hands the descriptor over the socket that _FUSE_COMMFD names (fusermount3(1)).
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import socket
import stat
import subprocess
from dataclasses import dataclass

from lockfs.errors import SetupError
from lockfs.linux import calls
from lockfs.mount.options import MountOptions
from lockfs.mount.source import given_device

FUSERMOUNT_DEADLINE_S = 20.0
UMOUNT_DEADLINE_S = 20.0
USERS_MAX = 20
_DEVICE = "/dev/fuse"
_DEVICE_NUMBER = (10, 229)  # Documentation/admin-guide/devices.txt
_MNT_DETACH = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelMount:
    """A mount that the kernel has made and that nobody serves yet; `given` if somebody else made it."""

    device_fd: int
    mountpoint: str
    as_root: bool
    given: bool = False

    def unmount(self, *, lazy: bool = False) -> None:
        """Take the mount away; `lazy` hides it now and ends it when its last file is closed.

        Blocks, and must not run on the thread that serves the mount.

        Raises:
            OSError: EBUSY if files of it are open, EINVAL if it is gone already.
        """
        if self.given:
            raise OSError(errno.EPERM, "the mount was made by another program, which must end it")
        if self.as_root:
            calls.umount(self.mountpoint, _MNT_DETACH if lazy else 0)
            return
        command = [_fusermount(), "-u", *(["-z"] if lazy else []), "--", self.mountpoint]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=UMOUNT_DEADLINE_S, check=False
        )
        if done.returncode:
            reason = done.stderr.decode("utf-8", "backslashreplace").strip()
            number = errno.EBUSY if "busy" in reason.lower() else errno.EINVAL
            raise OSError(number, reason or os.strerror(number))

    def abandon(self) -> None:
        """Undo a mount whose start failed: close the device and uncover the mount point."""
        os.close(self.device_fd)
        if not self.given:
            self.uncover()

    def uncover(self) -> None:
        """Take a mount that nobody serves away from its mount point, whoever uses it."""
        try:
            self.unmount(lazy=True)
        except (OSError, subprocess.SubprocessError) as error:
            if not (isinstance(error, OSError) and error.errno == errno.EINVAL):
                _log.warning("The mount point %s could not be freed: %s", self.mountpoint, error)


def mount(options: MountOptions, root_mode: int, *, as_root: bool) -> KernelMount:
    """Mount `options.mountpoint`; `root_mode` is the source's st_mode.

    Raises:
        SetupError: the kernel or fusermount3 refused; says what to do.
    """
    given = given_device(options.mountpoint)
    if given is not None:
        return KernelMount(_checked_device(given), options.mountpoint, as_root, given=True)
    if as_root:
        return _mount_as_root(options, root_mode)
    return _mount_as_user(options)


def _checked_device(descriptor: int) -> int:
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        raise SetupError(f"/dev/fd/{descriptor} is not open: give a descriptor of {_DEVICE}.") from error
    number = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if not stat.S_ISCHR(status.st_mode) or number != _DEVICE_NUMBER:
        raise SetupError(f"/dev/fd/{descriptor} is not a descriptor of {_DEVICE}: give one that is.")
    os.set_inheritable(descriptor, False)
    return descriptor


def _open_device() -> int:
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise SetupError(f"The kernel offers no {_DEVICE}: load it with `modprobe fuse`.") from error
        raise SetupError(
            f"{_DEVICE} cannot be opened ({error.strerror}): run as root, or give this user access to it."
        ) from error


def _mount_as_root(options: MountOptions, root_mode: int) -> KernelMount:
    device = _open_device()
    data = [
        f"fd={device}",
        f"rootmode={root_mode:o}",
        f"user_id={os.geteuid()}",
        f"group_id={os.getegid()}",
        "allow_other",
        "default_permissions",
        *(word for word in options.kernel_options if word != "allow_other"),
    ]
    fstype, flags = f"fuse.{options.subtype}", options.mount_flags
    try:
        calls.mount(options.fsname, options.mountpoint, fstype, flags, ",".join(data))
    except OSError as error:
        os.close(device)
        raise SetupError(_mount_complaint(error, options.mountpoint)) from error
    return KernelMount(device, options.mountpoint, as_root=True)


def _mount_complaint(error: OSError, mountpoint: str) -> str:
    if error.errno == errno.EPERM:
        return f"Mounting on {mountpoint} is not permitted: root needs CAP_SYS_ADMIN (containers: allow it)."
    if error.errno == errno.ENODEV:
        return "The kernel does not know the file system type fuse: load its module with `modprobe fuse`."
    return f"Mounting on {mountpoint} failed: {error.strerror}."


def _fusermount() -> str:
    import shutil  # noqa: PLC0415  (as root it is not needed, and the guardian is to stay small)

    program = shutil.which("fusermount3")
    if program is None:
        raise SetupError("fusermount3 is missing, which ordinary users need: install the package fuse3.")
    return program


# MS_* bits that fusermount3 takes as words; nosuid and nodev it sets itself.
_FLAG_WORDS = {1: "ro", 8: "noexec", 16: "sync", 128: "dirsync", 1024: "noatime", 2048: "nodiratime"}


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _mount_as_user(options: MountOptions) -> KernelMount:
    data = [word for bit, word in _FLAG_WORDS.items() if options.mount_flags & bit]
    data += [f"fsname={_escaped(options.fsname)}", f"subtype={options.subtype}", "default_permissions"]
    data += options.kernel_options
    command = [_fusermount(), "-o", ",".join(data), "--", options.mountpoint]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=FUSERMOUNT_DEADLINE_S,
                check=False,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SetupError(f"fusermount3 could not mount {options.mountpoint}: {error}.") from error
        if done.returncode:
            reason = done.stderr.decode("utf-8", "backslashreplace").strip()
            raise SetupError(
                f"fusermount3 refused to mount {options.mountpoint}: {reason or 'without a reason'}"
            )
        return KernelMount(_received(ours), options.mountpoint, as_root=False)


def _received(ours: socket.socket) -> int:
    size = array.array("i").itemsize
    ours.setblocking(False)
    try:
        _, messages, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(size))
    except OSError as error:
        raise SetupError(f"fusermount3 ended without handing over the mount: {error.strerror}.") from error
    for level, kind, data in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= size:
            descriptor = array.array("i", data[:size])[0]
            os.set_inheritable(descriptor, False)
            return descriptor
    raise SetupError("fusermount3 ended without handing over the mount: is it of fuse 3?")


def users_of(mountpoint: str) -> list[str]:
    """Who keeps a mount busy, as "program (pid N)", at most USERS_MAX; never touches the mount itself."""
    found: list[str] = []
    for name in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        if len(found) == USERS_MAX:
            break
        if _uses(name, mountpoint):
            with contextlib.suppress(OSError), open(f"/proc/{name}/comm", encoding="utf-8") as file:
                found.append(f"{file.read().strip()} (pid {name})")
    return found


def _uses(pid: str, mountpoint: str) -> bool:
    try:
        links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
        links += [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    inside = mountpoint.rstrip("/") + "/"
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == mountpoint or target.startswith(inside):
                return True
    return False
