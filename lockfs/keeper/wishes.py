"""Somebody who wants an image and cannot have it yet."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from lockfs.backends.base import Image, Mode, Owner
from lockfs.errors import BackendError, ImageBusy, LockfsError
from lockfs.keeper.openers import Opener


class BusyHere(ImageBusy):
    """A conflict that only this keeper's own doings can end; they wake the waiter, so it need not poll."""


class LeaseInDoubt(BackendError):
    """The host's lease cannot be relied on at the moment; its next event wakes the waiter."""


@dataclass(eq=False)
class Wish:
    """One open, change, removal or claim that needs a lease of `image` in `mode`.

    `deadline` and `ask_at` are trio times; from `ask_at` on (None: never) the holder is asked to let go.
    `urgent` wishes (claims of a guest that is about to run) are served before the others, each group in
    order of arrival. `tolerant`: a storage that does not answer is tried again until the deadline.
    """

    image: Image
    opener: Opener
    owner: Owner
    mode: Mode
    deadline: float
    ask_at: float | None = None
    urgent: bool = False
    tolerant: bool = False
    asked: bool = False
    wake: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(eq=False)
class Claim:
    """A claim under way, which further claims of the same process join."""

    done: trio.Event = field(default_factory=trio.Event)
    failure: LockfsError | None = None
