"""The family of processes that keeps a mount served whoever of it is killed: guardian, twin, worker, spare.

They share one descriptor table (docs/decisions/0012-one-descriptor-table.md) and one journal. Everything that
one of them must know of the others is a number in the journal's header, so that whoever takes another's place
goes on from there. Nothing here imports what serves: the guardian stays small.
"""
