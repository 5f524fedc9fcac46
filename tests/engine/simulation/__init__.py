"""A seeded, deterministic simulation: several hosts run the real engine over one faulty disk.

`faults` states what may go wrong, `scheduler` and `machine` drive the engine's coroutines by hand, `storage`
is the disk, `program` what a host does with its leases, `witness` what must never be seen, `run` one seed
from beginning to end, `variants` engines with a step left out, each of which the witness must catch."""
