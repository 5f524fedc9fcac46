"""Thin typed wrappers around Linux system calls and /proc that Python's os module lacks."""
