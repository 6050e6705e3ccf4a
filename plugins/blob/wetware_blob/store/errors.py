"""What the store refuses, and why."""

from __future__ import annotations

from wetware.errors import WetwareError


class StoreFailed(WetwareError):
    """The disk refused: what was to be written is not in the store."""

    code = "blob.store"


class DiskFull(StoreFailed):
    """The file system has no room."""

    code = "blob.disk_full"


class Damaged(WetwareError):
    """What is on the disk is not what was written; it is never given out."""

    code = "blob.damaged"
