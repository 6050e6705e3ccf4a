"""The policy document: users and roles of a cluster, versioned and signed by the operator's key.

On disk and on the wire it is JSON `{"policy": {…}, "signature": hex}`; the signature covers a
domain and the canonical form of `policy`. As TOML it is for people: `ww policy export --toml`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wetware.errors import AuthError, InvalidArgument, WetwareError
from wetware.identity import Key, PeerId, verify

DOMAIN = b"wetware-policy:1\n"
DOCUMENT_BYTES_MAX = 512 << 10
"""Half of an RPC message; about 4,000 users."""
VERSION_MAX = 2**53 - 1
"""What every JSON reader keeps exactly."""
HISTORY_MAX = 128
"""A node that missed more versions than this needs the operator's hand."""
DIGEST = re.compile(r"[0-9a-f]{64}\Z")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}\Z")
PATTERN = re.compile(r"(\*|[A-Za-z]\w{0,63}\.(\*|[a-z]\w{0,63}))\Z")
SERVICE = re.compile(r"(\*|[a-z]\w{0,63})\Z")

ADMIN, MEMBER = "admin", "member"


class PolicySignature(AuthError):
    """The document is not signed by the operator of this cluster."""

    code = "auth_local.signature"


class StalePolicy(AuthError):
    """The document is older than the one in force."""

    code = "auth_local.stale"


class ForkedPolicy(AuthError):
    """Another document with the same version is in force."""

    code = "auth_local.fork"


class PolicyNotSaved(WetwareError):
    """The disk failed: what the document withdraws has ended, what it adds is not granted."""

    code = "auth_local.not_saved"


class WrongCluster(AuthError):
    """The document belongs to another operator's cluster."""

    code = "auth_local.cluster"


def _bad(why: str, hint: str = "") -> InvalidArgument:
    return InvalidArgument(f"bad policy: {why}", hint=hint, code="invalid.policy")


