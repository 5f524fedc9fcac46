"""Acting as the caller: worker threads take the caller's identity for one piece of work.

The threads are shared with other parts of lockfs, so an identity is always put back before the work's
result is returned. Only the file-system identity changes (setfsuid(2), setfsgid(2), setgroups(2)): the
thread keeps those capabilities that are not about files.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lockfs.linux import calls, proc

GROUPS_AGE_MAX_S = 1.0
GROUPS_CACHED_MAX = 256

T = TypeVar("T")


class Caller(Protocol):
    """Who sent a request: file-system ids, the thread's id as we see it (0: unknown), and its umask.

    `unique` is the kernel's number for the request (0: none); `resent`: a former worker may have begun it.
    """

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def umask(self) -> int: ...
    @property
    def unique(self) -> int: ...
    @property
    def resent(self) -> bool: ...


@dataclass(frozen=True)
class Identity:
    """A file-system user and group, and the supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...]


class IdentityLost(RuntimeError):
    """A thread could not become the daemon again; nothing may run on it any more."""


class Credentials:
    """Runs functions as a request's caller. Thread-safe; all methods are for worker threads.

    A daemon that is not root cannot be anybody else and does everything as itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.daemon = Identity(os.geteuid(), os.getegid(), tuple(os.getgroups()))
        self.switches = self.daemon.uid == 0
        self._clock = clock
        self._groups: dict[tuple[int, int, int], tuple[float, tuple[int, ...]]] = {}
        self._thread = threading.local()

    def identity(self, caller: Caller) -> Identity:
        """The identity that the caller's work is done with.

        Root's supplementary groups decide nothing; they are not looked up.
        """
        if not self.switches:
            return self.daemon
        if caller.uid == 0:
            return Identity(0, caller.gid, self.daemon.groups)
        return Identity(caller.uid, caller.gid, self._groups_of(caller))

    def _groups_of(self, caller: Caller) -> tuple[int, ...]:
        key = (caller.pid, caller.uid, caller.gid)
        now = self._clock()
        known = self._groups.get(key)
        if known is not None and now - known[0] <= GROUPS_AGE_MAX_S:
            return known[1]
        groups = proc.groups_of(caller.pid) if caller.pid > 0 else ()
        if len(self._groups) >= GROUPS_CACHED_MAX:
            self._groups.clear()
        self._groups[key] = (now, groups)
        return groups

    def run(self, caller: Caller, function: Callable[..., T], *arguments: object) -> T:
        """Run the function as the caller."""
        return self._run_as(self.identity(caller), function, *arguments)

    def attempt(self, caller: Caller, function: Callable[..., T], *arguments: object) -> T:
        """Run the function as the caller and, if that is not permitted, as the daemon.

        For what the kernel has already permitted by mode bits and capabilities, which the caller's bare
        identity may lack here. Never for making files: they would belong to the wrong user.
        """
        identity = self.identity(caller)
        try:
            return self._run_as(identity, function, *arguments)
        except PermissionError:
            if identity == self.daemon:
                raise
            return function(*arguments)

    def create(self, caller: Caller, umask: int, function: Callable[..., T], *arguments: object) -> T:
        """Run it as the caller and under a umask (a default ACL of the directory overrides it)."""
        if not getattr(self._thread, "own_umask", False):
            calls.unshare_fs()
            self._thread.own_umask = True
        previous = os.umask(umask & 0o777)
        try:
            return self.run(caller, function, *arguments)
        finally:
            os.umask(previous)

    def _run_as(self, identity: Identity, function: Callable[..., T], *arguments: object) -> T:
        if identity == self.daemon:
            return function(*arguments)
        try:
            self._become(identity)
            return function(*arguments)
        finally:
            self._return_from(identity)

    def _become(self, identity: Identity) -> None:
        """Groups first: once the user is another, group changes of files are checked against them."""
        if identity.groups != self.daemon.groups:
            calls.set_thread_groups(identity.groups)
        if identity.gid != self.daemon.gid:
            calls.set_thread_fsgid(identity.gid)
        if identity.uid != self.daemon.uid:
            calls.set_thread_fsuid(identity.uid)

    def _return_from(self, identity: Identity) -> None:
        try:
            if identity.uid != self.daemon.uid:
                calls.set_thread_fsuid(self.daemon.uid)
            if identity.gid != self.daemon.gid:
                calls.set_thread_fsgid(self.daemon.gid)
            if identity.groups != self.daemon.groups:
                calls.set_thread_groups(self.daemon.groups)
        except OSError as error:
            raise IdentityLost(f"a worker thread could not become uid {self.daemon.uid} again") from error
