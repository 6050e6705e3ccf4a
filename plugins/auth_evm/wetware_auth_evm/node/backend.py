"""The auth backend: decides from the replica of the contract, and never waits for the chain.

A login is judged in memory, but for contract wallets, which only the chain can ask. What a session
rests on is looked at again after every look at the chain and at every end that the contract states:
what is gone is withdrawn, and the broker cuts it. While the replica does not know, nothing is
decided and everything is suspended.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.watchers import Watchers
from wetware.errors import InvalidArgument
from wetware.hookspecs import (
    Accept,
    NotMine,
    Reject,
    Resumed,
    RoleProfile,
    Service,
    Suspended,
    Withdrawn,
)
from wetware.identity import (
    Challenge,
    LoginStatus,
    PeerId,
    Principal,
    Proof,
    replace_private_file,
    verify,
)
from wetware_auth_evm import contract as artifact
from wetware_auth_evm.chain.addresses import checksum
from wetware_auth_evm.chain.endpoints import Endpoints
from wetware_auth_evm.chain.errors import BadSettings, ChainError, WrongChain
from wetware_auth_evm.chain.events import ROOT, role_id, role_name
from wetware_auth_evm.chain.follower import Follower
from wetware_auth_evm.chain.history import STATE_FILE, History
from wetware_auth_evm.chain.replica import Replica
from wetware_auth_evm.dev import tryout
from wetware_auth_evm.login.proofs import (
    SCHEMES,
    SESSION_SCHEME,
    KeyProof,
    SessionProof,
    key_statement,
    session_statement,
)
from wetware_auth_evm.login.statements import recover
from wetware_auth_evm.login.wallet_check import WalletCheck
from wetware_auth_evm.login.wallet_sessions import Refused, WalletSessions
from wetware_auth_evm.node import proposed
from wetware_auth_evm.node.config import Public, Settings, resolve, resolve_try_out
from wetware_auth_evm.node.roles import NODE_ROLE, RESERVED, Rules, base
from wetware_auth_evm.node.roster import NOTHING, PRINCIPALS_MAX, Known, Roster

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import Finding, PluginContext
    from wetware_auth_evm.login.statements import SessionGrant
    from wetware_auth_evm.node.config import AuthEvmConfig

BACKEND: Final = "evm"
CHAIN_FILE: Final = "chain.json"
"""The chain's first block, as a quorum stated it at the first start."""
TICK_S: Final = 0.5
"""Between two looks at the clock: how late it is seen that the replica is too old."""
FIRST_LOOK_S: Final = 10.0
"""For the first answers of the endpoints, twice; then the node starts suspended."""
TICK_S_MIN: Final = 0.05

_HINT_LOGIN: Final = "log in again: `ww auth evm login`"


