"""The conformance suite over every backend and, for fcntl, every combination of options."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from _pytest.mark import ParameterSet

from lockfs.backends.fcntl import FcntlOptions
from lockfs.backends.paxos.options import LayoutKind

from . import conformance
from .conformance import Check, Maker, Offers
from .makers import FcntlMaker, NopMaker, PaxosMaker

_COMBINATIONS = [
    FcntlOptions(virtlockd=virtlockd, qemu=qemu, lock_dir=lock_dir)
    for virtlockd, qemu, lock_dir in itertools.product((True, False), (True, False), (None, "locks"))
]


def _name(options: FcntlOptions) -> str:
    parts = {"virtlockd": options.virtlockd, "qemu": options.qemu, "lock_dir": options.lock_dir is not None}
    return "fcntl-" + ("+".join(part for part, on in parts.items() if on) or "bare")


MakeMaker = Callable[[Path], Maker]
MAKERS: dict[str, MakeMaker] = {"nop": NopMaker}
for _options in _COMBINATIONS:
    MAKERS[_name(_options)] = lambda path, options=_options: FcntlMaker(path, [options])  # type: ignore[misc]
MAKERS["fcntl-each_host_another"] = lambda path: FcntlMaker(path, list(reversed(_COMBINATIONS)))
PAXOS_LAYOUTS = (LayoutKind.FILES, LayoutKind.INDEX, LayoutKind.LIBVIRT)
for _layout in PAXOS_LAYOUTS:
    MAKERS[f"paxos-{_layout.value}"] = lambda path, layout=_layout: PaxosMaker(path, layout)  # type: ignore[misc]

OFFERS = {"nop": NopMaker.offers}
STRESS_ROUNDS = {
    "fcntl-virtlockd+qemu": 1000,
    "fcntl-bare": 200,
    "fcntl-each_host_another": 200,
    "paxos-files": 60,
    "paxos-index": 30,
}


def _cases() -> list[ParameterSet]:
    cases = []
    for name, make in MAKERS.items():
        for check in (
            *conformance.BASIC,
            *conformance.EXCLUSION,
            *conformance.REQUESTS,
            *conformance.FAILOVER,
        ):
            if name == "paxos-libvirt" and check is conformance.names_of_one_file_are_one_image:
                continue  # libvirt's leases are of paths; docs/paxos.md says so
            if conformance.offered(OFFERS.get(name, Offers()), check):
                cases.append(pytest.param(make, check, id=f"{name}-{check.__name__}"))
    return cases


async def test_nop_guards_nothing(tmp_path: Path) -> None:
    """The nop backend grants one image to all hosts at once, and says so of nobody."""
    maker = NopMaker(tmp_path)
    async with maker.hosts(3) as hosts:
        leases = [await conformance.acquire(maker, host) for host in hosts]
        for host, lease in zip(hosts, leases, strict=True):
            image = host.image(conformance.IMAGE)
            assert await host.backend.holders(image) == []
            await host.backend.request(image, host.owner)
            await host.backend.withdraw(image, host.owner)
            assert await host.backend.requested([image.inode]) == set()
            await host.backend.release(lease)


@pytest.mark.parametrize(("make", "check"), _cases())
async def test_conforms(
    make: MakeMaker, check: Check, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The backend does what the check says, with time that passes as fast as it is waited for."""
    await check(make(tmp_path))


@pytest.mark.parametrize("name", sorted(STRESS_ROUNDS))
def test_processes_never_share(name: str, tmp_path: Path) -> None:
    """Eight processes fighting for one image are never inside together."""
    maker = MAKERS[name](tmp_path)
    conformance.processes_never_share(maker, tmp_path / "witness", STRESS_ROUNDS[name])
