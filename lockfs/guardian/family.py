"""The guardian: it keeps a worker, a spare and a twin alive, and fills the place of whoever is killed.

One loop, in whichever process is guardian; whoever becomes guardian begins it anew. What must survive it is
in Words. Every process of the family is this program in another function: `_spare`, `_twin`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import FrameType
from typing import cast

from lockfs.errors import EXIT_OK, EXIT_SYSTEM
from lockfs.guardian import canary, death, long_values, upgrade
from lockfs.guardian.sweep import close_unnamed
from lockfs.guardian.turn import FAILURE, Turn
from lockfs.guardian.words import Limits, Words
from lockfs.journal.memory import SharedMemory
from lockfs.linux import cloning, dying, urgency

EXIT_HOPELESS = 70
"""A worker that exits so has found that no worker can go on: the mount ends, dead."""
_OOM_GUARDIAN, _OOM_TWIN = -1000, -900
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_EVERY = signal.valid_signals()
_SURE_LOOKS = 2
"""So many looks one after the other must say that nobody guards before the spare believes it."""


@dataclass(frozen=True)
class Plan:
    """What a family is for.

    `prepare` runs in a worker before it is needed: what takes long and depends on nothing, as imports.
    `serve` is the worker's whole work; its answer is the exit code, 0 after an orderly end. `kept` are
    descriptors of the guardian's that every worker needs. `on_ready` runs in the guardian when the first
    worker is ready. `is_over` tells, at once, whether there is nothing left to serve. `program` is what an
    upgrade starts.
    """

    serve: Callable[[Turn], int]
    prepare: Callable[[], None]
    memory: SharedMemory
    kept: Collection[int]
    on_ready: Callable[[], None]
    is_over: Callable[[], bool]
    program: upgrade.Program
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Ending:
    """How a family ended. `code` is that of the last worker. `ready`: it served before. `sentence`: why the
    start failed, "" if the worker left none. `number`: the signal that killed it, if it failed by one.
    """

    code: int
    ready: bool = True
    sentence: str = ""
    number: int | None = None


def guard(plan: Plan) -> Ending:
    """Start a worker, or the next one of a mount that was upgraded, and keep the mount served until it ends.

    The calling process must have one thread, and becomes the guardian. If it is killed, its twin returns from
    here in its place.

    Raises:
        OSError: the first worker could not be started.
    """
    return _Family(plan).run()


class _Become(BaseException):
    """Raised in a cloned process, so that it leaves the stack of the one that it was cloned from."""

    def __init__(self, role: Callable[[], Ending]) -> None:
        super().__init__()
        self.role = role


class _Family:
    """The family as one of its processes sees it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._memory = plan.memory
        self._header = plan.memory.header
        self._words = Words(plan.memory)
        self._canary = canary.Watch(self._words)
        self._limits = plan.limits
        self._prepared = False
        self._looked = 0.0  # when the loop last turned
        self._heartbeat = 0
        self._missed = 0.0  # seconds without a heartbeat in which this process itself ran
        self._clone_at = {"twin": 0.0, "spare": 0.0}

    def run(self) -> Ending:
        """Be the guardian, and in a cloned process whatever that is for."""
        self._set_up()
        role: Callable[[], Ending] = self._guard
        while True:
            try:
                return role()
            except _Become as other:
                role = other.role

    # --- the guardian

    def _set_up(self) -> None:
        words = self._words
        urgency.be_ordinary()
        _fill_standard_streams()
        words.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        words.order = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        words.guardian_fd = os.pidfd_open(os.getpid())
        self._header.guardian_pid = os.getpid()
        if not self._header.turns:
            words.family = os.getpid()
            words.oom = cloning.oom_adjustment()

    def _guard(self) -> Ending:
        """Guard until the mount ends."""
        urgency.begin()
        served = self._take_office()
        while True:
            canary.reap(self._words)
            if self._header.worker_pid and self._worker_is_over():
                ending = self._bury_worker()
                if ending is not None:
                    self._end_family()
                    return ending
            if not self._words.sweeping:
                if not served and self._header.served:
                    served = True
                    self._plan.on_ready()
                    self._protect()
                if self._loops_for_nothing():
                    self._end_family()
                    return Ending(EXIT_SYSTEM)
                self._keep_family()
                self._pass_on_signal()
                if self._header.upgrade and self._words.ready_ns:
                    self._upgrade()
            self._check_heartbeat()
            self._wait()

    def _take_office(self) -> bool:
        """Become able to guard; whether a worker has served before. Completes what a killed guardian left."""
        for number in _ASKING:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _EVERY)
        if self._header.worker_pid and self._header.spare_pid == self._header.worker_pid:
            self._words.spare_fd = 0
            self._header.spare_pid = 0
            os.eventfd_write(self._words.order, 1)
        self._looked = time.monotonic()
        served = bool(self._header.served)
        if served:
            self._protect()
        return served

    def _protect(self) -> None:
        cloning.set_name("lockfs")
        cloning.stay_in_memory()
        if not self._words.sweeping:  # the twin has nearly the same
            cloning.set_oom_adjustment(os.getpid(), _OOM_GUARDIAN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self._words.unmount = number
        elif self._words.ready_ns:
            self._header.upgrade = 1
        self._words.ring()

    def _wait(self) -> None:
        """Until somebody dies or rings, but no longer than the time of one look."""
        words, poller = self._words, select.poll()
        awaited = {words.bell, words.worker_fd}
        if not words.sweeping:  # whose death can be seen to
            awaited |= {words.twin_fd, words.spare_fd}
        pause = self._canary.pause()
        if pause is None:
            awaited.add(words.canary_fd)
        for descriptor in awaited - {0}:
            poller.register(descriptor, select.POLLIN)
        poller.poll((self._limits.poll if pause is None else min(pause, self._limits.poll)) * 1000)
        _drain(words.bell)

    def _check_heartbeat(self) -> None:
        """Kill a worker whose loop stands still, by looks at which this process itself was awake.

        One that has not begun to turn has the time of a start; the first one until it is ready, for which
        somebody waits, as long as that takes.
        """
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        heartbeat = self._header.heartbeat_ns
        if heartbeat != self._heartbeat or not self._header.worker_pid or passed > 4 * self._limits.poll:
            self._heartbeat, self._missed = heartbeat, 0.0
            return
        self._missed += passed
        starting = not heartbeat
        if self._header.turns == 1 and not self._words.ready_ns:
            return
        if self._missed > (self._limits.start if starting else self._limits.heartbeat):
            self._missed = 0.0
            self._words.hung = self._header.worker_pid
            cloning.send(self._words.worker_fd, signal.SIGKILL)

    def _pass_on_signal(self) -> None:
        """Ask the worker for the mount's end as soon as it listens; that may be the next one."""
        words = self._words
        if words.unmount and words.listening and self._header.worker_pid:
            cloning.send(words.worker_fd, words.unmount)
            words.unmount = 0

    # --- who is dead, who is next

    def _loops_for_nothing(self) -> bool:
        """Whether workers keep dying although there is nothing left to serve: the first ones put things in
        order after the mount's end, if they can.
        """
        looping = self._words.deaths >= self._limits.loop_deaths
        return looping and not self._header.worker_pid and self._plan.is_over()

    def _worker_is_over(self) -> bool:
        """Whether nothing that the next worker does can meet anything that this one still does."""
        if cloning.is_dead(self._words.worker_fd):
            return True
        return bool(self._header.served) and self._canary.is_done_for(self._header.worker_pid)

    def _bury_worker(self) -> Ending | None:
        """Note how the worker ended; how the family ends, if that ends it."""
        words, header = self._words, self._header
        words.sweeping = 0
        if cloning.is_dead(words.worker_fd):
            status = _reaped(header.worker_pid)
        else:
            status = dying.exit_status(header.worker_pid)
            canary.let_linger(words, header.worker_pid)
        how = death.of_status(status, words.ended)
        words.death = death.HUNG if words.hung == header.worker_pid else how
        code = words.ended - 1
        if code in (EXIT_OK, EXIT_HOPELESS):
            return Ending(EXIT_OK if code == EXIT_OK else EXIT_SYSTEM)
        if header.turns == 1 and not words.ready_ns:
            return self._failed_start(code, how)
        served = (time.monotonic_ns() - words.ready_ns) / 1e9 if words.ready_ns else 0.0
        # What kills from outside (SIGKILL) comes as it comes: a loop only if workers never get to serve.
        outside = words.death in (death.KILLED, death.UNKNOWN)
        steady = self._limits.loop_killed if outside else self._limits.loop_steady
        words.deaths = 0 if served >= steady else words.deaths + 1
        self._forget_worker()
        return None

    def _forget_worker(self) -> None:
        words = self._words
        words.listening = words.ready_ns = 0
        descriptor, words.canary_fd = words.canary_fd, 0
        if descriptor:
            os.close(descriptor)
        self._vacate("worker")

    def _failed_start(self, code: int, how: int) -> Ending:
        self._memory.facts.reload()
        left = cast("dict[str, object]", long_values.get(self._memory.facts, FAILURE) or {})
        code = cast(int, left.get("code", code if code >= 0 else EXIT_SYSTEM))
        return Ending(code, False, str(left.get("sentence", "")), death.signal_of(how))

    def _keep_family(self) -> None:
        """Put somebody in every place that is empty and can be filled at this moment."""
        header, words = self._header, self._words
        if header.spare_pid and cloning.is_dead(words.spare_fd):
            words.spares_lost += 1
            self._clone_at["spare"] = time.monotonic() + self._limits.clone_retry
            self._vacate("spare")
        if header.twin_pid and cloning.is_dead(words.twin_fd):
            self._vacate("twin")
        if not header.worker_pid:
            if not header.spare_pid:
                self._attempt("spare", self._make_spare)
            self._order()
        if words.sweeping or not header.served:
            return  # the worker makes the spare then, and there is nothing yet for a twin to go on with
        if not header.spare_pid:
            self._attempt("spare", self._make_spare)
        if not header.twin_pid:
            self._attempt("twin", self._make_twin)

    def _attempt(self, place: str, make: Callable[[], None]) -> None:
        if time.monotonic() < self._clone_at[place]:
            return
        try:
            make()
        except OSError:  # no memory, too many processes: the next attempt may have more luck
            if not self._header.served:
                raise
            self._clone_at[place] = time.monotonic() + self._limits.clone_retry

    def _vacate(self, place: str) -> None:
        pid = getattr(self._header, f"{place}_pid")
        descriptor = getattr(self._words, f"{place}_fd")
        setattr(self._header, f"{place}_pid", 0)
        setattr(self._words, f"{place}_fd", 0)
        if pid and pid not in self._words.lingering():
            _reaped(pid)
        if descriptor:
            os.close(descriptor)

    def _order(self) -> None:
        """Tell the spare to take over, in a crash loop not too soon; nothing if there is no spare."""
        header, words = self._header, self._words
        looping = words.deaths >= self._limits.loop_deaths
        since = (time.monotonic_ns() - words.ordered_ns) / 1e9
        if not header.spare_pid or (looping and words.fenced and since < self._limits.fenced_retry):
            return
        words.ended = words.ready_ns = words.listening = words.hung = 0
        self._heartbeat = header.heartbeat_ns = 0
        self._missed = 0.0
        words.fenced = int(looping)
        words.ordered_ns = time.monotonic_ns()
        header.turns += 1
        words.sweeping = int(header.turns > 1)
        words.worker_fd = words.spare_fd
        header.worker_pid = header.spare_pid
        words.spare_fd = 0
        header.spare_pid = 0  # only then does the spare go on
        os.eventfd_write(words.order, 1)

    # --- the end

    def _end_family(self) -> None:
        """End twin and spare; whoever would succeed first."""
        for place in ("twin", "spare"):
            self._end(place)

    def _end(self, place: str) -> bool:
        """Kill a member and see it dead; False if it was not within the limit."""
        descriptor = getattr(self._words, f"{place}_fd")
        if not descriptor:
            return True
        cloning.send(descriptor, signal.SIGKILL)
        if not cloning.await_death(descriptor, self._limits.kill):
            return False
        if place != "worker":
            self._vacate(place)
        return True

    def _upgrade(self) -> None:
        """Have the program as it is installed go on in this process; if that fails, replace the worker."""
        self._header.upgrade = 0
        if not upgrade.can_resume(self._plan.program, self._memory):
            self._words.upgrades_refused += 1
            return
        if not (self._end("twin") and self._end("spare") and self._end("worker")):
            return
        if self._words.ended == EXIT_OK + 1:
            return  # the mount has ended meanwhile: nothing to go on with
        self._words.death, self._words.deaths = death.UPGRADED, 0
        self._forget_worker()
        with contextlib.suppress(OSError):
            upgrade.become(self._plan.program, self._memory, self._plan.kept, _ASKING)
        self._words.upgrades_refused += 1

    # --- the others

    def _clone(self, role: Callable[[], Ending], *, sibling: bool = False) -> tuple[int, int]:
        """A new process that goes on in `role`, without this one's signal handlers; its pid and pidfd."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _EVERY)
        try:
            pid, descriptor = cloning.clone_sharing_files(sibling=sibling)
            if pid == 0:
                urgency.end()
                for number in _ASKING:
                    signal.signal(number, signal.SIG_IGN)
                os.setsid()  # what the terminal sends is the guardian's
                raise _Become(role)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        return pid, descriptor

    def _make_twin(self) -> None:
        pid, descriptor = self._clone(self._twin)
        cloning.set_oom_adjustment(pid, _OOM_TWIN)
        self._words.twin_fd = descriptor
        self._header.twin_pid = pid

    def _twin(self) -> Ending:
        """Wait for the guardian's death, then be it."""
        cloning.set_name("lockfs-twin")
        urgency.begin()
        cloning.stay_in_memory()
        guardian = self._words.guardian_fd
        while not cloning.await_death(guardian, self._limits.start):
            pass
        self._succeed("twin")
        return self._guard()

    def _succeed(self, place: str) -> None:
        """Take the guardian's place from another one."""
        words = self._words
        former = words.guardian_fd
        descriptor = getattr(words, f"{place}_fd") or os.pidfd_open(os.getpid())
        words.guardian_fd = descriptor
        self._header.guardian_pid = os.getpid()
        setattr(self._header, f"{place}_pid", 0)
        setattr(words, f"{place}_fd", 0)
        if not words.sweeping:  # otherwise the sweep does it
            os.close(former)

    def _make_spare(self, *, sibling: bool = False) -> None:
        """A new spare. A `sibling` of the worker that makes it, before it serves, has all imported."""
        pid, descriptor = self._clone(self._spare, sibling=sibling)
        if not sibling:
            cloning.set_oom_adjustment(pid, self._words.oom)
        self._words.spare_fd = descriptor
        self._header.spare_pid = pid

    def _spare(self) -> Ending:
        """Get ready to work, wait until that is needed, do it and exit; or take the guardian's place."""
        code = EXIT_SYSTEM
        try:
            cloning.set_name("lockfs-spare")
            if not self._prepared:
                self._prepare()
            if self._is_needed():
                code = self._work()
            elif self._header.spare_pid == os.getpid():
                self._succeed("spare")
                return self._guard()
        except _Become:
            raise
        except BaseException:  # noqa: BLE001  (the process ends here, whatever it is)
            traceback.print_exc()
        os._exit(code)

    def _prepare(self) -> None:
        if not self._header.served:  # a start that was given up must not go on
            cloning.die_with_parent(signal.SIGKILL)
            if os.getppid() != self._header.guardian_pid:
                os._exit(EXIT_SYSTEM)
        self._plan.prepare()
        self._prepared = True

    def _is_needed(self) -> bool:
        """Wait until this process is the worker; False if it is to guard, or to end as nobody knows it."""
        header, words = self._header, self._words
        unwatched = unknown = 0
        poller = select.poll()
        poller.register(words.order, select.POLLIN)
        while True:
            if header.worker_pid == os.getpid() != header.spare_pid:
                _drain(words.order)
                return True
            unwatched = unwatched + 1 if words.unwatched() else 0
            unknown = unknown + 1 if os.getpid() not in (header.spare_pid, header.worker_pid) else 0
            if unwatched == _SURE_LOOKS and header.served:
                return False
            if unwatched == _SURE_LOOKS or unknown == _SURE_LOOKS * 4:
                os._exit(EXIT_SYSTEM)
            poller.poll(self._limits.poll * 1000)

    def _work(self) -> int:
        """Serve; the exit code. What a former worker left is put in order before."""
        header, words = self._header, self._words
        cloning.set_name("lockfs-worker")
        if header.turns > 1:
            urgency.begin()  # until those are served who wait for it; see mount.serve
        with contextlib.suppress(OSError):  # the guardian makes one later
            self._make_spare(sibling=True)
        if header.turns > 1:
            self._memory.reload()
            close_unnamed(self._memory, self._plan.kept)
            words.sweeping = 0
            words.ring()
        canary.keep(words)
        code = EXIT_SYSTEM
        try:
            code = self._plan.serve(Turn(self._memory))
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            words.ended = code + 1
        return code


def _fill_standard_streams() -> None:
    """See to it that 0 to 2 are open: 0 stands for no descriptor in Words."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _drain(eventfd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)


def _reaped(pid: int) -> int | None:
    """How a child has ended, as os.waitstatus_to_exitcode has it; None if it is not ours."""
    try:
        done, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if done else None
