"""The loads by name."""

from __future__ import annotations

from tests.failover import contended_loads, data_loads, fio_loads, guest_load, name_loads
from tests.failover.loads import Load

BEAT = "beat"
RIVAL = "rival"
NEAR, FAR = "contender", "contender-far"

ORDINARY: dict[str, type[Load]] = {
    BEAT: name_loads.Beat,
    "names": name_loads.Names,
    "unlinks": name_loads.Unlinks,
    "directories": name_loads.Directories,
    "links": name_loads.Links,
    "listing": name_loads.Listing,
    "attributes": name_loads.Attributes,
    "opens": data_loads.Opens,
    "kept": data_loads.Kept,
    "append": data_loads.Append,
    "truncate": data_loads.Truncate,
    "orphans": data_loads.Orphans,
}
"""Loads of the first mount that need nothing but a directory."""

FIO: dict[str, type[Load]] = {
    "fio-direct": fio_loads.FioDirect,
    "fio-async": fio_loads.FioAsync,
    "fio-buffered": fio_loads.FioBuffered,
}

GUESTS: dict[str, type[Load]] = {"guest": guest_load.Guest}

RIVALS: dict[str, type[Load]] = {
    NEAR: contended_loads.Contender,
    FAR: contended_loads.FarContender,
    RIVAL: contended_loads.Rival,
}
"""Loads of a store that has leases; the last two work on the second mount."""

LOADS = ORDINARY | FIO | GUESTS | RIVALS
