"""`[plugins.audit]`: how decisions are recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """How decisions are recorded.

    Attributes:
        fsync: "batch": what has to be recorded first waits until it is on the disk, together with
            what waits at the same time; the rest within `interval_s`. "interval": nothing waits,
            and all is on the disk within `interval_s`. "never": when the system sees fit.
        interval_s: See `fsync`.
        on_full: What happens while the log cannot be written. "fail_closed": logins, openings and
            grants are refused. "continue": they go on, and are counted in a record of the gap.
            Denials and revocations take effect in any case.
        file_bytes_max: A file's size, beyond which the next one is begun.
        files_max: Files that are kept; 0: all.
        checkpoint_records: Records between two signed checkpoints.
        checkpoint_s: Seconds between two, if there are records.
    """

    fsync: Literal["batch", "interval", "never"] = field(
        default="batch", metadata={"help": "When records reach the disk: batch, interval, never."}
    )
    interval_s: float = field(
        default=1.0, metadata={"help": "Seconds between two fsyncs.", "min": 0.05, "max": 3600}
    )
    on_full: Literal["fail_closed", "continue"] = field(
        default="fail_closed",
        metadata={"help": "While the log cannot be written: fail_closed or continue."},
    )
    file_bytes_max: int = field(
        default=64 << 20,
        metadata={"help": "Bytes of one file.", "min": 1 << 16, "max": 1 << 40},
    )
    files_max: int = field(
        default=0, metadata={"help": "Files that are kept; 0 is all.", "min": 0, "max": 1 << 20}
    )
    checkpoint_records: int = field(
        default=1000,
        metadata={"help": "Records between two checkpoints.", "min": 1, "max": 1 << 30},
    )
    checkpoint_s: float = field(
        default=60.0,
        metadata={"help": "Seconds between two checkpoints.", "min": 0.1, "max": 86_400},
    )
