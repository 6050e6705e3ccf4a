"""The auth backend: decides from the signed policy document, which it keeps and guards."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wetware import paths, rpc
from wetware.broker.grants import pattern_within
from wetware.client import KeyChoice
from wetware.errors import ConfigError, KeyFileError, WetwareError
from wetware.hookspecs import (
    Accept,
    NotMine,
    PluginContext,
    Reject,
    RoleProfile,
    Service,
    Withdrawn,
)
from wetware.identity import (
    Challenge,
    Key,
    LoginStatus,
    PeerId,
    Principal,
    Proof,
    replace_private_file,
    verify,
)
from wetware_auth_local.client import SCHEMA
from wetware_auth_local.policy import (
    DOCUMENT_BYTES_MAX,
    ForkedPolicy,
    Policy,
    PolicyNotSaved,
    StalePolicy,
    WrongCluster,
)
from wetware_auth_local.signer import SCHEME

if TYPE_CHECKING:
    from wetware_auth_local.plugin import AuthLocalConfig

POLICY_FILE = "policy.json"
HIGHEST_FILE = "highest.json"
"""Version and digest of the latest policy this node has had: it refuses to go back, also when
somebody restores an old policy file."""
BACKEND = "local"


class LocalBackend:
    """Users and roles of one cluster, from memory; every change is on disk before it is granted.

    Raises ConfigError (also KeyFileError) where the policy cannot be read or made: there is no
    weaker fallback.
    """

    name = BACKEND
    schemes = (SCHEME,)

    def __init__(self, ctx: PluginContext) -> None:
        config: AuthLocalConfig = ctx.config
        self._log = ctx.log
        self._file = ctx.data_dir / POLICY_FILE
        self._watchers: dict[int, Callable[[Withdrawn], None]] = {}
        self._highest_file = ctx.data_dir / HIGHEST_FILE
        self._puts: set[asyncio.Task[tuple[Policy, int]]] = set()
        self._lock = asyncio.Lock()
        self._policy = self._load(config)
        self._by_key = _index(self._policy)
        self.services: tuple[Service, ...] = (PolicyService(self),)

    # --- the document -----------------------------------------------------------------------------

    def _load(self, config: AuthLocalConfig) -> Policy:
        highest = self._read_highest()
        given = None if config.policy is None else _read(config.policy.expanduser())
        if not self._file.exists():
            if highest is not None:
                raise ConfigError(
                    f"the policy {self._file} is gone, and this node has had version "
                    f"{highest['version']} of it",
                    hint="restore it from a backup, or from another node",
                )
            if given is not None:
                policy = _open(given, config.policy, "export it again with `ww policy export`")
                self._save(policy, given)
                self._log.info("policy.adopted", version=policy.version, operator=policy.operator)
                return policy
            key, path = _operator_key()
            policy = Policy.first(key.peer_id)
            self._save(policy, policy.sign(key))
            self._log.info("policy.created", operator=key.peer_id, key=path)
            return policy
        policy = _open(_read(self._file), self._file, "restore it from a backup, or another node")
        if given is not None:
            wanted = _open(given, config.policy, "export it again with `ww policy export`")
            if wanted.operator != policy.operator:
                raise ConfigError(
                    f"this node belongs to the cluster of {policy.operator}, and {config.policy} "
                    f"is of the cluster of {wanted.operator}",
                    hint="give the other cluster a data directory of its own, with --data-dir",
                )
        if highest is not None:
            seen = (highest["version"], highest["digest"])
            if policy.version < seen[0] or (policy.version == seen[0] and policy.digest != seen[1]):
                raise ConfigError(
                    f"the policy {self._file} is version {policy.version}, and this node has had "
                    f"another version {seen[0]}: it does not go back",
                    hint="restore the later one from a backup, or from another node",
                )
        self._save_highest(policy)  # a crash may have come between the two files
        return policy

    def _save(self, policy: Policy, document: bytes) -> None:
        replace_private_file(self._file, document)
        self._save_highest(policy)

    def _save_highest(self, policy: Policy) -> None:
        highest = {"version": policy.version, "digest": policy.digest}
        replace_private_file(self._highest_file, json.dumps(highest).encode())

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
        """The policy in force."""
        return self._policy

    def document(self) -> bytes:
        """The signed document in force."""
        return self._file.read_bytes()

    async def put(self, document: bytes) -> tuple[Policy, int]:
        """Replace the policy by a version that descends from it.

        Returns the policy in force and how many (user, role) pairs it withdrew. Withdrawals take
        effect first and whatever happens; additions only once the document is on disk. Once begun
        it is carried out, also when the caller is cancelled, or ends with its own withdrawal.

        Raises InvalidArgument, PolicySignature, WrongCluster, StalePolicy, ForkedPolicy, or
        PolicyNotSaved where the disk fails, with the withdrawals in force.
        """
        # A large document takes half a second to check: not on the loop.
        new = await asyncio.to_thread(Policy.open, document)
        task = asyncio.create_task(self._replace(new, document), name="policy")
        self._puts.add(task)
        task.add_done_callback(self._put_done)
        return await asyncio.shield(task)

    def _put_done(self, task: asyncio.Task[tuple[Policy, int]]) -> None:
        self._puts.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._log.warning("policy.refused", why=exc)

    async def _replace(self, new: Policy, document: bytes) -> tuple[Policy, int]:
        async with self._lock:
            old = self._policy
            if new.operator != old.operator:
                raise WrongCluster(
                    f"the policy is of the cluster of {new.operator}, not of this one"
                )
            if new.version == old.version and new.digest == old.digest:
                return old, 0
            if new.version < old.version:
                raise StalePolicy(
                    f"version {new.version} is older than version {old.version}, which is in force"
                )
            if not new.descends_from(old):
                self._log.warning("policy.fork", version=new.version, ours=old.digest)
                raise ForkedPolicy(
                    f"version {new.version} does not descend from version {old.version}, which is "
                    "in force: the policy was changed in two places",
                    hint="run the command again, on top of the policy in force",
                )
            withdrawn = self._withdraw(old, new)
            try:
                await asyncio.to_thread(self._save, new, document)
            except OSError as exc:
                self._log.exception("policy.not_saved", version=new.version)
                raise PolicyNotSaved(
                    f"what version {new.version} withdraws has ended, and the version could not be "
                    f"saved: {exc.strerror}",
                    hint="make room on the node's disk and run the command again",
                ) from exc
            self._policy, self._by_key = new, _index(new)
            self._log.info("policy.changed", version=new.version, withdrawn=withdrawn)
            return new, withdrawn

    def _withdraw(self, old: Policy, new: Policy) -> int:
        """Let what the new policy no longer grants end now, and not be granted again."""
        count = 0
        after = _index(new)
        narrowed = {role for role, has in old.roles.items() if not _covers(new, role, has)}
        kept = {}
        events = []
        for key, roles in self._by_key.items():
            lost = roles - (after.get(key, frozenset()) - narrowed)
            kept[key] = roles - lost
            if lost:
                count += len(lost)
                why = f"version {new.version} of the policy withdraws {', '.join(sorted(lost))}"
                events.append(Withdrawn(Principal(BACKEND, key), frozenset(lost), why))
        self._by_key = kept  # before anybody is told: a login in between must not succeed
        for event in events:
            for callback in tuple(self._watchers.values()):
                callback(event)
        return count

    # --- AuthBackend ------------------------------------------------------------------------------

    @property
    def founding(self) -> bytes:
        """The operator's public key."""
        public = self._policy.operator.public_key
        if public is None:  # Policy.check refuses such a document
            raise ConfigError("the policy's operator is not an Ed25519 key")
        return public

    @property
    def epoch(self) -> int:
        """The version of the policy in force."""
        return self._policy.version

    async def run(self, ready: Callable[[], None]) -> None:
        """Decisions are taken from memory; at the end, changes under way are finished."""
        ready()
        try:
            await asyncio.Event().wait()
        finally:
            if self._puts:
                await asyncio.wait(self._puts)

    async def authenticate(self, challenge: Challenge, proof: Proof) -> Accept | Reject | NotMine:
        """The payload is the public key (32 bytes) and the signature (64)."""
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
        if subject not in self._by_key:
            return Reject(LoginStatus.UNKNOWN_PRINCIPAL, f"{subject} is not a user of this cluster")
        return Accept(Principal(BACKEND, subject), self._by_key[subject])

    def roles(self, principal: Principal) -> frozenset[str]:
        """From memory."""
        if principal.backend != BACKEND:
            return frozenset()
        return self._by_key.get(principal.subject, frozenset())

    def profile(self, role: str) -> RoleProfile:
        """From memory."""
        return RoleProfile(dict(self._policy.roles.get(role, {})))

    async def admit_node(self, peer: PeerId) -> bool:
        """No veto: nodes are admitted by the cluster's own means."""
        return True

    def watch(self, callback: Callable[[Withdrawn], None]) -> Callable[[], None]:
        """See AuthBackend."""
        token = id(callback)
        self._watchers[token] = callback
        return lambda: self._watchers.pop(token, None) and None


