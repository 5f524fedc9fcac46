"""A guest that writes without an operating system: one boot sector, and the check of what it wrote.

The program lives in the first sector of the very disk it writes to. It numbers its writes 1, 2, 3, …
and puts number k into slot k mod SLOTS; slots lie further apart than a qcow2 cluster, so that new slots
allocate clusters and change metadata all the time. Before each write it reads back the number it wrote
last (perhaps through another host by now) and counts it as an error if that number is not there.

A number counts as acknowledged, in the guest's memory at COUNTER, once the BIOS said that the write is
done. `check` therefore demands of the image: the highest number found is the acknowledged one or the one
after it, and every slot holds the youngest number that belongs there.
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
SLOTS = 2048
STRIDE = 129  # sectors from slot to slot: one more than a 64 KiB cluster has
FIRST = 64  # sector of slot 0
DISK_BYTES = 160 * 1024 * 1024
COUNTER = 0x7E00  # physical addresses in the guest
ERRORS = 0x7E04

_PROGRAM = bytes.fromhex(
    # 7c00: flat segments, stack below the program
    "fa 31c0 8ed8 8ec0 8ed0 bc007c fb fc"  # cli; ax=ds=es=ss=0; sp=7c00; sti; cld
    "bf007e b92000 f3ab"  # clear the variables at 7e00
    "8816087e"  # [drive] = dl, as the BIOS says
    "c706107e1000 c706127e0100"  # disk address packet at 7e10: 16 bytes long, one sector
    # 7c26 next: ebx = last acknowledged number; read it back if there is one
    "668b1e007e 6685db 7419"  # jz write
    "c706147e0084 b442 e84100"  # packet.buffer = 8400; ah = 42h (read); call disk
    "72e9"  # jc next
    "663b1e0084 7405 66ff06047e"  # what is there is not ebx: ++[errors]
    # 7c49 write: ebx + 1, with the error count, 64 times into the buffer at 8000
    "6643 bf0080 b94000"
    "6689d8 66ab 66a1047e 66ab e2f3"  # fill: stosd ebx; stosd [errors]; loop
    "c706147e0080 b80043 e81200"  # packet.buffer = 8000; ax = 4300h (write); call disk
    "72ba"  # jc next: the number stays unacknowledged and is written again
    "66891e007e"  # [counter] = ebx
    "b486 31c9 bae803 cd15"  # wait 1000 µs
    "ebaa"  # jmp next
    # 7c7c disk: packet.sector = FIRST + (ebx mod SLOTS) * STRIDE; int 13h; carry and ++[errors] on failure
    "50 6689d8 6625ff070000 6669c081000000 6683c040 66a3187e 58"
    "8a16087e be107e 6653 cd13 665b 7306 66ff06047e f9 c3"
)


def boot_sector() -> bytes:
    """The first sector of a disk that runs the program."""
    return _PROGRAM.ljust(510, b"\0") + b"\x55\xaa"


def make_image(path: Path, image_format: str, qemu_img: str = "qemu-img", *options: str) -> Path:
    """Make a bootable image at `path`; `options` go to the conversion (such as -o cluster_size=…)."""
    if image_format == "raw":
        with open(path, "wb") as file:
            file.write(boot_sector())
            file.truncate(DISK_BYTES)
        return path
    with tempfile.TemporaryDirectory(prefix="lockfs-guest-") as scratch:
        raw = make_image(Path(scratch) / "boot.raw", "raw")
        subprocess.run(
            [qemu_img, "convert", "-q", "-f", "raw", "-O", image_format, *options, str(raw), str(path)],
            check=True, timeout=60,
        )  # fmt: skip
    return path


@dataclass(frozen=True)
class Record:
    """What an image shows: the highest number, the error count it carries, and every fault found."""

    last: int
    errors: int
    faults: tuple[str, ...]


def read_record(path: Path, image_format: str, qemu_img: str = "qemu-img") -> Record:
    """Read an image, with its backing chain, that nobody writes any more."""
    if image_format == "raw":
        return _read_raw(path)
    with tempfile.TemporaryDirectory(prefix="lockfs-guest-") as scratch:
        raw = Path(scratch) / "flat.raw"
        subprocess.run(
            [qemu_img, "convert", "-q", "-f", image_format, "-O", "raw", str(path), str(raw)],
            check=True, timeout=120,
        )  # fmt: skip
        return _read_raw(raw)


def _read_raw(path: Path) -> Record:
    fd = os.open(path, os.O_RDONLY)
    try:
        slots = [os.pread(fd, SECTOR, (FIRST + slot * STRIDE) * SECTOR) for slot in range(SLOTS)]
    finally:
        os.close(fd)
    faults: list[str] = []
    values: list[int] = []
    errors = 0
    for slot, data in enumerate(slots):
        number, failed = struct.unpack_from("<II", data)
        values.append(number)
        errors = max(errors, failed)
        if data != struct.pack("<II", number, failed) * (SECTOR // 8):
            faults.append(f"slot {slot} is torn: starts with {number}")
    last = max(values)
    for slot, number in enumerate(values):
        youngest = last - (last - slot) % SLOTS
        if number != max(youngest, 0):
            faults.append(f"slot {slot} holds {number}, must hold {max(youngest, 0)}")
    return Record(last, errors, tuple(faults))


def check(record: Record, acknowledged: int) -> None:
    """Raise AssertionError unless the image shows an unbroken sequence up to `acknowledged`."""
    assert not record.faults, f"{len(record.faults)} faults up to {record.last}: {record.faults[:5]}"
    assert record.errors == 0, f"the guest counted {record.errors} errors"
    assert acknowledged <= record.last <= acknowledged + 1, (
        f"the guest was told that {acknowledged} is written, the image ends with {record.last}"
    )
