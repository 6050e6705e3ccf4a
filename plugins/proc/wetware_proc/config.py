"""What an operator sets."""

from __future__ import annotations

from dataclasses import dataclass

from wetware.hookspecs import setting


@dataclass(frozen=True, slots=True)
class ProcConfig:
    """Processes of the cluster: `[plugins.proc]` of ww.toml."""

    memory_bytes_max: int = setting(
        4 << 30,
        "Memory that all processes of this node may have together: each counts for its limit, "
        "whether it uses that or not.",
        min=64 << 20,
    )
    owner_memory_bytes_max: int = setting(2 << 30, "The same, of one principal.", min=64 << 20)
    dirs_bytes_max: int = setting(
        4 << 30,
        "Disk for directories that processes read, kept for the next one; half of it is what the "
        "processes of one principal may have at a time.",
        min=64 << 20,
    )
    native: bool = setting(
        False,
        "Offer the service `native`: programs of this machine, in namespaces of their own (Linux). "
        "Only whom a role gives it can use it; `ww doctor` says what can be limited here.",
    )
    owner_processes_max: int = setting(
        1024, "Processes of one principal that run at this node.", min=1, max=10_000
    )
