"""How decisions are recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """Those with a `help` are settings of `[plugins.audit]` in ww.toml.

    Attributes:
        interval_s: Seconds between two fsyncs.
        checkpoint_records: Records between two signed checkpoints.
    """

    fsync: Literal["batch", "interval", "never"] = field(
        default="batch",
        metadata={
            "help": 'When records reach the disk. "batch": what has to be recorded first waits '
            "until it is there, together with what waits at the same time; the rest within a "
            'second. "interval": nothing waits, and all is there within a second. "never": when '
            "the system sees fit."
        },
    )
    on_full: Literal["fail_closed", "continue"] = field(
        default="fail_closed",
        metadata={
            "help": 'What happens while the log cannot be written. "fail_closed": logins, openings '
            'and grants are refused. "continue": they go on, and are counted in a record of the '
            "gap. Denials and revocations take effect in any case."
        },
    )
    file_bytes_max: int = field(
        default=64 << 20,
        metadata={
            "help": "A file's size, beyond which the next one is begun.",
            "min": 1 << 16,
            "max": 1 << 40,
        },
    )
    files_max: int = field(default=0, metadata={"help": "Files that are kept; 0: all."})
    checkpoint_s: float = field(
        default=60.0,
        metadata={
            "help": "Between two signed checkpoints, if there are records.",
            "min": 0.1,
            "max": 86_400,
        },
    )
    interval_s: float = 1.0
    checkpoint_records: int = 1000
