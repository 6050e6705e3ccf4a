"""How a node becomes a member: it shows a ticket, or a certificate made for it beforehand."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wetware.base.log import get_logger
from wetware.base.texts import ADDRS_MAX, parse_addrs
from wetware.errors import AdmissionRefused, InvalidArgument, OverlayError
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.service import JOIN_FRAME_BYTES_MAX, exchange_join
from wetware.overlay.admission.statements import CHAIN_BYTES_MAX, Chain, Founding, refusal
from wetware.overlay.admission.store import DOCUMENT_BYTES_MAX, Store
from wetware.overlay.admission.texts import Bundle, Ticket
from wetware.overlay.frames import field

if TYPE_CHECKING:
    from pathlib import Path

    from wetware.base.clock import Clock
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import Key, PeerId
    from wetware.overlay.link import Connection, LinkHost

log = get_logger("admission.joining")


@dataclass(frozen=True, slots=True)
class Joined:
    """What a node got when it joined; written to its data directory.

    Attributes:
        founding: Of the cluster.
        chain: The node's certificate.
        document: What the backend starts from (`PluginContext.join_document`).
        addrs: Where members can be reached.
    """

    founding: Founding
    chain: Chain
    document: bytes
    addrs: tuple[Multiaddr, ...]


async def join(
    host: LinkHost,
    invitation: Ticket | Bundle,
    *,
    key: Key,
    data_dir: Path,
    clock: Clock,
    limits: AdmissionLimits | None = None,
) -> Joined:
    """Join a cluster, and keep what makes this node a member of it.

    Repeating it with the same ticket and key is harmless, should the answer have got lost.

    Args:
        host: Dials; need not listen.
        invitation: See `texts.parse_join`.
        key: The node's.
        data_dir: Exists, and is this process's alone.
        clock: Judges what comes back.
        limits: See AdmissionLimits.

    Raises ConfigError if the node belongs to another cluster or the disk fails, AdmissionRefused
    as the issuer said it, OverlayError where nobody can be reached.
    """
    limits = limits or AdmissionLimits()
    store = Store.open(data_dir)
    store.check_same_cluster(invitation.founding)
    if isinstance(invitation, Bundle) and invitation.chain.peer != key.peer_id:
        raise refusal(
            "wrong_peer",
            f"the certificate is of {invitation.chain.peer}, and this node is {key.peer_id}",
            "`ww invite --peer` takes the peer ID that `ww id` prints at this node",
        )
    connection = await _dial(host, invitation, limits)
    message = (
        {"v": 1, "secret": invitation.secret}
        if isinstance(invitation, Ticket)
        else {"v": 1, "chain": invitation.chain.encoded}
    )
    answer = await exchange_join(
        connection, message, bytes_max=JOIN_FRAME_BYTES_MAX, timeout_s=limits.join_s
    )
    joined = _check(answer, invitation, connection, key, clock, limits)
    await asyncio.to_thread(
        store.join, joined.founding, joined.chain.encoded, joined.document, joined.addrs
    )
    log.info("cluster.joined", cluster=joined.founding.cluster_id, through=connection.peer)
    return joined


def _check(
    answer: dict[str, object],
    invitation: Ticket | Bundle,
    connection: Connection,
    key: Key,
    clock: Clock,
    limits: AdmissionLimits,
) -> Joined:
    """Believe nothing that the invitation does not vouch for."""
    try:
        founding = Founding.from_plain(answer.get("founding"))
        chain = Chain.open(field(answer, "chain", bytes_max=CHAIN_BYTES_MAX), invitation.founding)
        document = field(answer, "document", bytes_max=DOCUMENT_BYTES_MAX)
        found = parse_addrs(answer.get("addrs"))
    except InvalidArgument as exc:
        raise OverlayError(f"{connection.peer} sent {exc.message}") from None
    if founding != invitation.founding:
        raise refusal("cluster", "the node that answered belongs to another cluster")
    if chain.peer != key.peer_id:
        raise refusal("wrong_peer", "the issuer sent somebody else's certificate")
    try:
        chain.judge_time(clock.time() * 1000, limits.clock_skew_s_max * 1000)
    except AdmissionRefused as exc:  # it was signed a moment ago, or should have been
        hint = "compare the clocks of both machines; `timedatectl` shows this one"
        raise AdmissionRefused(exc.message, hint=hint, code=exc.code) from None
    # The address that worked first: it is where this node can renew.
    reached = connection.remote.with_peer(connection.peer)
    addrs = dict.fromkeys([reached, *(addr for addr in found if addr.peer is not None)])
    addrs |= dict.fromkeys(addr for addr in invitation.addrs if addr.peer is not None)
    return Joined(founding, chain, document, tuple(addrs)[:ADDRS_MAX])


async def _dial(host: LinkHost, invitation: Ticket | Bundle, limits: AdmissionLimits) -> Connection:
    """A connection to the issuer of a ticket, or to any member that a bundle names."""
    if isinstance(invitation, Ticket):
        return await host.dial(invitation.addrs, peer=invitation.issuer, timeout_s=limits.join_s)
    peers: dict[PeerId, list[Multiaddr]] = {}
    for addr in invitation.addrs:
        if addr.peer is not None:
            peers.setdefault(addr.peer, []).append(addr)
    error = OverlayError(
        "the bundle names no node of the cluster",
        hint="make it again with `ww invite --peer` at a node that can be reached",
    )
    for peer, addrs in peers.items():
        try:
            return await host.dial(addrs, peer=peer, timeout_s=limits.exchange_s)
        except OverlayError as exc:
            error = exc
    raise error
