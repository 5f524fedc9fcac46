"""Values that are longer than one value of the journal may be: cut into pieces, which are not changed whole.

For what is written while nobody reads: before the first worker, or as the last deed of one.
"""

from __future__ import annotations

import json

from lockfs.journal.facts import Facts

PIECE_CHARS = 900
"""In JSON, which takes twice as many bytes at most."""
PIECES_MAX = 64


def put(facts: Facts, key: str, value: object) -> None:
    """Remember a value that JSON can express.

    Raises:
        JournalFull: there is no room.
        ValueError: it takes more than PIECES_MAX pieces.
    """
    text = json.dumps(value)
    pieces = [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
    if len(pieces) > PIECES_MAX:
        raise ValueError(f"{key} is too long to be remembered: {len(text)} characters")
    for number, piece in enumerate(pieces):
        facts.set(f"{key}:{number}", piece)
    for surplus in range(len(pieces), len(facts.items(f"{key}:"))):
        facts.remove(f"{key}:{surplus}")


def get(facts: Facts, key: str) -> object | None:
    """The value, None if there is none."""
    pieces = facts.items(f"{key}:")
    if not pieces:
        return None
    value: object = json.loads("".join(str(pieces[f"{key}:{number}"]) for number in range(len(pieces))))
    return value


def replace(facts: Facts, key: str, value: object) -> None:
    """Remember a value that somebody may read at any moment, in place of the last one, as a whole.

    Raises:
        JournalFull, ValueError: as `put`; the last one stays.
    """
    last = facts.get(key)
    number = last + 1 if isinstance(last, int) else 1
    put(facts, f"{key}@{number}", value)
    facts.set(key, number)
    for former in list(facts.items(f"{key}@{number - 1}:")):
        facts.remove(former)


def current(facts: Facts, key: str) -> object | None:
    """The value that `replace` remembered last, None if there is none."""
    return get(facts, f"{key}@{facts.get(key)}")
