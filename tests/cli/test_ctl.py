"""lockfsctl shows mounts and holders: a table for people, JSON for programs, an exit code for scripts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lockfs.cli import ctl
from lockfs.cli.table import local_time, printable, render
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, EXIT_USAGE
from lockfs.mount.control import Message

SINCE = time.mktime((2026, 3, 1, 12, 30, 5, 0, 0, -1))


def image(path: str, **more: Any) -> Message:
    """An image as the server describes it."""
    opener = {"pid": 4711, "program": "qemu-system-x86_64", "kind": "leased"}
    common = {"inode": 7, "mode": "exclusive", "state": "held", "host": "hostA", "since": SINCE}
    return {"path": path, **common, "openers": [opener], "remote": False, **more}


@dataclass
class FakeServer:
    """Answers status and who from what it was given, one connection at a time, on a thread."""

    path: Path
    status: Message
    images: list[Message] = field(default_factory=list)
    asked: list[Message] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                line = connection.makefile("rb").readline()
                if not line:
                    return
                request = json.loads(line)
                self.asked.append(request)
                answer: Message = self.status if request["op"] == "status" else {"images": self.images}
                if request["op"] == "who" and self.error:
                    answer = {"error": self.error}
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def stop(self) -> None:
        """End the thread."""
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.path))
        self._thread.join()
        self._listener.close()


def status_of(mountpoint: str, source: str, **more: Any) -> Message:
    """A status as the server gives it."""
    common = {"backend": "fcntl", "io": "auto", "passthrough": True, "pid": 99, "host": "hostA"}
    return {"mountpoint": mountpoint, "source": source, **common, "version": "0.1.0", "since": SINCE, **more}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers in the test's directory."""
    servers: list[FakeServer] = []

    def start(mountpoint: str, source: str, **more: Any) -> FakeServer:
        path = tmp_path / f"{len(servers)}-1.sock"
        servers.append(FakeServer(path, status_of(mountpoint, source, images=2, handles=5), **more))
        return servers[-1]

    yield start
    for one in servers:
        one.stop()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs lockfsctl on the test's sockets: exit code, output, errors."""

    def call(*argv: str) -> tuple[int, str, str]:
        code = ctl.run(argv, tmp_path)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_nothing_runs(run: Run) -> None:
    """Without a mount: exit code 2 and a sentence; JSON is still JSON."""
    assert run("status") == (EXIT_SYSTEM, "", "lockfsctl: No lockfs mount runs here.\n")
    code, out, _ = run("who", "--json")
    assert (code, json.loads(out)) == (EXIT_SYSTEM, {"images": []})


@pytest.mark.parametrize("argv", [[], ["what"], ["status", "--no"], ["who", "--jso"]])
def test_usage(run: Run, argv: list[str]) -> None:
    """Wrong usage is exit code 1 and one line on standard error."""
    code, out, err = run(*argv)
    assert (code, out) == (EXIT_USAGE, "")
    assert err.count("\n") == 1


def test_status_table(run: Run, server: Callable[..., FakeServer]) -> None:
    """The mounts in order of their mount points, one line each."""
    server("/mnt/z", "/srv/z")
    server("/mnt/images", "/srv/images")
    code, out, err = run("status")
    assert (code, err) == (EXIT_OK, "")
    assert out.splitlines() == [
        "MOUNTPOINT   SOURCE       BACKEND  IO                  IMAGES  OPEN  HOST   PID  "
        "SINCE                VERSION",
        "/mnt/images  /srv/images  fcntl    auto (passthrough)  2       5     hostA  99   "
        "2026-03-01 12:30:05  0.1.0",
        "/mnt/z       /srv/z       fcntl    auto (passthrough)  2       5     hostA  99   "
        "2026-03-01 12:30:05  0.1.0",
    ]


def test_status_of_one(run: Run, server: Callable[..., FakeServer]) -> None:
    """A mount point selects; one that is none is complained of, after what was found."""
    server("/mnt/a", "/srv/a")
    server("/mnt/b", "/srv/b")
    code, out, _ = run("status", "--json", "/mnt/./b/")
    assert code == EXIT_OK
    assert [mount["mountpoint"] for mount in json.loads(out)["mounts"]] == ["/mnt/b"]
    code, out, err = run("status", "/mnt/a", "/mnt/none")
    assert code == EXIT_SYSTEM
    assert "/mnt/a " in out
    assert err == "lockfsctl: No lockfs mount runs at /mnt/none.\n"


