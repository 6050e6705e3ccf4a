"""The auth backend: decides from the signed policy document, which it keeps and guards.

Two documents: the *newest* that this node accepted, whose withdrawals are in force and which it
passes on, and the one *in force*, which is on disk and grants. They are the same but for the time
that the disk takes, or while it fails.

A version that withdraws something is written also on a full disk, with the space of a reserve
(`wetware.base.disk`). Where not even that is possible the reserve is marked: after a crash, what it
withdrew may be in force again, and this node admits nobody but the operator until the operator puts
a version, or the marked one or a later one comes from another member.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from wetware import rpc
from wetware.base import paths
from wetware.base.disk import Reserve, remedy
from wetware.base.watchers import Watchers
from wetware.client import KeyChoice
from wetware.errors import (
    ConfigError,
    InvalidArgument,
    KeyFileError,
    NotFound,
    WetwareError,
)
from wetware.hookspecs import (
    Accept,
    Finding,
    NotMine,
    PluginContext,
    Reject,
    Resumed,
    RoleProfile,
    Service,
    Suspended,
    Withdrawn,
)
from wetware.identity import (
    Challenge,
    Key,
    LoginStatus,
    PeerId,
    Principal,
    Proof,
    verify,
)
from wetware_auth_local.client import SCHEMA
from wetware_auth_local.contact import Contact
from wetware_auth_local.policy import (
    DOCUMENT_BYTES_MAX,
    HISTORY_MAX,
    ForkedPolicy,
    Policy,
    PolicyNotSaved,
    PolicyOutOfReach,
    Relation,
    Signed,
    StalePolicy,
    WrongCluster,
    lost_grants,
    narrowed_roles,
)
from wetware_auth_local.signer import SCHEME
from wetware_auth_local.spread import Spread

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware_auth_local.config import AuthLocalConfig

POLICY_FILE = "policy.json"
HIGHEST_FILE = "highest.json"
"""Version and digest of the latest policy this node has had: it refuses to go back, also when
somebody restores an old policy file."""
_MARK = "version {} of the policy withdraws something"
_NOT_DURABLE = "which may not have been on this node's disk when it crashed"


class LocalBackend:
    """Users and roles of one cluster, from memory; every change is on disk before it is granted.

    Raises ConfigError (also KeyFileError) where the policy cannot be read or made: there is no
    weaker fallback.
    """

    name = "local"
    schemes = (SCHEME,)
    users = (
        "an operator runs `ww user add NAME --key KEY`; "
        "`ww key new` makes a key, and `ww key show` prints one's own KEY"
    )

    def __init__(self, ctx: PluginContext) -> None:
        config: AuthLocalConfig = ctx.config
        self._log, self._run_sync = ctx.log, ctx.run_sync
        self._file = ctx.data_dir / POLICY_FILE
        self._watchers = Watchers[Withdrawn | Suspended | Resumed]()
        self._highest_file = ctx.data_dir / HIGHEST_FILE
        self._reserve = Reserve(ctx.data_dir)
        if self._reserve.marked:
            self._log.error("policy.unsure", why=self._reserve.marked, hint="`ww doctor`")
        self._unsure = self._reserve.marked
        self._puts: set[asyncio.Task[tuple[Policy, int]]] = set()
        self._lock = asyncio.Lock()
        self._proposals = ctx.proposals
        self._founder: Key | None = None
        self._authority, joined = ctx.authority, ctx.join_document
        # Beside another authority a policy comes from a file, which may be old: it is compared with
        # another node's before it lets anybody in, at the cluster's founder as well.
        self.contact = Contact(ctx, joined=ctx.joined or not ctx.authority)
        self._in_force = self._newest = self._load(config, joined)
        self._reserve.fill()
        self._by_key = _index(self._in_force.policy)
        self.spread = Spread(
            ctx,
            contact=self.contact,
            newest=lambda: self._newest,
            adopt=self._carry_out,
            settle=self._settle,
        )
        self.services: tuple[Service, ...] = (PolicyService(self),)

    # --- the document -----------------------------------------------------------------------------

    def _load(self, config: AuthLocalConfig, joined: bytes | None) -> Signed:
        highest = self._read_highest()
        given = self._given(config, joined)
        if not self._file.exists():
            if highest is not None:
                raise ConfigError(
                    f"the policy {self._file} is gone, and this node has had version "
                    f"{highest['version']} of it",
                    hint="restore it from a backup, or from another node",
                )
            if given is None and not self._authority:
                raise ConfigError(
                    "auth_local is not this cluster's authority ([node] auth_also), and has no "
                    "policy to begin with",
                    hint="[plugins.auth_local] policy names one (`ww policy export`)",
                )
            if given is not None:
                signed, _ = given
                self._adopt_first(signed, joined=self.contact.met)
                return signed
            # On disk once it says what the services propose: not before they are there.
            self._founder, path = _operator_key()
            self._log.info("policy.created", operator=self._founder.peer_id, key=path)
            return Signed.open(Policy.first(self._founder.peer_id).sign(self._founder))
        mine = _open(_read(self._file), self._file, "restore it from a backup, or another node")
        if given is not None:
            wanted, source = given
            if wanted.policy.operator != mine.policy.operator:
                raise ConfigError(
                    f"this node belongs to the cluster of {mine.policy.operator}, and {source} "
                    f"is of the cluster of {wanted.policy.operator}",
                    hint="give the other cluster a data directory of its own, with --data-dir",
                )
        if highest is not None:
            seen = (highest["version"], highest["digest"])
            if mine.version < seen[0] or (mine.version == seen[0] and mine.digest != seen[1]):
                raise ConfigError(
                    f"the policy {self._file} is version {mine.version}, and this node has had "
                    f"another version {seen[0]}: it does not go back",
                    hint="restore the later one from a backup, or from another node",
                )
        if highest != _highest(mine):  # a crash may have come between the two files
            highest_now = json.dumps(_highest(mine)).encode()
            self._reserve.replace(self._highest_file, highest_now, must=True)
        return mine

    def _given(self, config: AuthLocalConfig, joined: bytes | None) -> tuple[Signed, str] | None:
        """What a first start begins with, and where it is from: the later one, if there are two."""
        found: list[tuple[Signed, str]] = []
        if joined is not None:
            source = "what the cluster gave this node when it joined"
            found.append((_open(joined, source, "join again, with a new ticket"), source))
        if config.policy is not None:
            file = config.policy.expanduser()
            hint = "export it again with `ww policy export`"
            found.append((_open(_read(file), config.policy, hint), str(config.policy)))
        if not found:
            return None
        if len({signed.policy.operator for signed, _ in found}) > 1:
            raise ConfigError(
                f"{config.policy} is of the cluster of {found[1][0].policy.operator}, and this "
                f"node joined the cluster of {found[0][0].policy.operator}",
                hint="remove `policy` from [plugins.auth_local]",
            )
        return max(found, key=lambda each: each[0].version)

    def _found(self, key: Key) -> None:
        """Sign and keep the cluster's first policy: the roles have what the services propose.

        Raises ConfigError.
        """
        try:
            first = Signed.open(Policy.first(key.peer_id, self._proposals).sign(key))
            self._save(first)
        except OSError as exc:
            raise ConfigError(
                f"cannot write the policy {self._file}: {exc.strerror}", hint=remedy(exc)
            ) from exc
        except InvalidArgument as exc:
            raise ConfigError(f"no policy can be made: {exc.message}", hint=exc.hint) from exc
        self._in_force = self._newest = first
        self._founder = None

    def _adopt_first(self, signed: Signed, *, joined: bool) -> None:
        if joined:
            # First, so that a crash in between does not make it take itself for the whole cluster.
            self.contact.save_now()
        self._save(signed)
        self._log.info("policy.adopted", version=signed.version, operator=signed.policy.operator)

    def _save(self, signed: Signed, *, ends: bool = False) -> None:
        """Make it durable, with reserved space if it `ends` something; raises OSError."""
        highest = json.dumps(_highest(signed)).encode()
        self._reserve.replace(self._file, signed.document(), must=ends)
        self._reserve.replace(self._highest_file, highest, must=ends)

    def _read_highest(self) -> dict[str, Any] | None:
        try:
            data = json.loads(self._highest_file.read_bytes())
            return {"version": int(data["version"]), "digest": str(data["digest"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ConfigError(
                f"{self._highest_file} is damaged: {exc}",
                hint="restore the data directory from a backup",
            ) from exc

    @property
    def policy(self) -> Policy:
        return self._in_force.policy

    @property
    def newest(self) -> Signed:
        """The latest document that this node accepted."""
        return self._newest

    async def put(self, document: bytes) -> tuple[Policy, int]:
        """Replace the policy by a version that descends from it.

        Returns the policy in force and how many (user, role) pairs it withdrew. Withdrawals take
        effect first and whatever happens; the members are told next; additions only once the
        document is on disk. Once begun it is carried out, also when the caller is cancelled, or
        ends with its own withdrawal.

        Raises InvalidArgument, PolicySignature, WrongCluster, StalePolicy, ForkedPolicy,
        PolicyOutOfReach, or PolicyNotSaved where the disk fails, with the withdrawals in force.
        """
        # A large document takes half a second to check: not on the loop.
        new = await self._run_sync(Signed.open, document)
        return await self._carry_out(new, by_operator=True)

    async def _carry_out(self, new: Signed, *, by_operator: bool = False) -> tuple[Policy, int]:
        self._founder = None  # there is a later policy
        task = asyncio.create_task(self._replace(new, by_operator), name="policy")
        self._puts.add(task)
        task.add_done_callback(self._put_done)
        return await asyncio.shield(task)

    def _put_done(self, task: asyncio.Task[tuple[Policy, int]]) -> None:
        self._puts.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._log.warning("policy.refused", why=exc)

    async def _replace(self, new: Signed, by_operator: bool) -> tuple[Policy, int]:
        async with self._lock:
            newest = self._newest
            if new.policy.operator != newest.policy.operator:
                raise WrongCluster(
                    f"the policy is of the cluster of {new.policy.operator}, not of this one"
                )
            relation = newest.judge(new)
            if relation is Relation.SAME and newest is self._in_force:
                self._is_sure(new, by_operator)
                return newest.policy, 0
            if relation is not Relation.SAME:  # else the disk failed, and may not this time
                self._check(newest, new, relation)
            old, self._newest = self._in_force.policy, new
            try:
                withdrawn = self._withdraw(old, new.policy)
            finally:
                self.spread.announce()
            ends = bool(lost_grants(old, new.policy))
            try:
                await self._run_sync(partial(self._save, new, ends=ends))
            except OSError as exc:
                self._log.exception("policy.not_saved", version=new.version)
                if ends and new.version > self._marked_version():
                    self._reserve.mark(_MARK.format(new.version))
                raise PolicyNotSaved(
                    f"what version {new.version} withdraws has ended, and the version could not be "
                    f"saved: {exc.strerror}",
                    hint="make room on the node's disk and run the command again",
                ) from exc
            self._in_force, self._by_key = new, _index(new.policy)
            self._is_sure(new, by_operator)
            self._log.info("policy.changed", version=new.version, withdrawn=withdrawn)
            return new.policy, withdrawn

    def _is_sure(self, new: Signed, by_operator: bool) -> None:
        """Take the mark back: `new` is on the disk, and what was withdrawn is in it.

        Not where a member passes on one that is older than the marked one, unless the operator puts
        it.
        """
        if by_operator or new.version >= self._marked_version():
            self._unsure = ""
            self._reserve.unmark()

    def _marked_version(self) -> float:
        """Of the mark; 0 where there is none, and later than all where it cannot be read."""
        if not (mark := self._reserve.marked):
            return 0
        found = re.match(r"version (\d+) ", mark)
        return int(found[1]) if found else math.inf

    def _check(self, newest: Signed, new: Signed, relation: Relation) -> None:
        if relation is Relation.NEWER:
            return
        if new.version < newest.version:
            raise StalePolicy(
                f"version {new.version} is older than version {newest.version}, which is in force"
            )
        if relation is Relation.OUT_OF_REACH:
            raise PolicyOutOfReach(
                f"version {new.version} is more than {HISTORY_MAX} versions later than version "
                f"{newest.version}, which is in force: nobody can tell whether it descends from it",
                hint="start this node afresh with the current document: see the README of "
                "auth_local",
            )
        self._log.warning("policy.fork", version=new.version, ours=newest.digest)
        raise ForkedPolicy(
            f"version {new.version} does not descend from version {newest.version}, which is "
            "in force: the policy was changed in two places",
            hint="run the command again, on top of the policy in force; if both are in force "
            "somewhere, `ww policy resolve`",
        )

    async def _settle(self) -> None:
        """Save what the disk refused; withdrawals have been in force since."""
        if self._reserve.missing:
            await self._run_sync(self._reserve.fill)
        if self._newest is not self._in_force:
            with contextlib.suppress(WetwareError):  # logged
                await self._carry_out(self._newest)

    def _withdraw(self, old: Policy, new: Policy) -> int:
        """Let what the new policy no longer grants end now, and not be granted again."""
        count = 0
        after = _index(new)
        narrowed = narrowed_roles(old, new)
        kept = {}
        events = []
        for key, roles in self._by_key.items():
            lost = roles - (after.get(key, frozenset()) - narrowed)
            kept[key] = roles - lost
            if lost:
                count += len(lost)
                why = f"version {new.version} of the policy withdraws {', '.join(sorted(lost))}"
                events.append(Withdrawn(Principal(self.name, key), frozenset(lost), why))
        self._by_key = kept  # before anybody is told: a login in between must not succeed
        self._watchers.tell_all(*events)
        return count

    # --- AuthBackend ------------------------------------------------------------------------------

    @property
    def founding(self) -> bytes:
        public = self.policy.operator.public_key
        if public is None:  # Policy.check refuses such a document
            raise ConfigError("the policy's operator is not an Ed25519 key")
        return public

    @property
    def epoch(self) -> int:
        """The version of the policy in force."""
        return self._in_force.version

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Keep the policy in step with the cluster's; at the end, finish changes under way.

        Decisions are taken from memory. Raises ConfigError where the first policy cannot be kept.
        """
        if self._founder is not None:
            self._found(self._founder)
        try:
            await self.spread.run(task_status=task_status)
        finally:
            with anyio.CancelScope(shield=True):
                if self._puts:
                    await asyncio.wait(self._puts)
                await self.contact.save(now=True)

    async def authenticate(self, challenge: Challenge, proof: Proof) -> Accept | Reject | NotMine:
        """The payload is the public key (32 bytes) and the signature (64).

        BACKEND_UNAVAILABLE while this node may not decide; see `Spread.why_stale`.
        """
        if proof.scheme != SCHEME:
            return NotMine()
        if len(proof.payload) != 96:
            return Reject(
                LoginStatus.MALFORMED, "a proof is a key of 32 and a signature of 64 bytes"
            )
        public, signature = proof.payload[:32], proof.payload[32:]
        if not verify(public, signature, challenge.signed_bytes()):
            return Reject(LoginStatus.BAD_SIGNATURE, "the signature does not match the challenge")
        subject = PeerId.from_public_key(public)
        if why := await self.spread.why_stale():
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, why)
        if self._unsure and subject != self.policy.operator:
            return Reject(LoginStatus.BACKEND_UNAVAILABLE, f"{self._unsure}, {_NOT_DURABLE}")
        if subject not in self._by_key:
            return Reject(LoginStatus.UNKNOWN_PRINCIPAL, f"{subject} is not a user of this cluster")
        return Accept(Principal(self.name, subject), self._by_key[subject])

    def roles(self, principal: Principal) -> frozenset[str]:
        if principal.backend != self.name:
            return frozenset()
        return self._by_key.get(principal.subject, frozenset())

    def profile(self, role: str) -> RoleProfile:
        return self.policy.profile(role)

    def findings(self) -> Iterable[Finding]:
        if self._unsure:
            yield Finding(
                "policy",
                "error",
                f"{self._unsure}, {_NOT_DURABLE}; the node admits its operator alone",
                "`ww policy export` shows what is in force; run the lost command again, or put the "
                "same again with `ww policy import`",
            )
        if self._reserve.missing and not self._reserve.fill():
            yield Finding(
                "policy",
                "error",
                f"there is no room for what a withdrawal needs on a full disk "
                f"({self._reserve.missing})",
                "free disk space under the node's data directory; `ww doctor` again",
            )
        yield from self.spread.findings()

    async def join_document(self) -> bytes:
        return self._newest.document()

    async def admit_node(self, peer: PeerId) -> bool:
        """No veto: nodes are admitted by the cluster's own means."""
        return True

    def watch(
        self, callback: Callable[[Withdrawn | Suspended | Resumed], None]
    ) -> Callable[[], None]:
        return self._watchers.add(callback)