class EvmBackend:
    """Roles of one scope of a WetwareACL contract.

    Raises ConfigError where the settings do not say which chain, contract and endpoints to use.

    Attributes:
        try_out: "" for a node in earnest, else what this is and what to try.
    """

    name = BACKEND
    schemes = SCHEMES
    users = (
        "an owner or admin of the contract runs `ww auth evm grant ROLE ADDRESS`; "
        "`ww auth evm address` prints one's own ADDRESS, and `ww auth evm list` who holds what"
    )

    def __init__(self, ctx: PluginContext) -> None:
        config: AuthEvmConfig = ctx.config
        self._log, self._clock, self._run_sync = ctx.log, ctx.clock, ctx.run_sync
        self._data_dir = ctx.data_dir
        self._watchers = Watchers[Withdrawn | Suspended | Resumed]()
        self.dev: tryout.DevChain | None = None
        self.try_out = ""
        self._proposals = ctx.proposals
        try:
            self.settings = self._settle(ctx, config)
            self._own_roles = bool(self.try_out) and not config.roles
            self._roles = proposed.load(ctx.data_dir) if self._own_roles else config.roles
            self._set_up()
        except BaseException:
            if self.dev is not None:
                self.dev.close()
            raise

    def _settle(self, ctx: PluginContext, config: AuthEvmConfig) -> Settings:
        """Decide whether this is a try-out, and which chain it is about."""
        if not tryout.decide(ctx):
            settings = resolve(config, ctx.join_document)
            for warning in settings.warnings:
                self._log.warning("auth_evm.weak", why=warning)
            return settings
        self.dev = tryout.start(ctx.data_dir, log=ctx.log, scope=config.scope)
        self.try_out = self.dev.banner
        public = Public(
            self.dev.chain_id,
            self.dev.contract,
            config.scope,
            self.dev.genesis_hash,
            self.dev.deployed_at,
        )
        return resolve_try_out(config, public, self.dev.url)

    def _set_up(self) -> None:
        settings = self.settings
        self.public = settings.public
        self.rules = Rules(self._roles)
        if not self.public.genesis_hash:
            self.public = replace(self.public, genesis_hash=self._kept_genesis())
        self.replica = Replica(
            self.public.chain_id,
            self.public.contract,
            settings.scope_id,
            bounds=settings.bounds,
            clock=self._clock,
        )
        self._history = History(self._data_dir)
        self._had_history = (self._data_dir / STATE_FILE).exists()
        self._history.load(self.replica)
        self.endpoints = Endpoints(
            settings.endpoints, quorum=settings.quorum, timeout_s=settings.timeout_s
        )
        self.follower = Follower(
            self.endpoints,
            self.replica,
            finality=settings.finality,
            code_hash=artifact.load().runtime_hash,
            genesis_hash=self.public.genesis_hash or None,
            deployed_at=self.public.deployed_at,
            poll_s=settings.poll_s,
            final_poll_s=settings.final_poll_s,
            history=self._history,
            monotonic=self._clock.monotonic,
        )
        self.roster = Roster(
            self._data_dir,
            look_up=self._look_up,
            tell=self._tell,
            log=self._log,
            run_sync=self._run_sync,
        )
        self.wallets = WalletSessions(
            WalletCheck(self.endpoints, gas_max=settings.wallet_gas_max),
            self.replica,
            recheck_s=settings.recheck_s,
            clock=self._clock,
            tell=self._tell,
            log=self._log,
        )
        self._asked = False
        self._suspended = ""
        self._starting = True  # nothing is known yet, and that is no news
        self.services: tuple[Service, ...] = ()  # the plugin's hook adds the one for operators

    # --- the chain --------------------------------------------------------------------------------

    def _kept_genesis(self) -> bytes:
        try:
            kept = json.loads((self._data_dir / CHAIN_FILE).read_text())
            if kept["chain_id"] == self.public.chain_id:
                genesis = bytes.fromhex(kept["genesis_hash"])
                if len(genesis) == 32:
                    return genesis
        except FileNotFoundError:
            return b""
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        raise BadSettings(
            f"{self._data_dir / CHAIN_FILE} is damaged, or of another chain",
            hint="set [plugins.auth_evm] genesis_hash to the hash of the chain's first block, or "
            "restore the file from a backup",
        )

    async def _identify(self) -> None:
        """Compare the chain with what is configured, at the start; raises ConfigError.

        Endpoints that cannot be reached are no reason not to start: the follower goes on.
        """
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self.follower.identify()
                if not self.public.genesis_hash:
                    await self._keep_genesis()
        except WrongChain as exc:
            raise BadSettings(exc.message, hint=exc.hint) from None
        except (ChainError, TimeoutError, ValueError, KeyError, TypeError, AttributeError) as exc:
            why = str(exc)[:200] or f"no answer within {FIRST_LOOK_S:g} s"
            self._log.warning("chain.not_reached", why=why)

    async def _keep_genesis(self) -> None:
        first = await self.endpoints.block(0)
        self.public = public = replace(self.public, genesis_hash=first.hash)
        document = {"chain_id": public.chain_id, "genesis_hash": first.hash.hex()}
        try:
            replace_private_file(self._data_dir / CHAIN_FILE, json.dumps(document).encode())
        except OSError as exc:  # the next start keeps it
            self._log.warning("chain.not_kept", error=exc.strerror)
            return
        self._log.info("chain.kept", chain_id=public.chain_id, genesis="0x" + first.hash.hex())

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Follow the chain until cancelled; started once a block was verified, or none can be.

        Raises ConfigError where the endpoints serve another chain or contract.
        """
        if self._own_roles and not self._roles:  # the services are there by now
            self._roles = proposed.write(self._data_dir, self._proposals)
            self.rules = Rules(self._roles)
        looked = asyncio.Event()

        def touched(accounts: frozenset[bytes] | None) -> None:
            self._review(accounts)
            looked.set()

        try:
            self._judge_fitness()
            await self._identify()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.follower.run, touched, name="auth_evm follower")
                tasks.start_soon(self._watch_time, name="auth_evm clock")
                tasks.start_soon(self.wallets.run, self.roster, name="auth_evm wallets")
                tasks.start_soon(self.roster.run, name="auth_evm principals")
                await self._first_look(looked)
                self._starting = False
                if self._suspended:
                    self._log.warning("auth_evm.suspended", why=self._suspended)
                task_status.started()
        finally:
            with anyio.CancelScope(shield=True):
                await self.endpoints.aclose()
                if self.dev is not None:
                    await self._run_sync(self.dev.close)

    async def _first_look(self, looked: asyncio.Event) -> None:
        """Wait until the roles are known, so that what was shared can be put back.

        Known from the last run is enough; a node that has lost what it knew has to hear it from
        the chain first, or what hangs on the roles would be taken for withdrawn.
        """
        with anyio.move_on_after(FIRST_LOOK_S):
            await looked.wait()
        replica = self.replica
        while self._had_history and not replica.ever_verified and not replica.final.seq:
            self._log.warning("auth_evm.waits", why=replica.fault)
            looked.clear()
            await looked.wait()

    # --- what changes -----------------------------------------------------------------------------

    def _tell(self, event: Withdrawn | Suspended | Resumed) -> None:
        self._watchers.tell_all(event)

    def _judge_fitness(self) -> None:
        """Say that nothing can be decided now, or that it can again."""
        why = self.replica.unfit()
        if bool(why) == bool(self._suspended):
            return
        self._suspended = why
        if why:
            if not self._starting:
                self._log.warning("auth_evm.suspended", why=why)
            self._tell(Suspended(why))
        else:
            # What went meanwhile goes first: it must not live again for an instant.
            self._review(None, resumed=True)
            self._log.info("auth_evm.resumed", seq=self.replica.final.seq)
            self._tell(Resumed())
            self.wallets.wake()

    def _review(self, accounts: frozenset[bytes] | None, *, resumed: bool = False) -> None:
        """Withdraw what is gone: of the accounts named or of all (None), and where the time came.

        While the replica is unfit, too: what it knows last says what is gone.
        """

        def concerned(principal: Principal) -> bool:
            return accounts is None or _parsed(principal.subject)[1] in accounts

        self.roster.review(concerned, self.replica.now())
        if not resumed:
            self._judge_fitness()

    async def _watch_time(self) -> None:
        """Ends that the contract states, and the age of what is known."""
        while True:
            left_s = self.roster.next_end - self._clock.time()
            await asyncio.sleep(min(TICK_S, max(TICK_S_MIN, left_s)))
            if self._clock.time() >= self.roster.next_end:
                self._review(frozenset())
            self._judge_fitness()

    # --- who has what -----------------------------------------------------------------------------

    def principal(self, account: bytes, key: bytes = b"") -> Principal:
        """Of an account, or of a key that it bound on chain."""
        return Principal(BACKEND, _subject(self.public.chain_id, account, key))

    def masks(self, account: bytes, key: bytes = b"") -> dict[str, int]:
        """Role → mask of an account, or of a key bound to it, as they were known last."""
        replica = self.replica
        known = replica.known_key_roles(account, key) if key else replica.known_roles(account)
        named = {role_name(role): mask for role, mask in known.items()}
        return {name: mask for name, mask in named.items() if name and name not in RESERVED}

    def _look_up(self, principal: Principal) -> Known:
        chain_id, account, key = _parsed(principal.subject)
        replica = self.replica
        if chain_id != self.public.chain_id:
            return NOTHING
        masks = self.masks(account, key)
        return Known(
            self.rules.names(masks),
            {role: self._serials(role, account, key) for role in masks},
            replica.epochs(account),
            replica.next_end(account, key or None),
        )

    def _serials(self, role: str, account: bytes, key: bytes) -> frozenset[int]:
        """Of the records that give a role now, by the newest block."""
        tip, what, now = self.replica.tip, role_id(role), self.replica.now()
        found = []
        for scope in (self.replica.scope, ROOT):
            grant = tip.grants.get(account, {}).get((scope, what))
            if grant is None or not tip.held(scope, what, account, now).rights:
                continue
            bound = tip.keys.get(key, {}).get((account, scope, what)) if key else None
            if not key:
                found.append(grant.serial)
            elif bound is not None and now < bound.expiry and bound.serial > grant.serial:
                found.append(bound.serial)
        return frozenset(found)

    def roles(self, principal: Principal) -> frozenset[str]:
        """From memory, as known last: also while nothing is decided.

        Before the first login, when what was shared is put back, they are those that somebody has
        had ever since the node stopped: a share under a role that was revoked and granted anew in
        between is over.
        """
        if principal.backend != BACKEND:
            return frozenset()
        found = self._look_up(principal)
        if found.roles and not self._asked:
            found = found.held_since(self.roster.before(principal))
        if found.roles and not self.roster.watch(principal, found):
            return frozenset()
        return found.roles

    def profile(self, role: str) -> RoleProfile:
        return self.rules.profile(role)

    def how_to_accept(self, service: str, proposal: Mapping[str, frozenset[str]]) -> str:
        """What an operator writes into ww.toml to accept what a service proposes."""
        return proposed.how_to_accept(self._roles, service, proposal, every=self._own_roles)

    # --- logins -----------------------------------------------------------------------------------

    async def authenticate(self, challenge: Challenge, proof: Proof) -> Accept | Reject | NotMine:
        """Judge a session or a bound key.

        BACKEND_UNAVAILABLE while the replica is unfit, and for a contract wallet that cannot be
        asked.
        """
        self._asked = True
        if proof.scheme not in SCHEMES:
            return NotMine()
        try:
            if proof.scheme == SESSION_SCHEME:
                return await self._judge_session(challenge, SessionProof.decode(proof.payload))
            return self._judge_key(challenge, KeyProof.decode(proof.payload))
        except InvalidArgument as exc:
            return Reject(LoginStatus.MALFORMED, exc.message[:256])

    async def _judge_session(self, challenge: Challenge, proof: SessionProof) -> Accept | Reject:
        grant, digest = proof.grant, proof.digest
        session_key = grant.session_key.public_key or b""
        if not verify(session_key, proof.answer, session_statement(challenge, digest)):
            return Reject(
                LoginStatus.BAD_SIGNATURE, "the answer is not by the key that the session names"
            )
        if (wrong := self._judge_binding(challenge, grant)) is not None:
            return wrong
        if why := self.replica.unfit():
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, why[:256])
        if (wrong := self._judge_time(grant)) is not None:
            return wrong
        # What the contract says, before the signature: a stranger's is not worth a question.
        if isinstance(roles := self._judge_roles(grant), Reject):
            return roles
        principal = self.principal(grant.account)
        problem = ""
        if proof.form != "erc1271":
            try:
                if recover(digest, proof.signature) == grant.account:
                    return self._admit(principal, roles, float(grant.expires_at))
                problem = "the signature is not by the account that the session names"
            except ValueError as exc:
                problem = f"the wallet's signature is refused: {exc}"
        return await self._judge_wallet(principal, proof, problem)

    def _judge_binding(self, challenge: Challenge, grant: SessionGrant) -> Reject | None:
        """Whether a session is for this cluster, on this chain, by this contract."""
        public = self.public
        for what, right in (
            ("cluster", grant.cluster == challenge.cluster),
            ("chain", grant.chain_id == public.chain_id),
            ("contract", grant.contract == public.contract),
            ("scope", grant.scope == self.settings.scope_id),
        ):
            if not right:
                return Reject(LoginStatus.WRONG_CLUSTER, f"the session was made for another {what}")
        return None

    def _judge_time(self, grant: SessionGrant) -> Reject | None:
        settings, now = self.settings, self.replica.now()
        if grant.expires_at - grant.issued_at > settings.session_s_max:
            return Reject(
                LoginStatus.EXPIRED,
                f"the session is for longer than the {settings.session_s_max} s that this node "
                f"allows (session_s_max); {_HINT_LOGIN}",
            )
        if grant.issued_at > now + settings.clock_skew_s:
            return Reject(
                LoginStatus.EXPIRED,
                f"the session begins {grant.issued_at - now} s in the future "
                f"(clock_skew_s = {settings.clock_skew_s:g}): compare the clocks",
            )
        if now >= grant.expires_at:
            return Reject(LoginStatus.EXPIRED, f"the session has expired; {_HINT_LOGIN}")
        return None

    def _judge_roles(self, grant: SessionGrant) -> frozenset[str] | Reject:
        """The roles that the contract and the session both give; none is a refusal."""
        masks = self.masks(grant.account)
        if not masks:
            return Reject(
                LoginStatus.NO_ROLE, f"{checksum(grant.account)} has no role in this cluster"
            )
        if not self.replica.epochs_fit(grant.account, grant.epochs):
            return Reject(
                LoginStatus.EXPIRED,
                "the session is of before a revokeAll or resetScope on chain, or one that is not "
                f"final yet; {_HINT_LOGIN}",
            )
        names = self.rules.names(masks)
        if not names:
            return Reject(
                LoginStatus.NO_ROLE,
                f"its roles are {', '.join(sorted(masks))[:80]}, which this node's configuration "
                "does not know ([plugins.auth_evm.roles]): it knows "
                f"{', '.join(self.rules.known)[:80] or 'none'}",
            )
        roles = frozenset(name for name in names if base(name) in grant.roles)
        if not roles:
            return Reject(
                LoginStatus.NO_ROLE,
                f"its roles are {', '.join(sorted(names))[:120]}, and the session is for "
                f"{', '.join(grant.roles)[:120]}",
            )
        return roles

    def _judge_key(self, challenge: Challenge, proof: KeyProof) -> Accept | Reject:
        if not verify(proof.key, proof.answer, key_statement(challenge, proof.account)):
            return Reject(LoginStatus.BAD_SIGNATURE, "the signature does not match the challenge")
        if why := self.replica.unfit():
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, why[:256])
        key_id = PeerId.from_public_key(proof.key)
        bound = self.replica.final.keys.get(proof.key, {})
        here = {account for account, scope, _ in bound if scope in (self.replica.scope, ROOT)}
        accounts = {account for account in here if self.masks(account, proof.key)}
        if proof.account:
            accounts &= {proof.account}
        if not accounts:
            return Reject(
                LoginStatus.UNKNOWN_PRINCIPAL,
                f"{key_id} is bound to no account with a role in this cluster",
            )
        if len(accounts) > 1:
            some = ", ".join(sorted(map(checksum, accounts))[:4])
            return Reject(
                LoginStatus.UNKNOWN_PRINCIPAL,
                f"{key_id} is bound to several accounts ({some}): say which (WW_ACCOUNT)",
            )
        account = accounts.pop()
        roles = self.rules.names(self.masks(account, proof.key))
        if not roles:
            return Reject(
                LoginStatus.NO_ROLE,
                f"this node's configuration knows none of the roles of {key_id} "
                "([plugins.auth_evm.roles])",
            )
        return self._admit(self.principal(account, proof.key), roles)

    async def _judge_wallet(
        self, principal: Principal, proof: SessionProof, problem: str
    ) -> Accept | Reject:
        """Ask the account itself, as a contract. `problem`: why the signature is not its key's."""
        try:
            await self.wallets.ask(proof)
        except Refused as exc:
            if not exc.bad:
                return Reject(LoginStatus.BACKEND_UNAVAILABLE, str(exc))
            return Reject(
                LoginStatus.BAD_SIGNATURE,
                problem or "the contract wallet does not hold the signature good (ERC-1271)",
            )
        # The wallet took its time: what the contract says may have changed.
        if why := self.replica.unfit():
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, why[:256])
        roles = self._judge_roles(proof.grant)
        if isinstance(roles, Reject):
            return roles
        self.wallets.keep(proof, principal)
        return self._admit(principal, roles, float(proof.grant.expires_at))

    def _admit(
        self, principal: Principal, roles: frozenset[str], expires_at: float | None = None
    ) -> Accept | Reject:
        """Let somebody in whose proof is good, if they can be watched over."""
        if not self.roster.watch(principal, self._look_up(principal)):
            return Reject(
                LoginStatus.BACKEND_UNAVAILABLE,
                f"{PRINCIPALS_MAX} principals are known already (PRINCIPALS_MAX)",
            )
        return Accept(principal, roles, expires_at)

    # --- the rest of AuthBackend ------------------------------------------------------------------

    @property
    def founding(self) -> bytes:
        public = self.public
        return (
            b"wetware-evm/1\0"
            + public.chain_id.to_bytes(8, "big")
            + public.contract
            + self.settings.scope_id
        )

    @property
    def epoch(self) -> int:
        """The number of the contract's last final change."""
        return self.replica.final.seq

    async def join_document(self) -> bytes:
        """Chain, contract, scope and first block; no endpoint, which may hold a key."""
        return self.public.document()

    async def admit_node(self, peer: PeerId) -> bool:
        """Whether an account with the role `node` bound the peer's key on chain."""
        key = peer.public_key
        return key is not None and bool(self.replica.key_accounts(role_id(NODE_ROLE), key))

    def findings(self) -> Iterable[Finding]:
        from wetware_auth_evm.node.findings import findings

        return findings(
            self.replica, self.endpoints, self.settings, self.rules, try_out=bool(self.try_out)
        )

    def watch(
        self, callback: Callable[[Withdrawn | Suspended | Resumed], None]
    ) -> Callable[[], None]:
        return self._watchers.add(callback)

    # --- for operators ----------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What the follower says, and what this node makes of it."""
        return {
            **self.follower.status(),
            "scope": self.public.scope,
            "suspended": self._suspended,
            "finality": f"{self.settings.profile.name}, {self.settings.finality}",
            "try_out": self.try_out,
            "roles": len(self.rules),
            "principals": len(self.roster),
            "wallets": len(self.wallets),
            "warnings": list(self.settings.warnings),
        }


@functools.lru_cache(maxsize=PRINCIPALS_MAX)
def _subject(chain_id: int, account: bytes, key: bytes) -> str:
    subject = f"{chain_id}:{checksum(account)}"
    return f"{subject}/{PeerId.from_public_key(key)}" if key else subject


@functools.lru_cache(maxsize=PRINCIPALS_MAX)
def _parsed(subject: str) -> tuple[int, bytes, bytes]:
    """(chain, account, bound key or b"") of a subject in its one form; (0, b"", b"") else."""
    number, _, rest = subject.partition(":")
    address, _, peer = rest.partition("/")
    try:
        account = bytes.fromhex(address.removeprefix("0x"))
        key = (PeerId.parse(peer).public_key or b"") if peer else b""
        chain_id = int(number) if len(number) < 20 else 0
    except (ValueError, InvalidArgument):
        return 0, b"", b""
    if len(account) != 20 or _subject(chain_id, account, key) != subject:
        return 0, b"", b""
    return chain_id, account, key
