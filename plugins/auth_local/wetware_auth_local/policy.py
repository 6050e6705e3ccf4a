"""The policy document: users and roles of a cluster, versioned and signed by the operator's key.

On disk it is JSON `{"policy": {…}, "signature": hex}`; the signature covers a domain and the
canonical form of `policy`. Between nodes travel the canonical form and the signature, so that
nothing is parsed before its signature is known to be good. As TOML it is for people:
`ww policy export --toml`.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from wetware.broker.methods import is_pattern, is_service, pattern_within
from wetware.broker.where import WHERE_MAX
from wetware.errors import AuthError, InvalidArgument, WetwareError
from wetware.hookspecs import RoleProfile, Where
from wetware.identity import Key, PeerId, from_hex, verify

DOMAIN = b"wetware-policy:1\n"
DOCUMENT_BYTES_MAX = 512 << 10
"""Half of an RPC message; about 4,000 users."""
VERSION_MAX = 2**53 - 1
"""What every JSON reader keeps exactly."""
HISTORY_MAX = 128
"""A node that missed more versions than this needs the operator's hand."""
SUPERSEDED_MAX = 256
"""Digests of branches that were given up: two whole histories, 17 KB."""
DIGEST = re.compile(r"[0-9a-f]{64}\Z")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}\Z")

ADMIN, MEMBER, READER = "admin", "member", "reader"
WHERE = "where"
"""In a role's table: service → constraints. A table, so that it is no service of that name."""

Roles: TypeAlias = Mapping[str, Mapping[str, frozenset[str]]]
"""Role → service or "*" → method patterns ("*", "Interface.*", "Interface.method")."""
Wheres: TypeAlias = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Role → service → constraints on arguments, sorted: docs/reference/constraints.md."""

_FIELDS = frozenset({"version", "operator", "history", "supersedes", "users", "roles"})


class PolicySignature(AuthError):
    """The document is not signed by the operator of this cluster."""

    code = "auth_local.signature"


class StalePolicy(AuthError):
    """The document is older than the one in force."""

    code = "auth_local.stale"


class ForkedPolicy(AuthError):
    """Another document with the same version is in force."""

    code = "auth_local.fork"


class PolicyOutOfReach(AuthError):
    """So many versions were missed that nobody can tell whether the document descends from ours."""

    code = "auth_local.out_of_reach"


class PolicyNotSaved(WetwareError):
    """The disk failed: what the document withdraws has ended, what it adds is not granted."""

    code = "auth_local.not_saved"


class WrongCluster(AuthError):
    """The document belongs to another operator's cluster."""

    code = "auth_local.cluster"


def _bad(why: str, hint: str = "") -> InvalidArgument:
    return InvalidArgument(f"bad policy: {why}", hint=hint, code="invalid.policy")


