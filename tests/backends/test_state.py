"""Owner records and requests: told truly, never trusted, and harmless whatever is found in their place."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.backends.base import Mode, Owner
from lockfs.backends.owners import TEXT_CHARS_MAX, OwnerRecords, decode, encode
from lockfs.backends.requests import REQUEST_REPEAT_S, REQUEST_TTL_S, Requests
from lockfs.backends.state import FILE_BYTES_MAX, OWNERS, REQUESTS, StateDirectory

OWNER = Owner("hostA", 42, "qemu-system-x86_64", 1700000000.25)


@contextlib.contextmanager
def opened(store: Path) -> Iterator[StateDirectory]:
    fd = os.open(store, os.O_PATH | os.O_DIRECTORY)
    try:
        yield StateDirectory(fd)
    finally:
        os.close(fd)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDirectory]:
    with opened(tmp_path) as directory:
        yield directory


_PRINTABLE = st.characters(exclude_categories=("C", "Z"))
_TEXT = st.text(_PRINTABLE, min_size=1, max_size=TEXT_CHARS_MAX)


@given(st.builds(Owner, _TEXT, st.integers(0, 2**31 - 1), _TEXT, st.floats(0, 4e9)))
def test_record_says_what_it_was_told(owner: Owner) -> None:
    """What is encoded is bounded and decodes to the same owner, unless names had to be cut."""
    content = encode(owner)
    assert len(content) <= FILE_BYTES_MAX
    found = decode(content)
    assert found is not None
    assert (found.pid, found.since) == (owner.pid, owner.since)
    if len(owner.host) + len(owner.program) < 100:
        assert found == owner
    else:
        assert owner.host.startswith(found.host)
        assert owner.program.startswith(found.program)


@given(st.one_of(st.binary(max_size=FILE_BYTES_MAX), st.text().map(str.encode)))
def test_garbage_is_no_record(content: bytes) -> None:
    """Any bytes decode to an owner or to None, never to an error."""
    decode(content)


_ANY = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))


@given(st.fixed_dictionaries({"host": _ANY, "pid": _ANY, "program": _ANY, "since": _ANY}))
def test_wrong_fields_are_no_record(fields: dict[str, object]) -> None:
    """JSON with fields of any type decodes to an owner that can be printed in one line, or to None."""
    owner = decode(json.dumps(fields).encode())
    assert owner is None or str(owner).isprintable()


_BROKEN = [b"", b"{", b"[]", b"null", b"{}", b"[" * 1024, b'{"host":"a"}', b"\xff\xfe"]


@pytest.mark.parametrize("content", _BROKEN)
def test_truncated_record_is_no_record(content: bytes) -> None:
    """What a crash or a full disk leaves is not taken for a record."""
    assert decode(content) is None


def test_terminal_codes_in_a_record_are_defused() -> None:
    """A record cannot send control characters to whoever reads the log."""
    owner = decode(encode(Owner("h\x1b[2Jost", 1, "a\nb", 0.0)))
    assert owner == Owner("h?[2Jost", 1, "a?b", 0.0)


def test_records_come_and_go(state: StateDirectory, tmp_path: Path) -> None:
    """A record is there from write to remove, in a directory of mode 0700; removing twice is harmless."""
    records, others = OwnerRecords(state, b"one"), OwnerRecords(state, b"two")
    assert others.read(7, Mode.EXCLUSIVE) == []
    records.remove(7, Mode.EXCLUSIVE)
    for mode in Mode:
        records.write(7, mode, OWNER)
        assert others.read(7, mode) == [OWNER]
        assert others.read(8, mode) == []
        records.remove(7, mode)
        records.remove(7, mode)
        assert others.read(7, mode) == []
    assert (tmp_path / ".lockfs").stat().st_mode & 0o777 == 0o700
    records.clear()
    assert list((tmp_path / ".lockfs" / "owners").iterdir()) == []


def test_end_leaves_what_another_host_has_written(state: StateDirectory) -> None:
    """The files kept for the next time go at the end, but not one that another holder uses by then."""
    records, others = OwnerRecords(state, b"one"), OwnerRecords(state, b"two")
    for inode in (1, 2):
        records.write(inode, Mode.EXCLUSIVE, OWNER)
        records.remove(inode, Mode.EXCLUSIVE)
    others.write(2, Mode.EXCLUSIVE, OWNER)
    records.clear()
    assert state.names(b"owners") == [b"2"]
    assert records.read(2, Mode.EXCLUSIVE) == [OWNER]


def test_longer_record_is_overwritten_wholly(state: StateDirectory) -> None:
    """A record left by a crash gives way to a shorter one."""
    records = OwnerRecords(state, b"one")
    records.write(7, Mode.EXCLUSIVE, Owner("h" * 150, 1, "p" * 150, 1.0))
    records.write(7, Mode.EXCLUSIVE, OWNER)
    assert records.read(7, Mode.EXCLUSIVE) == [OWNER]


def test_record_used_before_is_written_at_once(state: StateDirectory, tmp_path: Path) -> None:
    """Once its file is there, a record is written and taken back without anything that may wait."""
    records, others = OwnerRecords(state, b"one"), OwnerRecords(state, b"two")
    place = tmp_path / ".lockfs" / "owners" / "7"
    assert not records.write_at_once(7, OWNER, b"x")
    assert not records.remove_at_once(7)
    records.write(7, Mode.EXCLUSIVE, OWNER)
    records.remove(7, Mode.EXCLUSIVE)
    assert records.write_at_once(7, OWNER, b"x")
    assert others.read(7, Mode.EXCLUSIVE) == [OWNER]
    assert records.remove_at_once(7)
    assert others.read(7, Mode.EXCLUSIVE) == []
    place.unlink()
    assert not records.write_at_once(7, OWNER, b"x")
    os.mkfifo(place)
    assert not records.write_at_once(7, OWNER, b"x")
    place.unlink()
    place.write_bytes(bytes(FILE_BYTES_MAX + 1))
    assert not records.write_at_once(7, OWNER, b"x")
    place.unlink()
    place.symlink_to(tmp_path / "elsewhere")
    assert not records.write_at_once(7, OWNER, b"x")


def test_odd_things_in_a_records_place_do_no_harm(
    state: StateDirectory, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    """A pipe, a link, a directory or a huge file named like a record is read as none, without waiting."""
    expect_log("cannot be used")
    records = OwnerRecords(state, b"one")
    records.write(1, Mode.EXCLUSIVE, OWNER)
    place = tmp_path / ".lockfs" / "owners"
    os.mkfifo(place / "2")
    (place / "3").symlink_to(place / "1")
    (place / "4").mkdir()
    (place / "5").write_bytes(b" " * 10_000_000 + b"{}")
    for inode in (2, 3, 4, 5):
        assert records.read(inode, Mode.EXCLUSIVE) == []
    for inode in (2, 3, 4):
        records.write(inode, Mode.EXCLUSIVE, OWNER)
    assert (place / "3").is_symlink()


def test_store_that_takes_no_records_is_warned_about_once(
    state: StateDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the directory cannot be made, one warning is logged and everything else goes on."""
    (tmp_path / ".lockfs").write_text("a file is in the way")
    records = OwnerRecords(state, b"one")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            records.write(1, Mode.EXCLUSIVE, OWNER)
            assert records.read(1, Mode.EXCLUSIVE) == []
            records.remove(1, Mode.EXCLUSIVE)
    assert len(caplog.records) == 1


