"""What an operator sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from wetware.errors import InvalidArgument
from wetware.hookspecs import setting
from wetware.identity import PeerId

ENGINES: Final = ("embedded", "etcd")


def _check_peer(value: str) -> None:
    if value:
        PeerId.parse(value)


def _check_peers(values: tuple[str, ...]) -> None:
    for value in values:
        PeerId.parse(value)


def _check_engine(value: str) -> None:
    if value not in ENGINES:
        raise InvalidArgument(f"an engine is one of {', '.join(ENGINES)}, not {value!r}")


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
    engine: str = setting(
        "embedded",
        "`embedded`: the store is at one node. `etcd`: it is in a cluster of etcd of your own, and "
        "`entrances` says who speaks to that. The same at every node.",
        check=_check_engine,
    )
    entrances: tuple[str, ...] = setting(
        (),
        'With `engine = "etcd"`: the peer IDs of the nodes that speak to etcd, where users log in '
        "for the store; the same at every node.",
        check=_check_peers,
    )
    endpoints: tuple[str, ...] = setting(
        (), "At an entrance: HOST:PORT of each member of etcd, the nearest one first."
    )
    ca: str = setting(
        "", "File of the certificates (PEM) that etcd's are signed by; without it no TLS is used."
    )
    cert: str = setting("", "File of the certificate (PEM) that this node shows to etcd.")
    key: str = setting("", "File of the key (PEM) of `cert`, which only its owner may read.")
    user: str = setting("", "The user of etcd that this node is, where etcd knows users.")
    password_file: str = setting(
        "", "File of that user's password, which only its owner may read (0600)."
    )
