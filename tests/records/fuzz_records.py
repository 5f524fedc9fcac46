"""A fuzz target for atheris: any bytes in any sector are decoded, and accepted or refused, nothing else.

By hand, for as long as wanted, with what was found interesting kept in a directory:

    python -m tests.records.fuzz_records -max_total_time=600 DIRECTORY

Starts from the sectors of the vectors; libFuzzer's options apply (-runs=, -seed=, -max_len=).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lockfs.records"]):
    from tests.records.loading import NAMES, load
    from tests.records.probing import probe

SECTOR = 512


def one(data: bytes) -> None:
    """The bytes as a sector."""
    probe(data[:SECTOR].ljust(SECTOR, b"\0"))


def write_seeds(folder: Path) -> None:
    """One file for each different sector of the vectors, its first 512 bytes."""
    for name in NAMES:
        vector = load(name)
        for number in range(len(vector.kept) // vector.sector_size):
            (folder / f"{name}-{number}").write_bytes(vector.sector(number)[:SECTOR])


def main() -> None:
    """Fuzz until libFuzzer's options say to stop; exits with its code.

    libFuzzer ends its process itself, so that a directory made for the run is removed by a process around it.
    """
    options = sys.argv[1:]
    if all(option.startswith("-") for option in options):
        with tempfile.TemporaryDirectory() as folder:
            again = [sys.executable, "-m", "tests.records.fuzz_records", *options, folder]
            sys.exit(subprocess.run(again, check=False).returncode)
    write_seeds(Path(next(option for option in options if not option.startswith("-"))))
    atheris.Setup([sys.argv[0], *options, f"-max_len={SECTOR}"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
