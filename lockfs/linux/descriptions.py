"""Whether two descriptors are one open file description (kcmp(2))."""

from __future__ import annotations

import ctypes
import os

_SYS_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272}
_KCMP_FILE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def are_one(first: int, second: int) -> bool:
    """Whether two open descriptors of this process share one description; False if that is not known."""
    number = _SYS_KCMP.get(os.uname().machine)
    if first == second or number is None:
        return first == second
    pid = ctypes.c_long(os.getpid())
    arguments = (ctypes.c_long(first), ctypes.c_long(second))
    return int(_libc.syscall(ctypes.c_long(number), pid, pid, ctypes.c_long(_KCMP_FILE), *arguments)) == 0
