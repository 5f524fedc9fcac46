"""Leases that a former worker of this mount held or was at work on: noted, found again, or taken over.

They are worth something only in the membership that they were taken in. A lease that was lost, or that the
storage does not bear out, is taken over like one that nobody recalled: whatever is left of it is put in
order, which harms nobody, for it touches what this host wrote.
"""

from __future__ import annotations

import base64
import logging
import struct
from random import Random

from lockfs.backends.base import Image, LeaseState, Mode
from lockfs.backends.paxos.membership import Epoch
from lockfs.backends.paxos.places import Layout, Place, was_removed
from lockfs.backends.paxos.unsettled import Hand
from lockfs.backends.remembered import Ledger, Note, Stage
from lockfs.paxos import recall
from lockfs.paxos.resource import Hold, Resource
from lockfs.records import sectors
from lockfs.records.results import RecordError
from lockfs.records.sectors import Leader

_INDEX = "backend:index"

_log = logging.getLogger("lockfs.paxos")


class LeaseNotes:
    """What is noted of paxos leases for the next worker."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def taking(self, inode: int, mode: Mode, name: bytes, epoch: Epoch) -> None:
        """Before anything is written for a lease."""
        self._ledger.note(inode, Stage.TAKING, mode, name=name.hex(), life=_life(epoch))

    def held(
        self, inode: int, stage: Stage, mode: Mode, *, name: bytes, leader: Leader | None, epoch: Epoch
    ) -> None:
        """How far a lease in hand has come; `leader` is its resource's."""
        record = base64.b64encode(leader.encode()).decode() if leader is not None else ""
        self._ledger.note(inode, stage, mode, name=name.hex(), life=_life(epoch), leader=record)

    def forget(self, inode: int) -> None:
        """Nothing of the lease is left on the storage, or nothing that counts."""
        self._ledger.forget(inode)

    def changing_index(self, begins: bool) -> None:
        """Before the lease of an index is taken, and when it was given back."""
        if begins:
            self._ledger.memory.set(_INDEX, True)
        else:
            self._ledger.memory.remove(_INDEX)

    @property
    def index_was_changing(self) -> bool:
        """Whether the index's lease may be left taken."""
        return self._ledger.memory.get(_INDEX) is True


def _life(epoch: Epoch) -> list[int]:
    return [epoch.lockspace.host_id, epoch.lockspace.generation]


class FormerLeases:
    """The notes of a former worker that nobody has dealt with yet, by inode."""

    def __init__(self, notes: LeaseNotes, random: Random, left: dict[int, Note]) -> None:
        self._notes = notes
        self._random = random
        self._left = left

    def inodes(self) -> list[int]:
        """Of which inodes there are notes."""
        return sorted(self._left)

    def note(self, inode: int) -> Note | None:
        """What was noted of an inode's lease."""
        return self._left.get(inode)

    def void(self) -> None:
        """The membership is lost, and with it every lease."""
        for inode in self._left:
            self._notes.forget(inode)
        self._left.clear()

    async def find_again(self, inode: int, epoch: Epoch, layout: Layout) -> tuple[Place, Resource] | None:
        """The place and the resource of a lease that was held and still is; None: it was not, or is not.

        Raises:
            BackendError: the storage does not say.
        """
        note = self._left.get(inode)
        leader = _leader(note) if note is not None else None
        if note is None or leader is None or not note.in_hand or not is_of(note, epoch):
            return None
        # As PaxosBackend has it: what is shared does not outlast a doubt where hosts do not look first.
        final = epoch.state is LeaseState.DOUBT and bool(epoch.lockspace.strangers)
        name = bytes.fromhex(note.text("name") or "")
        place = None if final and note.mode is Mode.SHARED else await self._find(layout, name)
        if place is None:
            _log.error("the lease that a former worker had on inode %d is lost", inode)
            return None
        had = False
        try:
            resource = Resource(place.area, epoch.lockspace, name, self._random, place.hosts)
            had = await self._recall(resource, epoch, note, leader)
            had = had and not (final and resource.hold is Hold.SHARED)
        finally:
            if not had:
                await place.close()
        if not had:
            _log.error("the lease that a former worker had on inode %d is not there any more", inode)
            return None
        del self._left[inode]
        return place, resource

    async def _find(self, layout: Layout, name: bytes) -> Place | None:
        await layout.quiet(name)
        return await layout.find_named(name)

    async def _recall(self, resource: Resource, epoch: Epoch, note: Note, leader: Leader) -> bool:
        hold = Hold.SHARED if note.mode is Mode.SHARED else Hold.EXCLUSIVE
        converting = note.stage is Stage.CONVERTING
        try:
            return await recall.recall(resource, epoch.lockspace, hold, leader, converting=converting)
        except RecordError as error:
            if not was_removed(error):
                raise
            return False

    async def take_over(self, inode: int, epoch: Epoch, layout: Layout) -> Hand | None:
        """This host's hand on a lease that a former worker had, or may have, begun to take, to be settled or
        gone on with; None if there is neither.

        Raises:
            BackendError: the storage does not answer; to be called again.
        """
        note = self._left.get(inode)
        if note is None:
            return None
        hand = await self._hand(inode, note, epoch, layout) if is_of(note, epoch) else None
        del self._left[inode]
        if hand is None:
            self._notes.forget(inode)
        return hand

    async def _hand(self, inode: int, note: Note, epoch: Epoch, layout: Layout) -> Hand | None:
        name = bytes.fromhex(note.text("name") or "")
        place = await self._find(layout, name)
        if place is None:
            return None
        taken_over = False
        try:
            resource = Resource(place.area, epoch.lockspace, name, self._random, place.hosts)
            await recall.take_over(resource, epoch.lockspace)
            taken_over = True
        except RecordError as error:
            if not was_removed(error):
                raise
            return None
        finally:
            if not taken_over:
                await place.close()
        return Hand(Image(inode, b"inode %d" % inode, -1), place, resource, epoch)


def is_of(note: Note, epoch: Epoch) -> bool:
    """Whether the note is of this membership."""
    return note.facts.get("life") == _life(epoch)


def _leader(note: Note) -> Leader | None:
    try:
        return sectors.decode_leader(base64.b64decode(note.text("leader") or ""))
    except (ValueError, struct.error):
        return None
