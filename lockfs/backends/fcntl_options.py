"""What an administrator decides about locks of files; without the backend, which needs trio."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FcntlOptions:
    """Whom the backend keeps out besides other lockfs hosts, which it always does.

    `virtlockd`: hosts whose virtlockd locks the image itself. `qemu`: QEMU run without lockfs. `lock_dir`:
    the shared lockspace directory of virtlockd's indirect mode, and `lock_path` the store's path as those
    hosts write it in their domain XML, byte for byte.
    """

    virtlockd: bool = True
    qemu: bool = True
    lock_dir: str | None = None
    lock_path: str | None = None