class Relation(enum.Enum):
    """What a document is to the one in force."""

    SAME = "same"
    NEWER = "newer"
    """It descends from the one in force, or supersedes its branch: it replaces it."""
    OLDER = "older"
    FORK = "fork"
    """Neither descends from the other: the policy was changed in two places."""
    OUT_OF_REACH = "out_of_reach"
    """Later by more versions than its history names."""


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
        roles: What each allows.
        history: SHA-256 of the versions before, hex, the latest first, at most HISTORY_MAX: what
            a later version must descend from.
        supersedes: SHA-256, hex, of versions on branches that the operator gave up, the latest
            first, at most SUPERSEDED_MAX: a node that has one of them accepts this version. Carried
            on by later versions. Absent from the document while there are none.
        where: What the arguments of a role's calls have to be, in addition; absent likewise.
    """

    version: int
    operator: PeerId
    users: Mapping[str, User] = field(default_factory=dict)
    roles: Roles = field(default_factory=dict)
    history: tuple[str, ...] = ()
    supersedes: tuple[str, ...] = ()
    where: Wheres = field(default_factory=dict)

    @classmethod
    def first(
        cls, operator: PeerId, proposals: Mapping[str, Mapping[str, frozenset[str]]] | None = None
    ) -> Policy:
        """The policy of a new cluster: its operator is its only user, and its admin.

        The standard roles get what each service (name → role → patterns) proposes for them.
        """
        policy = cls(
            version=1,
            operator=operator,
            users={"operator": User(operator, frozenset({ADMIN}))},
            roles={ADMIN: {"*": frozenset({"*"})}, MEMBER: {}, READER: {}},
        )
        for service, proposal in (proposals or {}).items():
            policy = replace(policy, roles=policy._with(service, proposal))
        return policy

    # --- questions --------------------------------------------------------------------------------

    def roles_of(self, key: str) -> frozenset[str]:
        """The roles of the user with that key; empty for a stranger."""
        for user in self.users.values():
            if user.key == key:
                return user.roles
        return frozenset()

    def profile(self, role: str) -> RoleProfile:
        """What a role allows; nothing if there is none of that name."""
        return RoleProfile(dict(self.roles.get(role, {})), self.constraints(role))

    def constraints(self, role: str) -> tuple[Where, ...]:
        """Of a role; raises InvalidArgument where one is not in the grammar."""
        services = self.where.get(role)
        if not services:
            return ()
        return tuple(
            Where.parse(text, service)
            for service, texts in sorted(services.items())
            for text in texts
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()

    def replaces(self, version: int, digest: str) -> bool:
        """Whether that version is among those that this one was made from, or supersedes."""
        back = self.version - version
        if back < 1:
            return False
        return digest in self.supersedes or (
            back <= len(self.history) and self.history[back - 1] == digest
        )

    def descends_from(self, older: Policy) -> bool:
        """Whether `older` is among the versions that this one was made from, or supersedes."""
        return self.replaces(older.version, older.digest)

    # --- changes ----------------------------------------------------------------------------------

    def accept(self, service: str, proposal: Mapping[str, frozenset[str]]) -> Policy:
        """The next version, in which roles have what a service proposes for them, too.

        A role that is not there is made. Returns this version where nothing is lacking; raises
        InvalidArgument.
        """
        if not self.lacking(service, proposal):
            return self
        return self.next(roles=self._with(service, proposal))

    def lacking(
        self, service: str, proposal: Mapping[str, frozenset[str]]
    ) -> dict[str, frozenset[str]]:
        """Role → patterns of a service that are proposed for it, and that it does not have."""
        found = {}
        for role, patterns in proposal.items():
            have = RoleProfile(self.roles.get(role, {})).patterns(service)
            if new := frozenset(p for p in patterns if not pattern_within(p, have)):
                found[role] = new
        return found

    def _with(self, service: str, proposal: Mapping[str, frozenset[str]]) -> Roles:
        roles = {role: dict(services) for role, services in self.roles.items()}
        for role, new in self.lacking(service, proposal).items():
            services = roles.setdefault(role, {})
            services[service] = services.get(service, frozenset()) | new
        return roles

    def next(
        self,
        *,
        users: Mapping[str, User] | None = None,
        roles: Roles | None = None,
        where: Wheres | None = None,
        supersedes: tuple[str, ...] | None = None,
    ) -> Policy:
        """The next version, with users or roles replaced; raises InvalidArgument.

        Constraints stay, unless `where` replaces them or `roles` has nothing left that they are on.
        """
        roles = self.roles if roles is None else roles
        changed = replace(
            self,
            version=self.version + 1,
            history=(self.digest, *self.history)[:HISTORY_MAX],
            supersedes=self.supersedes if supersedes is None else supersedes,
            users=self.users if users is None else users,
            roles=roles,
            where=_applicable(self.where, roles) if where is None else _sorted(where),
        )
        changed.check()
        return changed

    def check(self) -> None:
        """Raise InvalidArgument where the document contradicts itself or locks the operator out."""
        if not 1 <= self.version <= VERSION_MAX:
            raise _bad(f"version {self.version} is not between 1 and {VERSION_MAX}")
        if len(self.history) != min(self.version - 1, HISTORY_MAX):
            raise _bad(f"version {self.version} cannot have {len(self.history)} versions before it")
        if len(self.supersedes) > SUPERSEDED_MAX:
            raise _bad(f"supersedes names more than {SUPERSEDED_MAX} versions")
        if not set(self.supersedes).isdisjoint(self.history):
            raise _bad("it supersedes a version that it was made from")
        keys: dict[str, str] = {}
        for name, user in self.users.items():
            _check_name("user", name)
            if user.key.public_key is None:
                raise _bad(f"the key of user {name!r} is not an Ed25519 key")
            if (other := keys.setdefault(user.key, name)) != name:
                raise _bad(f"users {other!r} and {name!r} have the same key")
            # Not as a difference of sets: that looks at all roles, for each user.
            if unknown := [role for role in user.roles if role not in self.roles]:
                have = ", ".join(sorted(self.roles)) or "none"
                raise _bad(
                    f"user {name!r} has the role {min(unknown)!r}, which does not exist",
                    f"roles are: {have}; `ww role set {min(unknown)} SERVICE` makes one",
                )
        for name, services in self.roles.items():
            _check_name("role", name)
            for service, patterns in services.items():
                if not is_service(service):
                    raise _bad(f"role {name!r}: {service!r} is not a service's name")
                for pattern in patterns:
                    if not is_pattern(pattern):
                        raise _bad(
                            f"role {name!r}: {pattern!r} is not a method pattern",
                            'write "*", "Interface.*" or "Interface.method"',
                        )
        for name in self.where:
            self._check_where(name)
        if not any(self._may_put(role) for role in self.roles_of(self.operator)):
            raise _bad(
                "the operator would lose the right to change it",
                f"keep a user with the key {self.operator} and a role that covers auth_local",
            )

    def _check_where(self, role: str) -> None:
        if role not in self.roles:
            raise _bad(f"there are constraints of a role {role!r}, which does not exist")
        if WHERE in self.roles[role]:  # both would be under that key of the role's table
            raise _bad(
                f"role {role!r} names a service {WHERE!r} and has constraints",
                "grant that service by a role of its own",
            )
        allowed = RoleProfile(self.roles[role])
        for service in self.where[role]:
            if service == "*":
                raise _bad(
                    f"role {role!r} has constraints of every service", "name the service of each"
                )
            if not allowed.patterns(service):
                raise _bad(f"role {role!r} has constraints of {service!r}, which it does not cover")
        try:
            count = len(self.constraints(role))
        except InvalidArgument as exc:
            raise _bad(f"role {role!r}: {exc.message}", exc.hint) from None
        if count > WHERE_MAX:
            raise _bad(f"role {role!r} has {count} constraints; {WHERE_MAX} are allowed")

    def _may_put(self, role: str) -> bool:
        services = self.roles.get(role, {})
        patterns = services.get("auth_local", frozenset()) | services.get("*", frozenset())
        return bool(patterns & {"*", "PolicyStore.*", "PolicyStore.put"})

    # --- forms ------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain values, sorted, for JSON and TOML."""
        data: dict[str, Any] = {
            "version": self.version,
            "operator": str(self.operator),
            "history": list(self.history),
            "users": {
                name: {"key": str(user.key), "roles": sorted(user.roles)}
                for name, user in sorted(self.users.items())
            },
            "roles": {
                name: self._role_as_dict(name, services)
                for name, services in sorted(self.roles.items())
            },
        }
        if self.supersedes:
            data["supersedes"] = list(self.supersedes)
        return data

    def _role_as_dict(self, name: str, services: Mapping[str, frozenset[str]]) -> dict[str, Any]:
        role: dict[str, Any] = {
            service: sorted(patterns) for service, patterns in sorted(services.items())
        }
        if where := self.where.get(name):
            role[WHERE] = {service: list(texts) for service, texts in sorted(where.items())}
        return role

    @classmethod
    def from_dict(cls, data: Any) -> Policy:
        """The inverse of `as_dict`; raises InvalidArgument that names the field."""
        top = _table(data, "the policy", _FIELDS)
        version = top.get("version")
        if not isinstance(version, int) or isinstance(version, bool):
            raise _bad("version is not a whole number")
        policy = cls(
            version=version,
            operator=_peer(top.get("operator"), "operator"),
            users=users_from_dict(top.get("users", {})),
            roles=roles_from_dict(top.get("roles", {})),
            where=where_from_dict(top.get("roles", {})),
            history=_digests(top, "history", HISTORY_MAX),
            supersedes=_digests(top, "supersedes", SUPERSEDED_MAX),
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
        return Signed(self, key.sign(DOMAIN + self.canonical())).document()

    @classmethod
    def open(cls, document: bytes) -> Policy:
        """Parse a signed document and check its signature; see `Signed.open`."""
        return Signed.open(document).policy

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
            if where := self.where.get(name):
                lines.append(f'\n[roles."{name}".{WHERE}]')
                # TOML has no surrogate pairs; what JSON would escape otherwise is not printable.
                lines += [
                    f'"{s}" = {json.dumps(texts, ensure_ascii=False)}'
                    for s, texts in sorted(where.items())
                ]
        return "\n".join(lines) + "\n"


class Signed:
    """A policy with its signature: what nodes keep and exchange. Not to be changed.

    Attributes:
        policy: What it says.
        signature: By the operator, 64 bytes.
        canonical: The bytes that are signed, without the domain.
        digest: SHA-256 of them, hex.
    """

    __slots__ = ("canonical", "digest", "policy", "signature")

    def __init__(self, policy: Policy, signature: bytes) -> None:
        self.policy, self.signature = policy, signature
        self.canonical = policy.canonical()
        self.digest = hashlib.sha256(self.canonical).hexdigest()

    @property
    def version(self) -> int:
        return self.policy.version

    @classmethod
    def open(cls, document: bytes) -> Signed:
        """Parse a signed document and check its signature.

        Raises InvalidArgument (malformed) or PolicySignature. Whether the operator is the right one
        is for the caller to compare.
        """
        if len(document) > DOCUMENT_BYTES_MAX:
            raise _bad(f"larger than {DOCUMENT_BYTES_MAX} bytes")
        top = _table(_json(document), "the document", {"policy", "signature"})
        try:
            signature = from_hex(str(top.get("signature")))
        except ValueError:
            raise _bad("the signature is not hex") from None
        signed = cls(Policy.from_dict(top.get("policy")), signature)
        operator = signed.policy.operator
        public = operator.public_key
        if public is None or not verify(public, signature, DOMAIN + signed.canonical):
            raise PolicySignature(f"the signature is not by the operator {operator}")
        signed.document()  # every form of it must fit, or it could not be passed on
        return signed

    @classmethod
    def unpack(cls, canonical: bytes, signature: bytes, operator: PeerId) -> Signed:
        """From what came from another node: nothing is parsed unless `operator` signed it.

        Raises InvalidArgument or PolicySignature.
        """
        public = operator.public_key
        if public is None or not verify(public, signature, DOMAIN + canonical):
            raise PolicySignature(f"the signature is not by the operator {operator}")
        signed = cls(Policy.from_dict(_json(canonical)), signature)
        if signed.canonical != canonical or signed.policy.operator != operator:
            raise _bad("not in canonical form")
        signed.document()
        return signed

    def document(self) -> bytes:
        """As `Policy.open` reads it: indented, unless it is too large for that.

        Raises InvalidArgument if it is larger than DOCUMENT_BYTES_MAX in any case.
        """
        envelope = {"policy": self.policy.as_dict(), "signature": self.signature.hex()}
        document = json.dumps(envelope, indent=1)
        if len(document) > DOCUMENT_BYTES_MAX:
            document = json.dumps(envelope, separators=(",", ":"))
        if len(document) > DOCUMENT_BYTES_MAX:
            raise _bad(f"larger than {DOCUMENT_BYTES_MAX} bytes")
        return document.encode()

    def judge(self, other: Signed) -> Relation:
        """What `other`, of the same operator, is to this one."""
        mine, theirs = self.policy, other.policy
        if other.digest == self.digest:
            return Relation.SAME
        if theirs.replaces(self.version, self.digest):
            return Relation.NEWER
        if mine.replaces(other.version, other.digest):
            return Relation.OLDER
        ahead = other.version - self.version
        if ahead > len(theirs.history):
            return Relation.OUT_OF_REACH
        return Relation.OLDER if -ahead > len(mine.history) else Relation.FORK

    def judge_claim(self, version: int, digest: str) -> Relation | None:
        """What a document of that version and digest is to this one; None if it takes the document.

        Raises InvalidArgument for a version that the digest, known here, does not have.
        """
        mine = self.policy
        if digest == self.digest and version == self.version:
            return Relation.SAME
        if mine.replaces(version, digest):
            return Relation.OLDER
        if digest == self.digest or digest in mine.history:
            raise _bad(f"{digest[:16]} is not version {version}")
        if self.version - version > len(mine.history):
            return Relation.OLDER  # beyond what the history reaches, which is nobody's fault
        return None


Keep = Literal["common", "this", "other"]


def resolution(this: Policy, other: Policy, keep: Keep) -> Policy:
    """The version that ends a fork: nodes on either branch accept it, once it is signed.

    It is made on top of the branch with the higher version and supersedes the other one.

    Args:
        this: One branch's latest version.
        other: The other's.
        keep: Whose users and roles it has: one branch's, or what both grant ("common"), so that
            nothing comes back that either withdrew.

    Raises InvalidArgument if there is no fork, or the operator would lose the right to change it.
    """
    if this.operator != other.operator:
        raise WrongCluster(f"the policy is of the cluster of {other.operator}, not of this one")
    base, lost = (this, other) if this.version >= other.version else (other, this)
    if base.digest == lost.digest or base.descends_from(lost):
        raise InvalidArgument(
            f"there is no fork: version {base.version} descends from version {lost.version}",
            hint="wait until it has spread, or bring it with `ww policy import`",
        )
    users, roles, where = _common(this, other)
    if keep != "common":
        kept = this if keep == "this" else other
        users, roles, where = kept.users, kept.roles, kept.where
    known = {base.digest, *base.history}
    replaced = (lost.digest, *lost.history, *base.supersedes, *lost.supersedes)
    supersedes = tuple(dict.fromkeys(digest for digest in replaced if digest not in known))
    return base.next(users=users, roles=roles, where=where, supersedes=supersedes[:SUPERSEDED_MAX])


def _common(this: Policy, other: Policy) -> tuple[Mapping[str, User], Roles, Wheres]:
    """What both grant; users are the same if their key is. Constraints of either apply."""
    roles: dict[str, dict[str, frozenset[str]]] = {}
    for name in this.roles.keys() & other.roles.keys():
        services: dict[str, set[str]] = {}
        for one, two in ((this, other), (other, this)):
            allowed = RoleProfile(two.roles[name])
            for service, patterns in one.roles[name].items():
                both = {p for p in patterns if pattern_within(p, allowed.patterns(service))}
                if both:
                    services.setdefault(service, set()).update(both)
        roles[name] = {service: frozenset(patterns) for service, patterns in services.items()}
    keys = {user.key for user in other.users.values()}
    users = {
        name: replace(user, roles=user.roles & other.roles_of(user.key) & roles.keys())
        for name, user in this.users.items()
        if user.key in keys
    }
    where = {
        name: {
            service: (*this.where.get(name, {}).get(service, ()), *theirs.get(service, ()))
            for service in this.where.get(name, {}).keys() | theirs.keys()
        }
        for name in roles
        for theirs in (other.where.get(name, {}),)
    }
    return users, roles, _applicable(where, roles)


def _applicable(where: Wheres, roles: Roles) -> Wheres:
    """Without what is on roles, or services of a role, that are not there."""
    return _sorted(
        {
            name: {
                service: texts
                for service, texts in services.items()
                if RoleProfile(roles[name]).patterns(service)
            }
            for name, services in where.items()
            if name in roles
        }
    )


def _sorted(where: Wheres) -> Wheres:
    """In the one form that a document has: each constraint once, nothing empty."""
    once = {
        name: {service: tuple(sorted({*texts})) for service, texts in services.items() if texts}
        for name, services in where.items()
    }
    return {name: services for name, services in once.items() if services}


def new_constraints(before: Policy, after: Policy, role: str) -> dict[str, list[str]]:
    """Service → constraints of a role that `after` has and `before` had not.

    Of services that the role covered: it allows less of them.
    """
    had, covered = set(before.constraints(role)), RoleProfile(before.roles.get(role, {}))
    added: dict[str, list[str]] = {}
    for where in after.constraints(role):
        if where not in had and covered.patterns(where.service):
            added.setdefault(where.service, []).append(where.text)
    return added


def narrowed_roles(before: Policy, after: Policy) -> frozenset[str]:
    """Roles that no longer allow all that they allowed: the sessions that they granted end."""

    def narrowed(role: str, services: Mapping[str, frozenset[str]]) -> bool:
        now = RoleProfile(after.roles.get(role, {}))
        return not all(
            pattern_within(pattern, now.patterns(service))
            for service, patterns in services.items()
            for pattern in patterns
        ) or bool(new_constraints(before, after, role))

    return frozenset(role for role, services in before.roles.items() if narrowed(role, services))


def lost_grants(before: Policy, after: Policy) -> list[str]:
    """What `before` grants and `after` does not, one line of words each, for people."""
    lines = []
    for name, user in sorted(before.users.items()):
        gone = user.roles - after.roles_of(user.key)
        lines += [f"user {name}: role {role}" for role in sorted(gone)]
        if not user.roles and not any(u.key == user.key for u in after.users.values()):
            lines.append(f"user {name}")
    for name, services in sorted(before.roles.items()):
        allowed = RoleProfile(after.roles.get(name, {}))
        for service, patterns in sorted(services.items()):
            kept = allowed.patterns(service)
            ended = sorted(p for p in patterns if not pattern_within(p, kept))
            if ended:
                lines.append(f"role {name}: {service}={','.join(ended)}")
        if name in after.roles:
            lines += [
                f"role {name}: {service} beyond {text}"
                for service, texts in new_constraints(before, after, name).items()
                for text in texts
                if allowed.patterns(service)
            ]
    return lines


def from_toml(text: str) -> tuple[dict[str, User], Roles, Wheres]:
    """Users, roles and their constraints of a TOML policy.

    Its version and operator are for information only.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise _bad(f"not TOML: {exc}") from None
    top = _table(data, "the policy", _FIELDS)
    roles = top.get("roles", {})
    where = {
        name: {
            service: tuple(canonical_where(text, service) for text in texts)
            for service, texts in services.items()
        }
        for name, services in where_from_dict(roles).items()
    }
    return users_from_dict(top.get("users", {})), roles_from_dict(roles), _sorted(where)


def canonical_where(text: str, service: str) -> str:
    """A constraint as a document has it; raises InvalidArgument."""
    return Where.parse(text, service).text


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
            if not _holds_where(service, patterns)
        }
        for name, services in _table(data, "roles").items()
    }


def where_from_dict(data: Any) -> Wheres:
    """`{name: {"where": {service: [constraint]}}}` → constraints; raises InvalidArgument."""
    found = {}
    for name, services in _table(data, "roles").items():
        where: Any = _table(services, f"role {name!r}").get(WHERE)
        if _holds_where(WHERE, where):
            found[name] = {
                service: tuple(_texts(texts, f"the constraints of role {name!r} on {service!r}"))
                for service, texts in where.items()
            }
    return _sorted(found)


def _holds_where(service: str, value: Any) -> bool:
    return service == WHERE and isinstance(value, dict)


def _table(value: Any, what: str, known: Iterable[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{what} is not a table")
    if known is not None and (extra := sorted(value.keys() - set(known))):
        raise _bad(
            f"{what} has an unknown field {extra[0]!r}", f"known: {', '.join(sorted(known))}"
        )
    return value


def _json(document: bytes) -> Any:
    try:
        return json.loads(document)
    except (ValueError, RecursionError) as exc:
        raise _bad(f"not JSON: {exc}") from None


def _digests(top: dict[str, Any], name: str, count_max: int) -> tuple[str, ...]:
    value = top.get(name, [])
    if not isinstance(value, list) or len(value) > count_max:
        raise _bad(f"{name} is not a list of at most {count_max}")
    if not all(isinstance(item, str) and DIGEST.match(item) for item in value):
        raise _bad(f"{name} is not a list of SHA-256 in hex")
    return tuple(value)


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
