"""Seeds that once failed, and what they showed. Each is run with every test run.

A seed means what it means only as long as the draws before the failure stay the same: whoever changes the fault
model finds the same faults again among the other seeds, and may empty this list.
"""

from __future__ import annotations

REGRESSIONS: dict[int, str] = {
    907: "a late commit for another host put the leader back by versions: no ballot could be won any more",
    918: "the same, and versions were used a second time",
    1138: "the same, with all hosts alive and the ballot numbers running away",
}