def test_planted_link_is_not_followed(
    state: StateDirectory, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    """If somebody made the state directory a symbolic link, nothing is written where it leads."""
    expect_log("symbolic")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "owners").mkdir(parents=True)
    (tmp_path / ".lockfs").symlink_to(elsewhere)
    OwnerRecords(state, b"one").write(1, Mode.EXCLUSIVE, OWNER)
    assert list((elsewhere / "owners").iterdir()) == []


def test_directory_removed_while_mounted_is_made_again(state: StateDirectory, tmp_path: Path) -> None:
    """An administrator who removes the directory loses records, and the next one makes it again."""
    records = OwnerRecords(state, b"one")
    records.write(1, Mode.EXCLUSIVE, OWNER)
    (tmp_path / ".lockfs" / "owners" / "1").unlink()
    (tmp_path / ".lockfs" / "owners").rmdir()
    records.remove(1, Mode.EXCLUSIVE)
    records.write(1, Mode.EXCLUSIVE, OWNER)
    assert records.read(1, Mode.EXCLUSIVE) == [OWNER]


HELD = frozenset({7})


def test_request_made_under_watch_is_seen_at_once(state: StateDirectory) -> None:
    """A holder that looks regularly sees a new request at its next look."""
    holder, asker = Requests(state, b"holder"), Requests(state, b"asker")
    assert holder.asked_for(HELD, 0.0) == set()
    asker.send(7, OWNER, 0.0)
    asker.send(8, OWNER, 0.0)
    assert holder.asked_for(HELD, 0.1) == {7}
    assert asker.asked_for(HELD, 0.1) == set()
    asker.withdraw(7)
    assert holder.asked_for(HELD, 0.2) == set()


