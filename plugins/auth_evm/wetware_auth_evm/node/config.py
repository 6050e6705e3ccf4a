"""`[plugins.auth_evm]`, and what follows from it: nothing weaker is ever assumed.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from wetware.errors import ConfigError, InvalidArgument
from wetware.hookspecs import setting
from wetware_auth_evm.chain import finality as finalities
from wetware_auth_evm.chain.errors import BadSettings
from wetware_auth_evm.node import roles as role_rules

if TYPE_CHECKING:
    from wetware_auth_evm.chain.finality import Bounds, ChainProfile, Finality

ENDPOINTS_MAX: Final = 16
ENDPOINTS_WANTED: Final = 3
"""Of different operators: with two that have to agree, one may fail or lie."""
SESSION_S_MAX: Final = 24 * 3600
SCOPE_DEFAULT: Final = "default"
SCOPE_BYTES_MAX: Final = 32
ROOT_NAME: Final = "ROOT"
"""No scope of a cluster: its records hold in every scope."""
TIMEOUT_S_DEFAULT: Final = 5.0
"""For one answer of an endpoint."""
CLOCK_SKEW_S_DEFAULT: Final = 30.0
"""By how much the clock of who signs a session may be ahead."""
WALLET_GAS_DEFAULT: Final = 500_000
RECHECK_S_DEFAULT: Final = 30.0
"""How often contract wallets are asked again whether they still hold good what they signed."""
DOCUMENT_BYTES_MAX: Final = 4096
_DAMAGED: Final = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
TRY_OUT_COMMAND: Final = "`ww node --auth evm --dev` tries it out on a local chain"


def _check_endpoints(values: tuple[str, ...]) -> None:
    if not 1 <= len(values) <= ENDPOINTS_MAX:
        raise InvalidArgument(f"{len(values)} endpoints; 1 to {ENDPOINTS_MAX} are possible")
    for number, url in enumerate(values, 1):
        if not finalities.is_endpoint(url):  # it may hold a key, and is not shown
            raise InvalidArgument(f"endpoint {number} is not an http:// or https:// URL")
    if len(set(values)) != len(values):
        raise InvalidArgument("an endpoint is named twice: it would vote twice")


def _check_contract(value: str) -> None:
    if not re.fullmatch(r"0x[0-9a-fA-F]{40}", value):
        raise InvalidArgument(f"{value[:60]!r} is not an address: 0x and 40 hex digits")


def _check_scope(value: str) -> None:
    if not 1 <= len(value.encode()) <= SCOPE_BYTES_MAX or not value.isprintable():
        raise InvalidArgument(f"a scope is a name of 1 to {SCOPE_BYTES_MAX} bytes")
    if value == ROOT_NAME:
        raise InvalidArgument(f"{ROOT_NAME} is what commands call the scope of all scopes")


def _check_hash(value: str) -> None:
    if not re.fullmatch(r"0x[0-9a-fA-F]{64}", value):
        raise InvalidArgument(f"{value[:80]!r} is not a block's hash: 0x and 64 hex digits")


def _check_finality(value: str) -> None:
    if value not in finalities.PROFILES:
        try:
            finalities.Finality.parse(value)
        except ConfigError as exc:
            names = ", ".join(finalities.PROFILES)
            raise InvalidArgument(exc.message, hint=f"{exc.hint}; or one of {names}") from None


@dataclass(frozen=True, slots=True)
class AuthEvmConfig:
    """Which contract decides, and how its chain is read.

    What `setting` makes is in `[plugins.auth_evm]` of ww.toml. What is 0 or empty here follows
    from the chain, or has to be set.
    """

    endpoints: tuple[str, ...] = setting(
        (),
        "JSON-RPC endpoints of the chain, http or https, of different operators: three or more. "
        "They may hold keys and are not shown.",
        check=_check_endpoints,
        secret=True,
    )
    chain_id: int = setting(
        0, "The chain's ID (EIP-155).", min=1, max=2**53 - 1, default_text="has to be set"
    )
    contract: str = setting(
        "",
        "Address of the contract WetwareACL; `ww auth evm deploy` makes one.",
        check=_check_contract,
        default_text="has to be set",
    )
    scope: str = setting(
        SCOPE_DEFAULT,
        "Name of this cluster's scope in the contract: one contract serves several clusters.",
        check=_check_scope,
    )
    genesis_hash: str = setting(
        "",
        "Hash of the chain's first block. Without it, the one that a quorum states at the first "
        "start is kept.",
        check=_check_hash,
        default_text="kept at the first start",
    )
    deployed_at: int = setting(
        0,
        "The block in which the contract was deployed, or an earlier one: where its history is "
        "read from at the first start.",
        max=2**53 - 1,
    )
    finality: str = setting(
        "",
        'When a block is final: "finalized" (the chain says it), "depth:N", or the name of a chain '
        "whose numbers to take. For a chain without a profile it has to be set.",
        check=_check_finality,
        default_text="the chain's profile",
    )
    quorum: int = setting(
        0,
        "How many endpoints have to agree. With fewer than three endpoints, or 1, a single "
        "operator can decide who is let in: then it has to be set, and is warned of.",
        min=1,
        max=ENDPOINTS_MAX,
        default_text="a majority: 2 of 3",
    )
    poll_s: float = setting(
        0.0,
        "Between two looks at the chain: how late a withdrawal is seen.",
        min=0.05,
        max=60,
        default_text="the chain's profile",
    )
    verified_s_max: float = setting(
        0.0,
        "Nothing is allowed once no block was verified for so long.",
        min=1,
        max=3600,
        default_text="the chain's profile",
    )
    tip_age_s_max: float = setting(
        0.0,
        "Nothing is allowed while the newest block is older, by its own time stamp.",
        min=1,
        max=86_400,
        default_text="the chain's profile",
    )
    session_s_max: int = setting(
        SESSION_S_MAX,
        "How long a session may last that a wallet signs.",
        min=60,
        max=SESSION_S_MAX,
    )
    wallet_gas_max: int = setting(
        WALLET_GAS_DEFAULT,
        "Gas that a contract wallet may use to judge a signature (ERC-1271). More than the default "
        "is for wallets with many owners.",
        min=50_000,
        max=5_000_000,
    )
    roles: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata={
            "help": "What each role of the contract allows on this node: `services`, `where` and "
            "`bits` in `[plugins.auth_evm.roles.NAME]`. A role that is not here allows nothing.",
            "check": role_rules.check,
        },
    )
    timeout_s: float = setting(TIMEOUT_S_DEFAULT, "For one answer of an endpoint.", min=0.1, max=60)
    recheck_s: float = setting(
        RECHECK_S_DEFAULT,
        "How often contract wallets are asked again whether they hold good what they signed.",
        min=1,
        max=3600,
    )
    clock_skew_s: float = CLOCK_SKEW_S_DEFAULT


# --- the effective settings -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Public:
    """What is the same on every node of the cluster, and no secret: the join document.

    `contract` has 20 bytes, `genesis_hash` 32, or none while it is not known.
    """

    chain_id: int
    contract: bytes
    scope: str
    genesis_hash: bytes = b""
    deployed_at: int = 0

    def document(self) -> bytes:
        return json.dumps(
            {
                "v": 1,
                "chain_id": self.chain_id,
                "contract": "0x" + self.contract.hex(),
                "scope": self.scope,
                "genesis_hash": "0x" + self.genesis_hash.hex() if self.genesis_hash else "",
                "deployed_at": self.deployed_at,
            },
            sort_keys=True,
        ).encode()

    @classmethod
    def parse(cls, document: bytes) -> Public:
        """The inverse; raises ConfigError."""
        try:
            return cls._parse(json.loads(document[: DOCUMENT_BYTES_MAX + 1]))
        except (*_DAMAGED, InvalidArgument) as exc:
            raise BadSettings(
                f"what the cluster gave this node when it joined is not auth_evm's: {exc}",
                hint="join again, with a new ticket",
            ) from None

    @classmethod
    def _parse(cls, value: Any) -> Public:
        if value["v"] != 1:
            raise ValueError("it is of a later release")
        chain_id, deployed_at = value["chain_id"], value["deployed_at"]
        if type(chain_id) is not int or type(deployed_at) is not int:
            raise ValueError("its numbers are none")
        if not (0 < chain_id < 2**53 and 0 <= deployed_at < 2**53):
            raise ValueError("its numbers are out of range")
        _check_contract(value["contract"])
        _check_scope(value["scope"])
        if value["genesis_hash"]:
            _check_hash(value["genesis_hash"])
        return cls(
            chain_id,
            bytes.fromhex(value["contract"][2:]),
            value["scope"],
            bytes.fromhex(value["genesis_hash"][2:]),
            deployed_at,
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """What a node works with: every value decided."""

    public: Public
    endpoints: tuple[str, ...] = field(repr=False)
    quorum: int
    timeout_s: float
    profile: ChainProfile
    finality: Finality
    poll_s: float
    final_poll_s: float
    bounds: Bounds
    session_s_max: int
    clock_skew_s: float
    wallet_gas_max: int
    recheck_s: float
    warnings: tuple[str, ...]
    """Of what is weaker than it should be, for the log and `ww doctor`."""

    @property
    def scope_id(self) -> bytes:
        """The scope as the contract has it."""
        return self.public.scope.encode().ljust(32, b"\0")


def resolve(config: AuthEvmConfig, joined: bytes | None = None) -> Settings:
    """The settings of a node on a chain that is not a try-out's.

    Args:
        config: `[plugins.auth_evm]`.
        joined: What the cluster gave this node when it joined.

    Raises ConfigError that says what to set.
    """
    public = _public(config, Public.parse(joined) if joined is not None else None)
    if not config.endpoints:
        raise _missing(
            "endpoints",
            f'set [plugins.auth_evm] endpoints = ["https://…", …], {ENDPOINTS_WANTED} of '
            f"different operators, of chain {public.chain_id}",
        )
    profile = _profile(config, public.chain_id)
    quorum, warnings = _quorum(config)
    warnings += _weak_endpoints(config.endpoints)
    return _settings(config, public, config.endpoints, quorum, profile, warnings)


def resolve_try_out(config: AuthEvmConfig, public: Public, url: str) -> Settings:
    """The settings of a try-out on a chain of its own on this machine, as `dev.decide` lets it."""
    return _settings(config, public, (url,), 1, finalities.by_name(finalities.DEV), ())


def _settings(
    config: AuthEvmConfig,
    public: Public,
    endpoints: tuple[str, ...],
    quorum: int,
    profile: ChainProfile,
    warnings: tuple[str, ...],
) -> Settings:
    finality = profile.finality
    if config.finality and config.finality not in finalities.PROFILES:
        finality = finalities.Finality.parse(config.finality)
    finalities.check_try_out(finality, public.chain_id, endpoints)
    age = profile.bounds
    bounds = finalities.Bounds(
        verified_s_max=config.verified_s_max or age.verified_s_max,
        tip_age_s_max=config.tip_age_s_max or age.tip_age_s_max,
        tip_ahead_s_max=age.tip_ahead_s_max,
    )
    poll_s = config.poll_s or profile.poll_s
    if poll_s >= bounds.verified_s_max:
        raise BadSettings(
            f"[plugins.auth_evm] poll_s ({poll_s:g}) is not shorter than verified_s_max "
            f"({bounds.verified_s_max:g}): nothing would ever be allowed for long",
            hint="set a shorter poll_s",
        )
    return Settings(
        public=public,
        endpoints=endpoints,
        quorum=quorum,
        timeout_s=config.timeout_s,
        profile=profile,
        finality=finality,
        poll_s=poll_s,
        final_poll_s=max(poll_s, profile.final_poll_s),
        bounds=bounds,
        session_s_max=config.session_s_max,
        clock_skew_s=config.clock_skew_s,
        wallet_gas_max=config.wallet_gas_max,
        recheck_s=config.recheck_s,
        warnings=warnings,
    )


def _public(config: AuthEvmConfig, joined: Public | None) -> Public:
    """What the config and the join document say together; raises ConfigError."""
    if joined is None:
        for name, what in (("chain_id", "the chain's ID"), ("contract", "the contract's address")):
            if not getattr(config, name):
                raise _missing(name, f"set [plugins.auth_evm] {name} to {what}")
    contract = b""
    if config.contract:
        from wetware_auth_evm.chain.addresses import parse_address

        try:
            contract = parse_address(config.contract)
        except InvalidArgument as exc:
            raise BadSettings(
                f"[plugins.auth_evm] contract: {exc.message}", hint=exc.hint
            ) from None
    genesis = bytes.fromhex(config.genesis_hash.removeprefix("0x"))
    if joined is None:
        return Public(config.chain_id, contract, config.scope, genesis, config.deployed_at)
    for name, here, there in (
        ("chain_id", config.chain_id, joined.chain_id),
        ("contract", contract, joined.contract),
        ("genesis_hash", genesis, joined.genesis_hash),
        ("scope", "" if config.scope == SCOPE_DEFAULT else config.scope, joined.scope),
    ):
        if here and there and here != there:
            shown = f"0x{there.hex()}" if isinstance(there, bytes) else there
            raise BadSettings(
                f"[plugins.auth_evm] {name} is not the one of the cluster that this node joined, "
                f"{shown}",
                hint=f"leave {name} out, or give the other cluster a data directory of its own, "
                "with --data-dir",
            )
    return Public(
        joined.chain_id,
        joined.contract,
        joined.scope,
        genesis or joined.genesis_hash,
        config.deployed_at or joined.deployed_at,
    )


def _missing(name: str, hint: str) -> ConfigError:
    return BadSettings(
        f"the auth backend `evm` needs [plugins.auth_evm] {name}",
        hint=f"{hint}; {TRY_OUT_COMMAND}, in a data directory of its own",
    )


def _profile(config: AuthEvmConfig, chain_id: int) -> ChainProfile:
    known = finalities.for_chain(chain_id)
    if config.finality in finalities.PROFILES:
        named = finalities.by_name(config.finality)
        if known is not None and named is not known:
            raise BadSettings(
                f"[plugins.auth_evm] finality is that of {named.name}, and chain {chain_id} is "
                f"{known.name}",
                hint="leave finality out",
            )
        if not named.production and not all(map(finalities.is_loopback, config.endpoints)):
            raise BadSettings(
                f'[plugins.auth_evm] finality "{named.name}" with an endpoint that is not on this '
                "machine: it is for try-outs",
                hint='set finality = "finalized" or "depth:N" for this chain',
            )
        return named
    if known is not None:
        return known
    for name in ("finality", "poll_s", "verified_s_max", "tip_age_s_max"):
        if not getattr(config, name):
            raise BadSettings(
                f"chain {chain_id} has no profile: [plugins.auth_evm] {name} has to be set",
                hint="set finality, poll_s, verified_s_max and tip_age_s_max for it; or "
                f"finality = one of {', '.join(finalities.PROFILES)}, to take its numbers",
            )
    return finalities.ChainProfile(
        name=f"chain {chain_id}",
        chain_id=chain_id,
        finality=finalities.Finality.parse(config.finality),
        poll_s=config.poll_s,
        final_poll_s=config.poll_s,
        bounds=finalities.Bounds(config.verified_s_max, config.tip_age_s_max),
        production=True,
        why="From the configuration.",
    )


def _quorum(config: AuthEvmConfig) -> tuple[int, tuple[str, ...]]:
    count, quorum = len(config.endpoints), config.quorum
    if not quorum:
        if count < ENDPOINTS_WANTED:
            raise BadSettings(
                f"{count} endpoints, where {ENDPOINTS_WANTED} of different operators are needed: "
                "one that lies could let anybody in",
                hint="add endpoints to [plugins.auth_evm] endpoints; to trust the few that there "
                f"are, set quorum = {finalities.quorum_default(count)}",
            )
        return finalities.quorum_default(count), ()
    if quorum > count:
        raise BadSettings(
            f"[plugins.auth_evm] quorum = {quorum}, and there are {count} endpoints",
            hint="add endpoints, or set a lower quorum",
        )
    if quorum == 1:
        return quorum, ("quorum = 1: any single endpoint decides who is let in",)
    if 2 * quorum <= count:
        return quorum, (
            f"quorum = {quorum} of {count} endpoints is no majority: two groups of them could "
            "state two different truths",
        )
    if count < ENDPOINTS_WANTED:
        return quorum, (f"{count} endpoints with quorum = {quorum}: if one fails, nobody gets in",)
    return quorum, ()


def _weak_endpoints(urls: tuple[str, ...]) -> tuple[str, ...]:
    hosts = [urlsplit(url).hostname for url in urls if not finalities.is_loopback(url)]
    found = [
        f"several endpoints are at {host}: they are one operator's, and vote twice"
        for host in sorted({str(host) for host in hosts if hosts.count(host) > 1})
    ]
    if any(url.startswith("http:") and not finalities.is_loopback(url) for url in urls):
        found.append("an endpoint is reached by http: whoever is on the way can answer for it")
    return tuple(found)
