"""This node's clock beside those of the other members."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from wetware.base.log import get_logger
from wetware.broker.clock import NOT_YET

if TYPE_CHECKING:
    from wetware.broker.broker import Broker
    from wetware.identity import PeerId
    from wetware.overlay.membership.service import Membership

log = get_logger("node")

CLOCK_LOOK_S = 2.0
"""Between two looks at this clock and the others'."""
CLOCK_MEET_S = 0.1
"""The same while none was compared: grants with an end wait for it."""


def judge_clock(membership: Membership, broker: Broker) -> None:
    """Have the broker judge this node's clock by those of the other members, as known now."""
    broker.judge_clock(membership.clock_offset_s, alone=not membership.knows_others)


async def watch_clock(
    membership: Membership, broker: Broker, *, own: PeerId, bound_s: float
) -> None:
    """Say when this node's clock is not that of the others, and refuse what depends on it.

    Certificates and the ends of grants are judged by it.
    """
    said: set[PeerId] = set()  # whose clock the log calls wrong
    while True:
        judge_clock(membership, broker)
        offset_s = membership.clock_offset_s
        wrong = {
            peer: ahead_s
            for peer, ahead_s in membership.swim.clock_offsets_s.items()
            if abs(ahead_s) > bound_s
        }
        if offset_s is not None and abs(offset_s) > bound_s:
            wrong[own] = offset_s
        for peer in wrong.keys() - said:
            if peer == own:
                log.warning(
                    "clock.skewed",
                    others_ahead_s=round(wrong[own], 1),
                    bound_s=bound_s,
                    hint="set the clock, e.g. with NTP: certificates are judged by it",
                )
            else:
                log.warning("member.clock_skewed", peer=peer, ahead_s=round(wrong[peer], 1))
        if own in said and own not in wrong:
            log.info("clock.right")
        said = set(wrong)
        early = broker.tree.clock_wrong == NOT_YET
        await asyncio.sleep(CLOCK_MEET_S if early else CLOCK_LOOK_S)
