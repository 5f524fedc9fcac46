"""Other hosts ask for an image: lockfs hosts through the store, others through a lease's request record."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import trio

from lockfs.backends.base import Image, LeaseState, Owner
from lockfs.backends.paxos.membership import Epoch
from lockfs.backends.paxos.proof import PaxosLease
from lockfs.backends.requests import Requests
from lockfs.errors import BackendError
from lockfs.paxos import requests as records

_log = logging.getLogger("lockfs.paxos")


class Calls:
    """What is asked of this host, and what it asks of others. `run` must be running."""

    def __init__(
        self,
        leases: Mapping[int, PaxosLease],
        requests: Callable[[], Requests],
        in_thread: Callable[..., Awaitable[Any]],
    ) -> None:
        """`leases` are those in hand, by inode."""
        self._leases = leases
        self._requests = requests
        self._in_thread = in_thread
        self._called: set[int] = set()
        self._wanted = trio.Event()

    async def request(self, image: Image, owner: Owner) -> None:
        """Ask lockfs hosts for the image through the store. A sanlock daemon is not asked: it would answer
        by ending the process that holds the lease.
        """
        await self._in_thread(self._requests().send, image.inode, owner, trio.current_time())

    async def withdraw(self, image: Image) -> None:
        """Take the request back."""
        await self._in_thread(self._requests().withdraw, image.inode)

    async def requested(self, held: Iterable[int]) -> set[int]:
        """Those of the inodes `held` that another lockfs host, or a sanlock host's request record, asks
        for.
        """
        inodes = frozenset(held)
        asked: set[int] = await self._in_thread(self._requests().asked_for, inodes, trio.current_time())
        return asked | (self._called & inodes)

    def passed(self, epoch: Epoch) -> None:
        """After a pass over the lockspace: has anybody called this host?"""
        if epoch.lockspace.watch.take_callers():
            self._wanted.set()

    def given_back(self, inode: int) -> None:
        """What was asked for is given."""
        self._called.discard(inode)

    async def run(self) -> None:
        """Look at the request records of the leases held, whenever another host called for that."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            for inode, lease in list(self._leases.items()):
                leader = lease.resource.leader
                if leader is None or lease.state is not LeaseState.HELD:
                    continue
                try:
                    request = await records.read_request(lease.resource.area)
                except BackendError as error:
                    _log.warning("a request for %s could not be read: %s", lease.image.name, error)
                    continue
                if records.concerns(request, leader.lver) and self._leases.get(inode) is lease:
                    _log.info("%s: a host of the lockspace asks for it", lease.image.name)
                    self._called.add(inode)
