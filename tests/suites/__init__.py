"""Whole suites of file-system tests, run on every data mode."""