def test_request_found_at_the_first_look_must_move(state: StateDirectory) -> None:
    """A file that was there before anybody watched counts only when it changes: its host may be dead."""
    holder, asker = Requests(state, b"holder"), Requests(state, b"asker")
    asker.send(7, OWNER, 0.0)
    assert holder.asked_for(HELD, 50.0) == set()
    assert holder.asked_for(HELD, 50.1) == set()
    asker.send(7, OWNER, REQUEST_REPEAT_S)
    assert holder.asked_for(HELD, 50.2) == {7}


def test_request_that_stands_still_is_removed(state: StateDirectory, tmp_path: Path) -> None:
    """After its time to live an unchanged request is ignored and its file removed; clocks do not matter."""
    holder, asker = Requests(state, b"holder"), Requests(state, b"asker")
    holder.asked_for(HELD, 0.0)
    asker.send(7, OWNER, 1e9)
    (request,) = (tmp_path / ".lockfs" / "requests").iterdir()
    os.utime(request, (4e9, 4e9))
    assert holder.asked_for(HELD, 1.0) == {7}
    assert holder.asked_for(HELD, 1.0 + REQUEST_TTL_S) == {7}
    assert holder.asked_for(HELD, 1.1 + REQUEST_TTL_S) == set()
    assert not request.exists()


def test_repeats_are_spaced(state: StateDirectory, tmp_path: Path) -> None:
    """Repeating a request more often than needed costs the storage nothing."""
    asker = Requests(state, b"asker")
    asker.send(7, OWNER, 0.0)
    (request,) = (tmp_path / ".lockfs" / "requests").iterdir()
    first = request.read_bytes()
    asker.send(7, OWNER, REQUEST_REPEAT_S / 2)
    assert request.read_bytes() == first
    asker.send(7, OWNER, REQUEST_REPEAT_S)
    assert request.read_bytes() != first


def test_odd_names_among_requests_are_passed_over(state: StateDirectory, tmp_path: Path) -> None:
    """Files that no lockfs made are neither requests nor removed."""
    holder, asker = Requests(state, b"holder"), Requests(state, b"asker")
    asker.send(7, OWNER, 0.0)
    place = tmp_path / ".lockfs" / "requests"
    for name in ("7", "x.asker", "-7.asker", ".7", "7.", "9" * 200 + ".x"):
        (place / name).touch()
    for now in (0.0, 1.0, 20.0, 40.0):
        assert holder.asked_for(HELD, now) == set()
    assert (place / "x.asker").exists()


def test_files_are_of_their_kinds() -> None:
    """Owners and requests live apart."""
    assert OWNERS != REQUESTS
