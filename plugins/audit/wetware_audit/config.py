"""The settings of the log, and its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wetware.hookspecs import setting


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """How decisions are recorded.

    What `setting` makes is in `[plugins.audit]` of ww.toml.

    Attributes:
        interval_s: Seconds between two fsyncs.
        checkpoint_records: Records between two signed checkpoints.
    """

    fsync: Literal["batch", "interval", "never"] = setting(
        "batch",
        'When records reach the disk. "batch": what has to be recorded first waits until it is '
        'there, together with what waits at the same time; the rest within a second. "interval": '
        'nothing waits, and all is there within a second. "never": when the system sees fit.',
    )
    on_full: Literal["fail_closed", "continue"] = setting(
        "fail_closed",
        'What happens while the log cannot be written. "fail_closed": logins, openings and grants '
        'are refused. "continue": they go on, and are counted in a record of the gap. Denials and '
        "revocations take effect in any case.",
    )
    file_bytes_max: int = setting(
        64 << 20, "A file's size, beyond which the next one is begun.", min=1 << 16, max=1 << 40
    )
    files_max: int = setting(0, "Files that are kept; 0: all.")
    checkpoint_s: float = setting(
        60.0, "Between two signed checkpoints, if there are records.", min=0.1, max=86_400
    )
    interval_s: float = 1.0
    checkpoint_records: int = 1000
