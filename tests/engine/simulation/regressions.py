"""Seeds that once failed, and what they showed. Each is run with every test run.

A seed means what it means only as long as the draws before the failure stay the same: whoever changes the
fault model finds the same faults again among the other seeds, and may empty this list."""

from __future__ import annotations

REGRESSIONS: dict[int, str] = {
    93: "a late commit for another host put the leader back by versions, which were then used a second time",
    543: "the same",
    3616: "a join that stood still between look and write put back the generation of another",
    9290: "the same: the lease belonged to a generation yet to come of a living host",
    9327: "the same",
    1226: "an attempt that was cut short had dropped the mark that frees a lease put back by a late commit",
    8826: "the same: nobody got the lease any more",
}
