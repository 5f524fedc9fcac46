"""The lease engine: delta leases for the liveness of hosts, Disk Paxos for who owns what, as sanlock has
them.

It knows no file, thread, socket or clock: it is given a `Disk` and a `Clock` (seams.py), and is run as well
on O_DIRECT storage as in a deterministic simulation.
"""