@dataclass(frozen=True, slots=True)
class User:
    """A user: the peer ID of their key, and their roles."""

    key: PeerId
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Policy:
    """Users and roles of a cluster.

    Attributes:
        version: 1 for the first; a change adds one.
        operator: Peer ID of the key that signs; it names the cluster.
        users: By name.
        roles: By name: service or "*" → method patterns ("*", "Interface.*", "Interface.method").
        history: SHA-256 of the versions before, hex, the latest first, at most HISTORY_MAX: what
            a later version must descend from.
    """

    version: int
    operator: PeerId
    users: Mapping[str, User] = field(default_factory=dict)
    roles: Mapping[str, Mapping[str, frozenset[str]]] = field(default_factory=dict)
    history: tuple[str, ...] = ()

    @classmethod
    def first(cls, operator: PeerId) -> Policy:
        """The policy of a new cluster: its operator is its only user, and its admin."""
        return cls(
            version=1,
            operator=operator,
            users={"operator": User(operator, frozenset({ADMIN}))},
            roles={
                ADMIN: {"*": frozenset({"*"})},
                MEMBER: {"pubsub": frozenset({"*"})},
            },
        )

    # --- questions --------------------------------------------------------------------------------

    def roles_of(self, key: str) -> frozenset[str]:
        """The roles of the user with that key; empty for a stranger."""
        for user in self.users.values():
            if user.key == key:
                return user.roles
        return frozenset()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def descends_from(self, older: Policy) -> bool:
        """Whether `older` is among the versions that this one was made from."""
        back = self.version - older.version
        return 1 <= back <= len(self.history) and self.history[back - 1] == older.digest

    # --- changes ----------------------------------------------------------------------------------

    def next(
        self,
        *,
        users: Mapping[str, User] | None = None,
        roles: Mapping[str, Mapping[str, frozenset[str]]] | None = None,
    ) -> Policy:
        """The next version, with users or roles replaced; raises InvalidArgument."""
        changed = replace(
            self,
            version=self.version + 1,
            history=(self.digest, *self.history)[:HISTORY_MAX],
            users=self.users if users is None else users,
            roles=self.roles if roles is None else roles,
        )
        changed.check()
        return changed

    def check(self) -> None:
        """Raise InvalidArgument where the document contradicts itself or locks the operator out."""
        if not 1 <= self.version <= VERSION_MAX:
            raise _bad(f"version {self.version} is not between 1 and {VERSION_MAX}")
        if len(self.history) != min(self.version - 1, HISTORY_MAX):
            raise _bad(f"version {self.version} cannot have {len(self.history)} versions before it")
        keys: dict[str, str] = {}
        for name, user in self.users.items():
            _check_name("user", name)
            if user.key.public_key is None:
                raise _bad(f"the key of user {name!r} is not an Ed25519 key")
            if (other := keys.setdefault(user.key, name)) != name:
                raise _bad(f"users {other!r} and {name!r} have the same key")
            if unknown := user.roles - self.roles.keys():
                have = ", ".join(sorted(self.roles)) or "none"
                raise _bad(
                    f"user {name!r} has the role {min(unknown)!r}, which does not exist",
                    f"roles are: {have}; `ww role set {min(unknown)} SERVICE` makes one",
                )
        for name, services in self.roles.items():
            _check_name("role", name)
            for service, patterns in services.items():
                if not SERVICE.match(service):
                    raise _bad(f"role {name!r}: {service!r} is not a service's name")
                for pattern in patterns:
                    if not PATTERN.match(pattern):
                        raise _bad(
                            f"role {name!r}: {pattern!r} is not a method pattern",
                            'write "*", "Interface.*" or "Interface.method"',
                        )
        if not any(self._may_put(role) for role in self.roles_of(self.operator)):
            raise _bad(
                "the operator would lose the right to change it",
                f"keep a user with the key {self.operator} and a role that covers auth_local",
            )

    def _may_put(self, role: str) -> bool:
        services = self.roles.get(role, {})
        patterns = services.get("auth_local", frozenset()) | services.get("*", frozenset())
        return bool(patterns & {"*", "PolicyStore.*", "PolicyStore.put"})

    # --- forms ------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain values, sorted, for JSON and TOML."""
        return {
            "version": self.version,
            "operator": str(self.operator),
            "history": list(self.history),
            "users": {
                name: {"key": str(user.key), "roles": sorted(user.roles)}
                for name, user in sorted(self.users.items())
            },
            "roles": {
                name: {service: sorted(patterns) for service, patterns in sorted(services.items())}
                for name, services in sorted(self.roles.items())
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> Policy:
        """The inverse of `as_dict`; raises InvalidArgument that names the field."""
        top = _table(data, "the policy", {"version", "operator", "history", "users", "roles"})
        version = top.get("version")
        if not isinstance(version, int) or isinstance(version, bool):
            raise _bad("version is not a whole number")
        history = top.get("history", [])
        if not isinstance(history, list) or len(history) > HISTORY_MAX:
            raise _bad(f"history is not a list of at most {HISTORY_MAX}")
        if not all(isinstance(item, str) and DIGEST.match(item) for item in history):
            raise _bad("history is not a list of SHA-256 in hex")
        policy = cls(
            version=version,
            operator=_peer(top.get("operator"), "operator"),
            users=users_from_dict(top.get("users", {})),
            roles=roles_from_dict(top.get("roles", {})),
            history=tuple(history),
        )
        policy.check()
        return policy

    def canonical(self) -> bytes:
        """The bytes that are signed, without the domain."""
        return json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":")).encode()

    def sign(self, key: Key) -> bytes:
        """The signed document; raises PolicySignature unless `key` is the operator's."""
        self.check()
        if key.peer_id != self.operator:
            raise PolicySignature(
                f"only the operator's key {self.operator} can sign this cluster's policy, "
                f"not {key.peer_id}",
                hint="choose the operator's key with `ww --key NAME …`",
            )
        signature = key.sign(DOMAIN + self.canonical()).hex()
        document = json.dumps({"policy": self.as_dict(), "signature": signature}, indent=1)
        if len(document) > DOCUMENT_BYTES_MAX:
            raise _bad(f"larger than {DOCUMENT_BYTES_MAX} bytes")
        return document.encode()

    @classmethod
    def open(cls, document: bytes) -> Policy:
        """Parse a signed document and check its signature.

        Raises InvalidArgument (malformed) or PolicySignature. Whether the operator is the right one
        is for the caller to compare.
        """
        if len(document) > DOCUMENT_BYTES_MAX:
            raise _bad(f"larger than {DOCUMENT_BYTES_MAX} bytes")
        try:
            envelope = json.loads(document)
        except (ValueError, RecursionError) as exc:
            raise _bad(f"not JSON: {exc}") from None
        top = _table(envelope, "the document", {"policy", "signature"})
        try:
            signature = bytes.fromhex(str(top.get("signature")))
        except ValueError:
            raise _bad("the signature is not hex") from None
        policy = cls.from_dict(top.get("policy"))
        public = policy.operator.public_key
        if public is None or not verify(public, signature, DOMAIN + policy.canonical()):
            raise PolicySignature(f"the signature is not by the operator {policy.operator}")
        return policy

    def to_toml(self) -> str:
        """For people and version control; `ww policy import` reads it back."""
        lines = [
            "# Policy of a wetware cluster. Edit users and roles, then: ww policy import FILE",
            f"version = {self.version}",
            f'operator = "{self.operator}"',
        ]
        for name, user in sorted(self.users.items()):
            lines += [
                f'\n[users."{name}"]',
                f'key = "{user.key}"',
                f"roles = {json.dumps(sorted(user.roles))}",
            ]
        for name, services in sorted(self.roles.items()):
            lines.append(f'\n[roles."{name}"]')
            lines += [f'"{s}" = {json.dumps(sorted(p))}' for s, p in sorted(services.items())]
        return "\n".join(lines) + "\n"


