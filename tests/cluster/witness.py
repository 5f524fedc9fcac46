"""The record of who wrote what: an image in which nothing that landed is ever overwritten.

Each time an image changes hands a new term begins. A term has a region of the image for itself; its
owner writes records 1, 2, 3, … into the region's blocks, one after another, each at its own place. Who begins
a term looks first how many records of the term before have landed, and puts that number into each of its own
records. A record of an old term beyond that number is a stale write: it landed after the next owner had the
image.

Run with an image's path it prints what it finds as JSON. Standard library only: guests run it too.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

BLOCK = 4096
REGION_BLOCKS = 16384
TERMS = 4
IMAGE_BYTES = BLOCK * REGION_BLOCKS * TERMS
_MAGIC = b"LOCKFSWI"
_FIELDS = struct.Struct("<8s16sIIId")
_CHUNK = 256 * BLOCK  # regions are multiples of it


@dataclass(frozen=True)
class Record:
    """One write: by which host, in which term, the how many-th, what it saw of the term before, and when
    (CLOCK_BOOTTIME of its writer, in seconds)."""

    host: str
    term: int
    number: int
    seen_before: int
    boot: float


@dataclass(frozen=True)
class Term:
    """What landed of a term. `stale` are numbers that the next owner did not see, `holes` numbers below the
    highest that are not there or are torn."""

    term: int
    host: str
    landed: int
    seen_before: int
    stale: tuple[int, ...]
    holes: tuple[int, ...]


def place(term: int, number: int) -> int:
    """Where a record lies, in bytes. Terms and numbers start at 1."""
    if not (1 <= term <= TERMS and 1 <= number <= REGION_BLOCKS):
        raise ValueError(f"no place for record {number} of term {term}")
    return ((term - 1) * REGION_BLOCKS + number - 1) * BLOCK


def encode(record: Record) -> bytes:
    """The block of a record."""
    fields = _FIELDS.pack(
        _MAGIC, record.host.encode(), record.term, record.number, record.seen_before, record.boot
    )
    whole = fields.ljust(BLOCK - 4, b"\xa5")
    return whole + struct.pack("<I", zlib.crc32(whole))


def decode(block: bytes) -> Record | None:
    """The record in a block; None if none, or only a part of one, is there."""
    if not block.startswith(_MAGIC) or zlib.crc32(block[:-4]) != struct.unpack("<I", block[-4:])[0]:
        return None
    _, host, term, number, seen, boot = _FIELDS.unpack_from(block)
    return Record(host.rstrip(b"\0").decode(), term, number, seen, boot)


def records(descriptor: int, term: int) -> dict[int, Record]:
    """All records in a term's region, by number."""
    found: dict[int, Record] = {}
    for data in _chunks(descriptor, place(term, 1), place(term, REGION_BLOCKS)):
        here = (decode(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK))
        found |= {record.number: record for record in here if record is not None}
    return found


def _chunks(descriptor: int, at: int, last: int) -> Iterator[bytes]:
    """What is not a hole between `at` and the block at `last`."""
    while at <= last:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # no data up to the end of the file
            raise
        at -= at % _CHUNK
        if at <= last:
            yield os.pread(descriptor, _CHUNK, at)
        at += _CHUNK


def examine(path: str) -> list[Term]:
    """What landed of each term."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        all_terms = {term: records(descriptor, term) for term in range(1, TERMS + 1)}
    finally:
        os.close(descriptor)
    found = []
    for term, landed in all_terms.items():
        if not landed:
            continue
        highest = max(landed)
        one = landed[highest]
        after = next((r for other in range(term + 1, TERMS + 1) for r in all_terms[other].values()), None)
        seen = after.seen_before if after is not None else highest
        stale = tuple(number for number in sorted(landed) if number > seen)
        holes = tuple(number for number in range(1, highest) if number not in landed)
        found.append(Term(term, one.host, len(landed), one.seen_before, stale, holes))
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(term) for term in examine(sys.argv[1])]))