def _index(policy: Policy) -> dict[str, frozenset[str]]:
    return {str(user.key): user.roles for user in policy.users.values()}


def _covers(policy: Policy, role: str, before: Mapping[str, frozenset[str]]) -> bool:
    """Whether the role still has all that it had: if not, the sessions it granted end."""
    now = RoleProfile(policy.roles.get(role, {}))
    return all(
        pattern_within(pattern, now.patterns(service))
        for service, patterns in before.items()
        for pattern in patterns
    )


def _operator_key() -> tuple[Key, Path]:
    """The user's default key, made if there is none: the first start creates the operator."""
    choice = KeyChoice(None, paths.keys_dir(), None)
    try:
        return choice.load(), choice.path
    except KeyFileError as exc:
        if exc.code != "key.missing":
            raise
    key = Key.generate()
    key.save(choice.path, passphrase=os.environ.get("WW_PASSPHRASE") or None)
    return key, choice.path


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the policy {path}: {exc.strerror}") from exc


def _open(document: bytes, path: Path | None, hint: str) -> Policy:
    try:
        return Policy.open(document)
    except WetwareError as exc:
        raise ConfigError(f"the policy {path} is damaged: {exc.message}", hint=hint) from exc


class PolicyServant(rpc.Servant, interface=SCHEMA.PolicyStore):
    """See auth_local.capnp."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    async def get(self) -> dict[str, object]:
        """The document in force."""
        policy = self._backend.policy
        return {
            "document": self._backend.document(),
            "version": policy.version,
            "operator": str(policy.operator),
        }

    async def put(self, document: bytes) -> dict[str, object]:
        """Replace it."""
        policy, withdrawn = await self._backend.put(document)
        return {"version": policy.version, "withdrawn": withdrawn}


class PolicyService:
    """The service `auth_local`: the policy document, for operators."""

    name = "auth_local"
    interface = SCHEMA.PolicyStore

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    async def run(self, ready: Callable[[], None]) -> None:
        """Nothing to run."""
        ready()
        await asyncio.Event().wait()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        """A fresh servant; the broker guards it."""
        return PolicyServant(self._backend)
