"""Lease backends: where a lease is taken so that other hosts see it."""