def _highest(signed: Signed) -> dict[str, Any]:
    return {"version": signed.version, "digest": signed.digest}


def _index(policy: Policy) -> dict[str, frozenset[str]]:
    return {str(user.key): user.roles for user in policy.users.values()}


def _operator_key() -> tuple[Key, Path]:
    """The user's default key, made if there is none: the first start creates the operator."""
    choice = KeyChoice(None, None, None)
    try:
        return choice.load(), choice.path
    except KeyFileError as exc:
        if exc.code != "key.missing":
            raise
    key = Key.generate()
    key.save(choice.path, passphrase=paths.variable("WW_PASSPHRASE"))
    return key, choice.path


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the policy {path}: {exc.strerror}") from exc


def _open(document: bytes, source: Path | str, hint: str) -> Signed:
    try:
        return Signed.open(document)
    except WetwareError as exc:
        raise ConfigError(f"the policy {source} is damaged: {exc.message}", hint=hint) from exc


class PolicyServant(rpc.Servant, interface=SCHEMA.PolicyStore):
    """See auth_local.capnp."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    async def get(self) -> dict[str, object]:
        newest = self._backend.newest
        return {
            "document": newest.document(),
            "version": newest.version,
            "operator": str(newest.policy.operator),
        }

    async def put(self, document: bytes) -> dict[str, object]:
        policy, withdrawn = await self._backend.put(document)
        return {"version": policy.version, "withdrawn": withdrawn}

    async def status(self) -> dict[str, object]:
        """How this node's policy relates to the cluster's."""
        backend = self._backend
        contact, spread, newest = backend.contact, backend.spread, backend.newest
        age_s = contact.age_s if contact.met else 0.0
        return {
            "status": {
                "version": newest.version,
                "digest": newest.digest,
                "saved": backend.policy.version == newest.version,
                "alone": not contact.met,
                "age_s": age_s if math.isfinite(age_s) else -1.0,
                "members": spread.members,
                "refused": spread.refused.total(),
                "divergences": [
                    {
                        "kind": divergence.kind.value,
                        "version": divergence.signed.version,
                        "digest": digest,
                        "peer": str(divergence.peer),
                    }
                    for digest, divergence in spread.divergences.items()
                ],
            }
        }

    async def divergent(self, digest: str) -> dict[str, object]:
        divergence = self._backend.spread.divergences.get(digest)
        if divergence is None:
            raise NotFound(
                f"this node knows no document {digest[:80]!r} of another branch",
                hint="ww policy status",
            )
        return {"document": divergence.signed.document()}


class PolicyService(Service):
    """The service `auth_local`: the policy document, for operators."""

    name = "auth_local"
    interface = SCHEMA.PolicyStore
    # A policy is its own record: a version, signed by the operator.
    ending = frozenset({f"PolicyStore.{name}" for name in ("get", "put", "status", "divergent")})

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        """A fresh servant; the broker guards it."""
        return PolicyServant(self._backend)
