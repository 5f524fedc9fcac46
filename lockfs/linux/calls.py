"""System calls that Python's os module lacks, called through libc with the interpreter lock released.

Each raises OSError like os does. Numbers and structures are those of the 64-bit asm-generic ABI; syscalls
without a libc wrapper in Debian 12 go through syscall(2) with x86-64 and generic numbers, which agree for
all numbers above 424.
"""

from __future__ import annotations

import ctypes
import os
import platform

_libc = ctypes.CDLL(None, use_errno=True)

_SYS_OPEN_TREE = 428
_SYS_OPENAT2 = 437
_SYS_PIDFD_GETFD = 438
_SETGROUPS_NR = {"x86_64": 116, "aarch64": 159, "riscv64": 159}

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_FOLLOW = 0x400
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_CACHED = 0x20
"""openat2(2): answer from memory or fail with EAGAIN, never wait for a disk or a server (Linux 5.12)."""
CLONE_FS = 0x200
_STATFS_BYTES = 256

_EXT, _XFS, _BTRFS, _TMPFS, _F2FS = 0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0xF2F52010
_IN_MEMORY = frozenset({_EXT, _XFS, _BTRFS, _TMPFS, _F2FS})
_NFS = 0x6969

_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.linkat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.setfsuid.argtypes = [ctypes.c_uint]
_libc.setfsgid.argtypes = [ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
"""fallocate(2), modes."""


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); offset and length in bytes, any mode the file system takes."""
    _check(_libc.fallocate(fd, mode, offset, length))


def in_memory(fd: int) -> bool:
    """Whether open files of this file system are wholly this kernel's affair (fstatfs(2), f_type).

    True for the local file systems that keep an open file's inode and locks in memory, so that fstat(2) and
    fcntl(2) never wait for a disk or a server. Shared ones ask a server or take a cluster lock.
    """
    return _file_system(fd) in _IN_MEMORY


def on_nfs(fd: int) -> bool:
    """Whether an open file lies on NFS (fstatfs(2), f_type)."""
    return _file_system(fd) == _NFS


def _file_system(fd: int) -> int:
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    _check(_libc.fstatfs(fd, answer))
    return ctypes.c_long.from_buffer(answer).value


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2)."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(data)))


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags))


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2) with RENAME_* flags."""
    _check(_libc.renameat2(old_dir, old, new_dir, new, flags))


def linkat(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """linkat(2); os.link cannot follow a magic link into an unnamed file."""
    _check(_libc.linkat(old_dir, old, new_dir, new, flags))


def open_tree_clone(path: str) -> int:
    """A private, non-recursive copy of the mount at `path`, as an O_PATH descriptor (open_tree(2)).

    Nothing that is mounted over or below `path` later can be reached through it. Needs CAP_SYS_ADMIN.
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
    return _check(int(_libc.syscall(_SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), ctypes.c_uint(flags))))


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(dir_fd: int, path: bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): open relative to `dir_fd` under RESOLVE_* restrictions."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    result = _libc.syscall(_SYS_OPENAT2, dir_fd, path, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    return _check(int(result))


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """pidfd_getfd(2): another process's descriptor, as one of this process for the same open file."""
    number = ctypes.c_int(descriptor)
    return _check(int(_libc.syscall(_SYS_PIDFD_GETFD, ctypes.c_int(pidfd), number, ctypes.c_uint(0))))


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
ARENAS = 2
MAPPED_BYTES = 256 << 10


def keep_heap_small() -> None:
    """Have the C library's malloc give back what is freed (mallopt(3)), where there is such a thing.

    Without it each thread gets an arena of its own, and large buffers stay in it for ever.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def unshare_fs() -> None:
    """Give the calling thread a umask and a working directory of its own (unshare(2), CLONE_FS)."""
    _check(_libc.unshare(CLONE_FS))


def set_thread_fsuid(uid: int) -> None:
    """setfsuid(2) for the calling thread only; raises EPERM if the kernel did not take it."""
    _libc.setfsuid(uid)
    if _libc.setfsuid(uid) != uid:
        raise OSError(1, "setfsuid was refused")


def set_thread_fsgid(gid: int) -> None:
    """setfsgid(2) for the calling thread only; raises EPERM if the kernel did not take it."""
    _libc.setfsgid(gid)
    if _libc.setfsgid(gid) != gid:
        raise OSError(1, "setfsgid was refused")


def set_thread_groups(groups: tuple[int, ...]) -> None:
    """setgroups(2) for the calling thread only (libc's wrapper would change every thread)."""
    number = _SETGROUPS_NR.get(platform.machine())
    if number is None:
        raise OSError(38, f"the setgroups system call number of {platform.machine()} is not known to lockfs")
    array = (ctypes.c_uint * len(groups))(*groups)
    _check(int(_libc.syscall(number, ctypes.c_size_t(len(groups)), array)))
