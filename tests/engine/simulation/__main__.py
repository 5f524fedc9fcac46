"""`python -m tests.engine.simulation SEED [SEED..] [-v]`: run seeds again, with every event if asked."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from tests.engine.simulation.run import STEPS, World, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.simulation")
    parser.add_argument("seeds", metavar="SEED", nargs="+", help="a number, or FIRST-LAST")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every event")
    parser.add_argument("--halts", action="store_true", help="hosts stand still together with their clocks")
    parser.add_argument("--successors", action="store_true", help="processes are killed and others go on")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--trace", action="store_true", help="print the trace hash of each seed")
    options = parser.parse_args()
    make = partial(World, halts=options.halts, successors=options.successors)
    failed = 0
    for words in options.seeds:
        first, _, last = words.partition("-")
        for seed in range(int(first), int(last or first) + 1):
            outcome = simulate(seed, options.steps, print if options.verbose else None, make)
            failed += bool(outcome.violations)
            if options.trace:
                print(seed, outcome.trace)
            elif outcome.violations:
                print(outcome.violations[0] if options.verbose else outcome.story())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
