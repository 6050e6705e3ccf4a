"""How a node becomes a member: it shows a ticket, or a certificate made for it beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.base.log import get_logger
from wetware.base.texts import ADDRS_MAX, parse_addrs
from wetware.errors import AdmissionRefused, InvalidArgument, OverlayError
from wetware.overlay.admission.exchange import JOIN_FRAME_BYTES_MAX, ask_to_join
from wetware.overlay.admission.statements import CHAIN_BYTES_MAX, Chain, Founding, refusal
from wetware.overlay.admission.store import DOCUMENT_BYTES_MAX, Store
from wetware.overlay.admission.texts import Bundle, Ticket
from wetware.overlay.frames import field

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import Key, PeerId
    from wetware.overlay.admission.limits import AdmissionLimits
    from wetware.overlay.link import Connection, LinkHost

log = get_logger("admission.joining")


async def join(
    host: LinkHost,
    invitation: Ticket | Bundle,
    store: Store,
    *,
    key: Key,
    clock: Clock,
    limits: AdmissionLimits,
) -> None:
    """Join a cluster, and keep in the store what makes this node a member of it.

    Repeating it with the same ticket and key is harmless, should the answer have got lost.

    Args:
        host: Dials; need not listen.
        invitation: See `texts.parse_join`.
        store: Of a node that belongs to no cluster, or to this one.
        key: The node's.
        clock: Judges what comes back.
        limits: See AdmissionLimits.

    Raises ConfigError if the node belongs to another cluster or the disk fails, AdmissionRefused
    as the issuer said it, OverlayError where nobody can be reached.
    """
    founding = invitation.founding
    store.check_same_cluster(founding)
    if isinstance(invitation, Bundle):
        if invitation.chain.peer != key.peer_id:
            raise refusal(
                "wrong_peer",
                f"the certificate is of {invitation.chain.peer}, and this node is {key.peer_id}",
                "`ww invite --peer` takes the peer ID that `ww id` prints at this node",
            )
        connection = await _dial_any(host, invitation.addrs, limits.exchange_s)
        shown = {"chain": invitation.chain.encoded}
    else:
        connection = await host.dial(
            invitation.addrs, peer=invitation.issuer, timeout_s=limits.join_s
        )
        shown = {"secret": invitation.secret}
    answer = await ask_to_join(
        connection, shown, bytes_max=JOIN_FRAME_BYTES_MAX, timeout_s=limits.join_s
    )
    # Nothing is believed that the invitation does not vouch for.
    try:
        answered = Founding.from_plain(answer.get("founding"))
        chain = Chain.open(field(answer, "chain", bytes_max=CHAIN_BYTES_MAX), founding)
        document = field(answer, "document", bytes_max=DOCUMENT_BYTES_MAX)
        found = parse_addrs(answer.get("addrs"))
    except InvalidArgument as exc:
        raise OverlayError(f"{connection.peer} sent {exc.message}") from None
    if answered != founding:
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
    named = (addr for addr in (*found, *invitation.addrs) if addr.peer is not None)
    addrs = tuple(dict.fromkeys((reached, *named)))[:ADDRS_MAX]
    await store.files.threads.run(store.join, founding, chain.encoded, document, addrs)
    log.info("cluster.joined", cluster=founding.cluster_id, through=connection.peer)


async def _dial_any(host: LinkHost, addrs: tuple[Multiaddr, ...], timeout_s: float) -> Connection:
    """A connection to any of the nodes that the addresses name; raises OverlayError."""
    peers: dict[PeerId, list[Multiaddr]] = {}
    for addr in addrs:
        if addr.peer is not None:
            peers.setdefault(addr.peer, []).append(addr)
    error = OverlayError(
        "the bundle names no node of the cluster",
        hint="make it again with `ww invite --peer` at a node that can be reached",
    )
    for peer, its in peers.items():
        try:
            return await host.dial(its, peer=peer, timeout_s=timeout_s)
        except OverlayError as exc:
            error = exc
    raise error
