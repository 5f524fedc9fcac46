"""Attributes in the form in which pyfuse3 carries them to the kernel."""

from __future__ import annotations

import os
import stat

import pyfuse3

from lockfs.mirror.inodes import Inode

DIRECTORY_ATTRIBUTES_S = 1
"""How long, in seconds, the kernel may miss that another host changed a directory's owner, mode or times."""


def entry_of(inode: Inode, status: os.stat_result) -> pyfuse3.EntryAttributes:
    """The attributes of an inode. An image's are never cached: another host may change them at any time.

    A directory's are, for a moment: each step of each path would otherwise ask for them again.
    """
    entry = _entry(inode.number, status)
    entry.attr_timeout = attributes_hold(status)
    entry.generation = inode.generation
    return entry


def attributes_hold(status: os.stat_result) -> int:
    """How many seconds the kernel may keep these attributes; see `entry_of`."""
    return DIRECTORY_ATTRIBUTES_S if stat.S_ISDIR(status.st_mode) else 0


def bare_entry(number: int, mode: int) -> pyfuse3.EntryAttributes:
    """A directory entry that is told to be there and no more: number 0 makes the kernel ask when needed."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = number
    entry.st_mode = stat.S_IFMT(mode)
    entry.entry_timeout = entry.attr_timeout = 0
    return entry


def struck_entry(inode: Inode) -> pyfuse3.EntryAttributes:
    """An inode of a new generation, for a kernel that is to give up the old one. Its attributes, which the
    kernel takes for the moment, are made up: what it needs of them it asks for.
    """
    entry = bare_entry(inode.number, inode.kind)
    entry.st_nlink = 1
    entry.generation = inode.generation
    return entry


def _entry(number: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = number
    entry.entry_timeout = entry.attr_timeout = 0
    entry.st_mode = status.st_mode
    entry.st_nlink = status.st_nlink
    entry.st_uid = status.st_uid
    entry.st_gid = status.st_gid
    entry.st_rdev = status.st_rdev
    entry.st_size = status.st_size
    entry.st_blksize = status.st_blksize
    entry.st_blocks = status.st_blocks
    entry.st_atime_ns = status.st_atime_ns
    entry.st_mtime_ns = status.st_mtime_ns
    entry.st_ctime_ns = status.st_ctime_ns
    return entry


def volume_of(status: os.statvfs_result) -> pyfuse3.StatvfsData:
    """The figures of the file system below."""
    volume = pyfuse3.StatvfsData()
    volume.f_bsize = status.f_bsize
    volume.f_frsize = status.f_frsize
    volume.f_blocks = status.f_blocks
    volume.f_bfree = status.f_bfree
    volume.f_bavail = status.f_bavail
    volume.f_files = status.f_files
    volume.f_ffree = status.f_ffree
    volume.f_favail = status.f_favail
    volume.f_namemax = status.f_namemax
    return volume
