"""Tests of the lease backends: one conformance suite for all, opponents, and what each has of its own."""
