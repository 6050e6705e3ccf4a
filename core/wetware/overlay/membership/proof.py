"""What a node's answer about another one is worth: only what that one signed, and was certified.

A client asks a node where another one is, and logs in there. It believes what the other node signed
(its name, host, labels, addresses) and what the cluster's key, or an inviter of it, certified: that
it is a member, and its labels. That it is alive, and that there is no better match, is the word of
the node that was asked; so is that it was not evicted, until its certificate ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from wetware.base import cbor
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.statements import STATEMENT_BYTES_MAX, Chain, Founding, refusal
from wetware.overlay.membership.record import Record
from wetware.overlay.membership.selector import Selector

if TYPE_CHECKING:
    from wetware.member import Member

AGE_S_MAX: Final = 86_400.0
"""Of a record: nodes sign anew every 20 minutes, unless their cluster is configured otherwise."""
_FOUNDING_BYTES_MAX: Final = STATEMENT_BYTES_MAX + 256


def encode_founding(founding: Founding) -> bytes:
    return cbor.encode(founding.plain())


def prove(
    record: bytes, founding: bytes, *, cluster: str, selector: str, state: str, now_s: float
) -> Member:
    """The member that a node answered with, in the words that are signed, without asking anybody.

    Args:
        record: The member's record, as it signed it.
        founding: What names the cluster.
        cluster: The ID of the cluster that the member has to be of.
        selector: What was asked for; the signed record has to match it.
        state: What the node says of the member's life.
        now_s: Unix time, by this machine's clock.

    Raises InvalidArgument for bytes that are no record or not signed by the member, and
    AdmissionRefused for all else that does not hold.
    """
    if not record:
        raise refusal(
            "unproven",
            "the node answered without what the member signed",
            "upgrade wetware on that node, or name the member by its peer ID",
        )
    origin = Founding.from_plain(cbor.decode(founding, bytes_max=_FOUNDING_BYTES_MAX))
    if origin.cluster_id != cluster:
        raise refusal(
            "cluster",
            f"the node answered with a member of cluster {origin.cluster_id[:12]}…, not of "
            f"{cluster[:12]}…",
        )
    signed = Record.open(record)
    chain = Chain.open(signed.chain, origin)
    signed.check_chain(chain)
    chain.judge_time(now_s * 1000, AdmissionLimits().clock_skew_s_max * 1000)
    if abs(now_s - signed.issued_ms / 1000) > AGE_S_MAX:
        raise refusal(
            "stale",
            f"what {signed.peer} says of itself was signed "
            f"{(now_s - signed.issued_ms / 1000) / 3600:.0f} h ago",
            "compare the clocks of this machine and of the nodes: `ww doctor`",
        )
    proven = signed.describe(state=state, labels=chain.labels)
    if signed.left or not Selector.parse(selector).matches(proven):
        raise refusal(
            "not_meant",
            f"the node answered with {signed.name or 'a member'} {signed.peer}, which by its own "
            f"signature is not meant by {selector!r}",
        )
    return proven
