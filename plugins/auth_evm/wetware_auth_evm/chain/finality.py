"""When a block of a chain is final, how often to look, and how old what is known may be.

A profile per chain that is known to work, each number with its reason. A chain that has no profile
needs its numbers in the config: guessing when a block is final would guess who is let in.
Imports nothing heavy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal
from urllib.parse import urlsplit

from wetware_auth_evm.chain.errors import BadSettings

DEV: Final = "dev"


@dataclass(frozen=True, slots=True)
class Finality:
    """When a block is final.

    Attributes:
        kind: "finalized": the chain says it (the block tag). "depth": so many blocks later.
            "latest": at once, for chains of one's own.
        depth: For "depth", at least 1.
    """

    kind: Literal["finalized", "depth", "latest"]
    depth: int = 0

    def __post_init__(self) -> None:
        if (self.kind == "depth") != (self.depth > 0):
            raise BadSettings(
                f"finality {self.kind!r} with a depth of {self.depth} blocks",
                hint='write "finalized", or "depth:64" with a number of your own',
            )

    @classmethod
    def parse(cls, text: str) -> Finality:
        """From "finalized", "latest" or "depth:N"; raises ConfigError."""
        kind, colon, number = text.partition(":")
        if kind == "depth" and number.isascii() and number.isdigit() and len(number) <= 9:
            return cls("depth", int(number))
        if not colon and kind in ("finalized", "latest"):
            return cls("finalized" if kind == "finalized" else "latest")
        raise BadSettings(
            f"finality {text[:40]!r} is not known",
            hint='write "finalized", "depth:64" with a number of your own, or "latest"',
        )

    def __str__(self) -> str:
        return f"depth:{self.depth}" if self.kind == "depth" else self.kind


@dataclass(frozen=True, slots=True)
class Bounds:
    """How old what is known may be. Beyond them nothing is allowed.

    Attributes:
        verified_s_max: Since a block was last verified.
        tip_age_s_max: Of the newest block, by its own time stamp; None: it may be any age, for
            chains that make a block only when there is something to put into it.
        tip_ahead_s_max: How far the newest block's time stamp may lie in the node's future: more
            says that the node's clock is slow, and rights would outlive their expiry. None: any.
    """

    verified_s_max: float
    tip_age_s_max: float | None
    tip_ahead_s_max: float | None = 60.0


@dataclass(frozen=True, slots=True)
class ChainProfile:
    """What is known of a chain.

    Attributes:
        name: In the config, `finality = NAME`.
        chain_id: EIP-155; 0: any.
        finality: When a block is final.
        poll_s: Between two looks at the newest block: how late a withdrawal is seen.
        final_poll_s: Between two looks at the newest final block: how late a grant begins, after
            its minutes of waiting for finality. Longer than `poll_s` where blocks come fast,
            because each look costs each endpoint three requests.
        bounds: On the age of what is known.
        production: Whether it is for more than try-outs: endpoints of others, a quorum.
        why: The reasons of its numbers.
    """

    name: str
    chain_id: int
    finality: Finality
    poll_s: float
    final_poll_s: float
    bounds: Bounds
    production: bool
    why: str


_FINALIZED: Final = Finality("finalized")
_BASE: Final = ChainProfile(
    name="base",
    chain_id=8453,
    finality=_FINALIZED,
    poll_s=2.0,
    final_poll_s=30.0,
    bounds=Bounds(verified_s_max=60.0, tip_age_s_max=60.0),
    production=True,
    why="A block every 2 s, empty or not: 30 missing ones are an outage of the sequencer, in "
    "which nothing can be revoked either. Final is what L1 has finalized with the batches, 15 "
    "to 30 min later; half a minute for the look adds nothing that matters.",
)
_PROFILES: Final = (
    ChainProfile(
        name="mainnet",
        chain_id=1,
        finality=_FINALIZED,
        poll_s=4.0,
        final_poll_s=12.0,
        bounds=Bounds(verified_s_max=60.0, tip_age_s_max=120.0),
        production=True,
        why="A slot takes 12 s: a third of it for the poll, one for the look at finality, which "
        "moves every 32 slots and lies 2 to 3 epochs (13 to 19 min) behind. 10 slots in a row "
        "without a block do not happen by chance at the usual 1 % of missed ones: 120 s. 60 s "
        "without a verified block are 15 looks that failed.",
    ),
    ChainProfile(
        name="sepolia",
        chain_id=11155111,
        finality=_FINALIZED,
        poll_s=4.0,
        final_poll_s=12.0,
        bounds=Bounds(verified_s_max=60.0, tip_age_s_max=300.0),
        production=True,
        why="As mainnet; but a test network misses far more slots, so 25 of them are borne.",
    ),
    _BASE,
    replace(
        _BASE,
        name="optimism",
        chain_id=10,
        why="As base: the same software, a block every 2 s, empty or not; final is what L1 has "
        "finalized with the batches.",
    ),
    replace(
        _BASE,
        name="arbitrum",
        chain_id=42161,
        why="Blocks come up to 4 a second, but only with transactions: on this chain a minute "
        "without any is an outage of the sequencer. The poll is for the sake of the endpoints. "
        "Final is what L1 has finalized, 15 to 30 min later.",
    ),
    ChainProfile(
        name="gnosis",
        chain_id=100,
        finality=_FINALIZED,
        poll_s=2.0,
        final_poll_s=10.0,
        bounds=Bounds(verified_s_max=60.0, tip_age_s_max=120.0),
        production=True,
        why="A slot takes 5 s, an epoch 16 slots, final after 2 to 3 epochs (3 to 4 min). Its "
        "validators miss more slots than mainnet's: 24 of them are borne.",
    ),
    ChainProfile(
        name="polygon",
        chain_id=137,
        finality=_FINALIZED,
        poll_s=2.0,
        final_poll_s=6.0,
        bounds=Bounds(verified_s_max=60.0, tip_age_s_max=60.0),
        production=True,
        why="A block every 2 s; `finalized` is the last milestone that validators voted for, some "
        "seconds behind. No depth instead: reorganisations of more than 100 blocks happened before "
        "there were milestones. Where milestones stop, grants wait and withdrawals go on acting.",
    ),
    ChainProfile(
        name=DEV,
        chain_id=0,
        finality=Finality("latest"),
        poll_s=0.25,
        final_poll_s=0.0,
        bounds=Bounds(verified_s_max=15.0, tip_age_s_max=None, tip_ahead_s_max=None),
        production=False,
        why="A chain on this machine, made for a try-out: nobody else writes it, so its newest "
        "block is final. It mines on demand, so a block may be of any age, and tests move its "
        "clock. 15 s bear a restart of it.",
    ),
)
PROFILES: Final[Mapping[str, ChainProfile]] = MappingProxyType({p.name: p for p in _PROFILES})


def for_chain(chain_id: int) -> ChainProfile | None:
    """The profile of a chain; None: it has none, and its numbers have to be in the config."""
    return next((p for p in _PROFILES if p.chain_id == chain_id and p.chain_id), None)


def by_name(name: str) -> ChainProfile:
    """A profile; raises ConfigError, which lists them."""
    try:
        return PROFILES[name]
    except KeyError:
        raise BadSettings(
            f"there is no finality profile {name[:40]!r}",
            hint=f"one of: {', '.join(PROFILES)}",
        ) from None


def quorum_default(endpoints: int) -> int:
    """How many of so many endpoints have to agree where the config does not say: a majority."""
    return endpoints // 2 + 1


def is_endpoint(url: str) -> bool:
    """Whether a text is an http or https URL; nobody is asked."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(good) and url.isprintable() and " " not in url


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine, by its text alone: no name is looked up."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_try_out(finality: Finality, chain_id: int, urls: Iterable[str]) -> None:
    """Refuse "latest" where it is not safe: it takes a chain of one's own on this machine.

    Raises ConfigError for a chain with a profile of its own, or an endpoint elsewhere.
    """
    if finality.kind != "latest":
        return
    known = for_chain(chain_id)
    if known is not None:
        raise BadSettings(
            f'finality "latest" on {known.name}: a grant that a reorganisation takes back would '
            "have let somebody in",
            hint=f'set [plugins.auth_evm] finality = "{known.name}", or leave it out',
        )
    if not all(is_loopback(url) for url in urls):
        raise BadSettings(
            'finality "latest" with an endpoint that is not on this machine: it is for try-outs',
            hint='set [plugins.auth_evm] finality = "finalized" or "depth:N" for this chain',
        )
