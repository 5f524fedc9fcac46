"""Under which name a service manager has each descriptor: one word for each number of the table.

A number is used for one file after another, so its name in the store counts up with it: "fd12-1", "fd12-2".
What the store has under any other name than the one noted here is left over from something else.
"""

from __future__ import annotations

NUMBERS_MAX = 1 << 20
SERIALS_BYTES = NUMBERS_MAX * 8
_GIVEN = 1


class Serials:
    """The words. Each is 2 * serial, + 1 while the store is to have it; or, for a number that leads to the
    same open description as another one, of which a store keeps one alone, below zero and made of the
    serial and the other number. Word 0 is the greatest number that was ever used.
    """

    def __init__(self, words: memoryview) -> None:
        """`words`: SERIALS_BYTES as numbers of 8 bytes."""
        self._words = words

    def renew(self, number: int) -> int:
        """The next serial of a number, noted as given."""
        serial = self.latest(number) + 1
        self._set(number, (serial << 1) | _GIVEN)
        return serial

    def serial(self, number: int) -> int:
        """The serial under which the store is to have it; 0: it is not."""
        word = self._words[number]
        return int(word >> 1) if word > 0 and word & _GIVEN else 0

    def latest(self, number: int) -> int:
        """The greatest serial that the number had; 0: none."""
        word = int(self._words[number])
        return word >> 1 if word >= 0 else (-word - 1) // NUMBERS_MAX

    def end(self, number: int) -> None:
        """The store is not to have it any more."""
        self._words[number] = self.latest(number) << 1

    def same_as(self, number: int) -> int:
        """The number whose description it shares; -1: none."""
        word = int(self._words[number])
        return (-word - 1) % NUMBERS_MAX if word < 0 else -1

    def share(self, number: int, other: int) -> None:
        """Note that a number leads where another one does."""
        self._set(number, -(self.latest(number) * NUMBERS_MAX + other + 1))

    def _set(self, number: int, word: int) -> None:
        self._words[0] = max(self._words[0], number)
        self._words[number] = word

    def used(self) -> range:
        """All numbers that can have a word."""
        return range(1, min(NUMBERS_MAX - 1, self._words[0]) + 1)


def name_of(number: int, serial: int) -> str:
    """The name in the store."""
    return f"fd{number}-{serial}"


def parsed(name: str) -> tuple[int, int] | None:
    """Number and serial of a name in the store; None if lockfs did not give it."""
    number, dash, serial = name.removeprefix("fd").partition("-")
    if not name.startswith("fd") or not dash or not number.isdecimal() or not serial.isdecimal():
        return None
    return (int(number), int(serial)) if 0 < int(number) < NUMBERS_MAX else None
