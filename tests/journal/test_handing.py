"""What a service manager has of the journal's descriptors, whatever the worker does, whenever it is killed.

The store is systemd's in small (src/core/service.c, service_add_fd_store): it keeps an open description once,
under the first name that it came by, and drops every entry of a name that is taken back. Fault model: a
worker is killed at any moment between two messages, and of its last messages some were never heard; the next
one begins with what the journal says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from lockfs.guardian.revival import Kept
from lockfs.journal.handing import FORMER_SERIALS, Handing, given_names
from lockfs.journal.memory import SharedMemory
from lockfs.linux.descriptions import are_one

KEYS = [f"handle:{number}" for number in range(4)]
LOST_MAX = FORMER_SERIALS


class Store:
    """The service manager; what was sent is on its way until it is heard."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int]] = []
        self._on_its_way: list[tuple[str, int]] = []

    def send(self, text: str, descriptor: int = -1) -> None:
        """See handing.Out."""
        self._on_its_way.append((text, os.dup(descriptor) if descriptor >= 0 else -1))

    def hear(self, lost: int = 0) -> None:
        """Take what was sent, but for the last `lost` messages."""
        heard = max(0, len(self._on_its_way) - lost)
        for at, (text, descriptor) in enumerate(self._on_its_way):
            words = dict(line.split("=", 1) for line in text.splitlines())
            if at >= heard:
                _close(descriptor)
            elif "FDSTOREREMOVE" in words:
                self._remove(words["FDNAME"])
            elif any(are_one(descriptor, kept) for _, kept in self.entries):
                _close(descriptor)
            else:
                self.entries.append((words["FDNAME"], descriptor))
        self._on_its_way.clear()

    def _remove(self, name: str) -> None:
        for entry in [entry for entry in self.entries if entry[0] == name]:
            self.entries.remove(entry)
            os.close(entry[1])

    def close(self) -> None:
        """Forget everything."""
        self.hear()
        for _, descriptor in self.entries:
            os.close(descriptor)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


class Mount:
    """A worker that names and closes descriptors, and is killed now and then."""

    def __init__(self, stack: ExitStack) -> None:
        self.memory = SharedMemory.create()
        stack.callback(self.memory.close)
        self.store = Store()
        stack.callback(self.store.close)
        self._open: dict[str, int] = {}
        stack.callback(lambda: [os.close(descriptor) for descriptor in self._open.values()])
        Handing(self.memory, self.store).begin()

    def name(self, key: str, like: str | None) -> None:
        """Name a new file under a key, or what `like` has, by another number."""
        former = self._open.get(key)
        source = self._open.get(like) if like is not None else None
        descriptor = os.memfd_create(key, os.MFD_CLOEXEC) if source is None else os.dup(source)
        self.memory.facts.set(key, {"fd": descriptor})
        self._open[key] = descriptor
        if former is not None:
            os.close(former)

    def end(self, key: str) -> None:
        """Close what a key has."""
        self.memory.facts.remove(key)
        if (descriptor := self._open.pop(key, None)) is not None:
            os.close(descriptor)

    def replace(self, key: str) -> None:
        """Have a key's number lead to another file, and name it again."""
        if (descriptor := self._open.get(key)) is not None:
            fresh = os.memfd_create(key, os.MFD_CLOEXEC)
            os.dup2(fresh, descriptor, inheritable=False)
            os.close(fresh)
            self.memory.facts.set(key, {"fd": descriptor})

    def succeed(self, lost: int) -> None:
        """The worker is killed; the next one begins."""
        self.store.hear(lost)
        self.memory.reload()
        Handing(self.memory, self.store).begin()

    def check(self) -> None:
        """What the journal names is found in the store, and nothing else is."""
        self.store.hear()
        kept = Kept(dict(self.store.entries), self.memory, self.memory.descriptor)
        numbers = [*self._open.values(), self.memory.descriptor]
        for number in numbers:
            found = kept.found(number)
            assert found is not None, f"{number} is not in the store: {self.store.entries}"
            assert are_one(number, found), f"{number} is another file in the store"
        assert set(given_names(self.memory)) == {name for name, _ in self.store.entries}
        for name, entry in self.store.entries:
            assert any(are_one(entry, number) for number in numbers), f"{name} is left in the store"


@contextmanager
def _mount() -> Iterator[Mount]:
    with ExitStack() as stack:
        yield Mount(stack)


_step = st.one_of(
    st.tuples(st.just("name"), st.sampled_from(KEYS), st.sampled_from([None, *KEYS])),
    st.tuples(st.sampled_from(["end", "replace"]), st.sampled_from(KEYS), st.none()),
    st.tuples(st.just("succeed"), st.integers(0, LOST_MAX), st.none()),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_step, max_size=24))
def test_what_is_named_is_in_the_store(steps: list[tuple[str, object, object]]) -> None:
    with _mount() as mount:
        for what, first, second in steps:
            if what == "name":
                mount.name(str(first), None if second is None else str(second))
            elif what == "succeed":
                mount.succeed(int(str(first)))
            else:
                (mount.end if what == "end" else mount.replace)(str(first))
        mount.check()


def test_two_numbers_of_one_description_in_any_order() -> None:
    """The next worker comes upon the number that the store does not have first."""
    with _mount() as mount:
        mount.name(KEYS[0], None)
        mount.name(KEYS[1], None)
        mount.end(KEYS[0])
        mount.name(KEYS[0], KEYS[1])  # in the first slot, and its like in the second
        mount.succeed(0)
        mount.check()


def test_the_number_that_the_store_has_is_closed_first() -> None:
    with _mount() as mount:
        mount.name(KEYS[0], None)
        mount.name(KEYS[1], KEYS[0])
        mount.end(KEYS[0])
        mount.check()


def test_a_number_that_is_used_again() -> None:
    with _mount() as mount:
        for _ in range(3):
            mount.name(KEYS[0], None)
            mount.end(KEYS[0])
        mount.name(KEYS[0], None)
        mount.check()
