"""A file descriptor that several threads use and that the last of them closes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from lockfs.errors import LockfsError


class SharedDescriptor:
    """Open from `opened` until `close` was called and every use has ended, however late; closed exactly once.

    Every method may be called in any thread. There is no lock: who closes is decided by one `list.pop`. A
    user enters itself before it looks whether the file is closing, and leaves before it looks again; the
    closer says that it closes before it looks for users. So the closer sees the user, or the user sees the
    closer, or both see the other, and then `pop` lets one of them close.
    """

    def __init__(self) -> None:
        self._held: list[int] = []
        self._users: set[object] = set()
        self._closing = False

    @contextlib.contextmanager
    def opened(self, opener: Callable[[], int]) -> Iterator[int]:
        """Take over the descriptor that `opener` returns. A failure within the block closes it."""
        with self._use():
            self._held.append(opener())
            try:
                yield self._held[0]
            except BaseException:
                self._closing = True
                raise

    @contextlib.contextmanager
    def used(self) -> Iterator[int]:
        """Keep the descriptor open for the block.

        Raises:
            FileClosed: there is none any more.
        """
        with self._use():
            if self._closing:
                raise FileClosed
            yield self._held[0]

    def close(self) -> None:
        """Close it now, or leave that to its last user."""
        self._closing = True
        self._close_if_unused()

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        user = object()
        self._users.add(user)
        try:
            yield
        finally:
            self._users.discard(user)
            if self._closing:
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._users:
            return
        try:
            descriptor = self._held.pop()
        except IndexError:
            return
        # Whatever it says, the descriptor is gone (close(2)), and nothing waits to be written under O_SYNC.
        with contextlib.suppress(OSError):
            os.close(descriptor)


class FileClosed(LockfsError):
    """A use began after the closing; no defect where nobody waits for it any more."""
