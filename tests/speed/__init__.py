"""Measures lockfs against the bare directory and its peers; started by scripts/bench."""
