"""What an operator sets."""

from __future__ import annotations

from dataclasses import dataclass

from wetware.hookspecs import setting
from wetware.identity import PeerId


def _check_peer(value: str) -> None:
    if value:
        PeerId.parse(value)


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """Keys, locks and names of the cluster: `[plugins.sync]` of ww.toml."""

    home: str = setting(
        "",
        "The peer ID of the node that has the store, the same at every node. What another node has "
        "stays there.",
        default_text="where the cluster was founded",
        check=_check_peer,
    )
