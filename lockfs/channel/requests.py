"""Requests that pyfuse3 works on: who sent them, and which they are.

pyfuse3 hands its operations a request's user, group and thread, and nothing else. What an operation must know
besides is found by a token that takes the place of the thread's id on the way through pyfuse3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

from lockfs.channel import protocol
from lockfs.channel.protocol import Header

TOKEN_MASK = 0x3FFFFFFF  # a token passes through a pid_t
PID_OFFSET = 32  # of a request's `pid` (protocol.IN_HEADER)


@dataclass(frozen=True, slots=True)
class Request:
    """A request under way. `unique` is the kernel's number for it, the same when it is sent again: then
    `resent` says so, and a former worker may have begun or even done it. `pid`: the caller's thread.
    """

    unique: int
    resent: bool
    pid: int
    opcode: int
    token: int


@dataclass(frozen=True)
class Caller:
    """Who sent a request: file-system ids, the thread's id as we see it (0: unknown), its umask; and which
    request it is (see Request; 0: none of the kernel's)."""

    uid: int
    gid: int
    pid: int
    umask: int
    unique: int = 0
    resent: bool = False


class Context(Protocol):
    """pyfuse3's RequestContext."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def umask(self) -> int: ...


class Requests:
    """All of a mount. Reader threads enter, the trio thread finds and leaves: single dictionary steps."""

    def __init__(self) -> None:
        self._tokens = itertools.count(1)
        self._by_token: dict[int, Request] = {}
        self._by_unique: dict[int, Request] = {}

    def enter(self, header: Header) -> Request:
        """A request is about to be passed to pyfuse3, with the token as its pid."""
        unique, resent = header.unique & ~protocol.RESENT, bool(header.unique & protocol.RESENT)
        token = next(self._tokens) & TOKEN_MASK or next(self._tokens) & TOKEN_MASK
        request = Request(unique, resent, header.pid, header.opcode, token)
        self._by_token[token] = self._by_unique[unique] = request
        return request

    def leave(self, unique: int) -> Request | None:
        """The reply to a request is there."""
        request = self._by_unique.pop(unique & ~protocol.RESENT, None)
        if request is not None:
            del self._by_token[request.token]
        return request

    def find(self, unique: int) -> Request | None:
        """The request of that number, while it is under way."""
        return self._by_unique.get(unique & ~protocol.RESENT)

    def caller(self, context: Context) -> Caller:
        """Who sent the request that pyfuse3 gives this context for."""
        request = self._by_token.get(context.pid)
        if request is None:
            return Caller(context.uid, context.gid, 0, context.umask)
        return Caller(context.uid, context.gid, request.pid, context.umask, request.unique, request.resent)


def caller_of(header: Header, umask: int) -> Caller:
    """Who sent a request that does not go through pyfuse3."""
    unique, resent = header.unique & ~protocol.RESENT, bool(header.unique & protocol.RESENT)
    return Caller(header.uid, header.gid, header.pid, umask, unique, resent)