def from_toml(text: str) -> tuple[dict[str, User], dict[str, dict[str, frozenset[str]]]]:
    """Users and roles of a TOML policy; its version and operator are for information only."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise _bad(f"not TOML: {exc}") from None
    top = _table(data, "the policy", {"version", "operator", "history", "users", "roles"})
    return users_from_dict(top.get("users", {})), roles_from_dict(top.get("roles", {}))


def users_from_dict(data: Any) -> dict[str, User]:
    """`{name: {key, roles}}` → users; raises InvalidArgument."""
    users = {}
    for name, entry in _table(data, "users").items():
        fields = _table(entry, f"user {name!r}", {"key", "roles"})
        roles = _texts(fields.get("roles", []), f"the roles of user {name!r}")
        users[name] = User(_peer(fields.get("key"), f"the key of user {name!r}"), roles)
    return users


def roles_from_dict(data: Any) -> dict[str, dict[str, frozenset[str]]]:
    """`{name: {service: [pattern]}}` → roles; raises InvalidArgument."""
    return {
        name: {
            service: _texts(patterns, f"role {name!r}, service {service!r}")
            for service, patterns in _table(services, f"role {name!r}").items()
        }
        for name, services in _table(data, "roles").items()
    }


def _table(value: Any, what: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{what} is not a table")
    if known is not None and (extra := sorted(value.keys() - set(known))):
        raise _bad(
            f"{what} has an unknown field {extra[0]!r}", f"known: {', '.join(sorted(known))}"
        )
    return value


def _texts(value: Any, what: str) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _bad(f"{what} is not a list of strings")
    return frozenset(value)


def _peer(value: Any, what: str) -> PeerId:
    if not isinstance(value, str):
        raise _bad(f"{what} is missing")
    try:
        return PeerId.parse(value)
    except WetwareError as exc:
        raise _bad(f"{what}: {exc.message}", "`ww key show` prints a key") from None


def _check_name(kind: str, name: str) -> None:
    if not NAME.match(name):
        raise _bad(
            f"{name[:80]!r} is not a {kind}'s name",
            "use up to 64 lower-case letters, digits, '.', '_' and '-'",
        )