def test_who_table(run: Run, server: Callable[..., FakeServer]) -> None:
    """One line for each opener, the image's columns on its first line only."""
    more = {
        "openers": [
            {"pid": 1, "program": "a", "kind": "leased"},
            {"pid": 22, "program": "b", "kind": "reader"},
        ]
    }
    remote = {
        "openers": [{"pid": None, "program": "virtlockd", "kind": "virtlockd"}],
        "since": None,
        "host": None,
    }
    server("/mnt/a", "/srv/a", images=[image("x.img", **more), image("dir/y.qcow2"), image("z", **remote)])
    code, out, err = run("who")
    assert (code, err) == (EXIT_OK, "")
    assert out.splitlines() == [
        "IMAGE               MODE       HOST   PID   PROGRAM             SINCE                STATE",
        "/mnt/a/x.img        exclusive  hostA  1     a                   2026-03-01 12:30:05  held, leased",
        "                                      22    b                                        held, reader",
        "/mnt/a/dir/y.qcow2  exclusive  hostA  4711  qemu-system-x86_64  2026-03-01 12:30:05  held, leased",
        "/mnt/a/z            exclusive  -      -     virtlockd           -                    "
        "held, virtlockd",
    ]


def test_who_of_images(run: Run, server: Callable[..., FakeServer], tmp_path: Path) -> None:
    """An image is asked of the innermost mount it is on, by its place there; a path in the source counts."""
    outer = server("/mnt", "/srv")
    inner = server("/mnt/in", "/srv/other", images=[image("d/x")])
    link = tmp_path / "link"
    link.symlink_to("/mnt/in/d")
    code, out, _ = run("who", "--json", "/mnt/in/d/x", f"{link}/x", "/srv/y", "/mnt/in")
    assert code == EXIT_OK
    assert inner.asked[1:] == [
        {"op": "who", "path": "d/x"},
        {"op": "who", "path": "d/x"},
        {"op": "who"},
    ]
    assert outer.asked[1:] == [{"op": "who", "path": "y"}]
    assert {row["file"] for row in json.loads(out)["images"]} == {"/mnt/in/d/x"}


def test_who_of_nothing(run: Run, server: Callable[..., FakeServer]) -> None:
    """No holder is an answer (0); a path on no mount is not (2), nor is a server's complaint."""
    one = server("/mnt/a", "/srv/a")
    assert run("who") == (EXIT_OK, "No image is held.\n", "")
    assert run("who", "/mnt/a/x") == (EXIT_OK, "Nobody holds any of these images.\n", "")
    code, out, err = run("who", "/elsewhere/x")
    assert (code, out) == (EXIT_SYSTEM, "")
    assert err == "lockfsctl: /elsewhere/x is on no lockfs mount that runs here.\n"
    one.error = "x: No such file or directory"
    assert run("who", "/mnt/a/x") == (EXIT_SYSTEM, "", "lockfsctl: /mnt/a: x: No such file or directory\n")


def test_unreachable_mounts(
    run: Run, server: Callable[..., FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stuck server is told apart from the others, which are shown; a dead socket is not mentioned."""
    monkeypatch.setattr(ctl, "TIMEOUT_S", 0.2)
    server("/mnt/a", "/srv/a")
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as stuck:
        dead.bind(str(tmp_path / "8-1.sock"))
        stuck.bind(str(tmp_path / "9-1.sock"))
        stuck.listen()
        code, out, err = run("status")
    assert code == EXIT_SYSTEM
    assert "/mnt/a" in out
    assert err.count("\n") == 1
    assert "9-1.sock" in err


def test_odd_names(run: Run, server: Callable[..., FakeServer]) -> None:
    """Names that could upset a terminal come out escaped in the table and whole in JSON."""
    name = "a\x1b[31m\n\udcff\u202eb"
    server("/mnt/a", "/srv/a", images=[image(name)])
    _, out, _ = run("who")
    assert "/mnt/a/a\\x1b[31m\\n\\xff\\u202eb" in out
    assert out.count("\n") == 2
    _, out, _ = run("who", "--json")
    assert out.isascii()
    assert json.loads(out)["images"][0]["path"] == name


@pytest.mark.parametrize("status", [{}, {"mountpoint": None}, {"mountpoint": 3, "since": "x", "images": []}])
def test_odd_answers(run: Run, tmp_path: Path, status: Message) -> None:
    """A server of another version, whose answers lack something, is shown as far as it goes."""
    server = FakeServer(tmp_path / "0-1.sock", status, [{}, {"openers": None}, image("x", since=1e300)])
    try:
        assert run("status")[0] == EXIT_OK
        assert run("who")[0] == EXIT_OK
    finally:
        server.stop()


def test_text() -> None:
    """Cells: nothing is a dash, times are local, columns are as wide as they need be."""
    assert [printable(value) for value in (None, "", 0, "ä b", "a\tb")] == ["-", "-", "0", "ä b", "a\\tb"]
    assert [local_time(value) for value in (None, "x", True, 0, 1e300, SINCE)] == ["-"] * 5 + [
        "2026-03-01 12:30:05"
    ]
    assert render(("A", "B"), [("long", ""), ("x", "y")]) == "A     B\nlong\nx     y"
