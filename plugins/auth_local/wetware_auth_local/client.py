"""`session.auth_local`: read and replace the cluster's policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.base import paths
from wetware.base.log import get_logger
from wetware.errors import ConfigError, InvalidArgument
from wetware.identity import replace_private_file
from wetware_auth_local.policy import ForkedPolicy, Keep, Policy, StalePolicy, resolution

if TYPE_CHECKING:
    from wetware.identity import Key

log = get_logger("plugin.auth_local")

SCHEMA = rpc.load(Path(__file__).with_name("auth_local.capnp"))


class PolicyClient:
    """The operator's view of the policy.

    Args:
        ref: A reference to a PolicyStore.
    """

    INTERFACE = SCHEMA.PolicyStore

    def __init__(self, ref: Any) -> None:
        self._ref = ref
        self._seen = SeenPolicies(paths.home() / "policies.json")

    async def document(self) -> bytes:
        """The signed document in force."""
        document: bytes = (await self._ref.call("get"))["document"]
        return document

    async def get(self) -> Policy:
        """The policy in force at this node; its signature is checked here too."""
        return Policy.open(await self.document())

    async def put(self, document: bytes) -> tuple[int, int]:
        """Replace the policy; returns its version and how many (user, role) pairs it withdrew."""
        reply = await self._ref.call("put", document=document)
        return reply["version"], reply["withdrawn"]

    async def change(self, key: Key, change: Callable[[Policy], Policy]) -> tuple[Policy, int]:
        """Read, change, sign with the operator's key, replace.

        Returns the new policy and how many (user, role) pairs it withdrew. Where `change` returns
        the policy that it was given, nothing is signed. Raises StalePolicy or
        ForkedPolicy if this operator has seen a later or another policy than this node has: a node
        that is stale, or lies, must not make an operator sign on top of what was withdrawn. Raises
        ForkedPolicy, too, if somebody else changed it meanwhile, PolicySignature if `key` is not
        the operator's, and InvalidArgument for a new constraint that does not fit its service.
        """
        policy = await self.get()
        self._seen.check(policy)
        if (new := change(policy)) is policy:
            return policy, 0
        unchecked_constraints(policy, new)
        _, withdrawn = await self.put(new.sign(key))
        self._seen.remember(new)
        return new, withdrawn

    async def status(self) -> dict[str, Any]:
        """How the node's policy relates to the cluster's: PolicyStatus of auth_local.capnp."""
        status: dict[str, Any] = (await self._ref.call("status"))["status"]
        return status

    async def divergent(self) -> list[Policy]:
        """The documents of other branches that the node knows; signatures are checked here too."""
        found = []
        for each in (await self.status())["divergences"]:
            if each["kind"] != "fork":
                continue
            reply = await self._ref.call("divergent", digest=each["digest"])
            found.append(Policy.open(reply["document"]))
        return found

    async def resolve(
        self, key: Key, others: Sequence[Policy], keep: Keep
    ) -> tuple[Policy, Policy, int]:
        """End a fork: put a version that nodes on every branch accept; see `policy.resolution`.

        Returns the policy of before, the new one, and how many (user, role) pairs it withdrew.
        Raises InvalidArgument if there is no fork, StalePolicy or ForkedPolicy if this operator has
        seen a version that is on none of the branches.
        """
        before = new = await self.get()
        if keep == "other" and len(others) > 1:
            raise InvalidArgument(
                f"there are {len(others)} other branches", hint="name the file of the one to keep"
            )
        for other in others:
            if other.operator != new.operator or not new.descends_from(other):
                new = resolution(new, other, keep)
        if new is before:
            raise InvalidArgument("there is no fork that this node knows of", code="invalid.fork")
        self._seen.verify(new)
        _, withdrawn = await self.put(new.sign(key))
        self._seen.remember(new)
        return before, new, withdrawn


def unchecked_constraints(before: Policy, after: Policy) -> list[str]:
    """Check the constraints of roles that changed against the services that this machine knows.

    Returns the services with constraints that it does not know: nodes that have them judge each
    call, and deny what they cannot judge. Raises InvalidArgument "invalid.where".
    """
    from wetware.broker.naming import check_against
    from wetware.client.installed import known_interface

    unknown = []
    for role, services in sorted(after.where.items()):
        if before.profile(role) == (profile := after.profile(role)):
            continue
        for service in sorted(services):
            if (interface := known_interface(service)) is None:
                unknown.append(service)
                continue
            constraints = [w for w in profile.where if w.service == service]
            check_against(constraints, service, interface, profile.patterns(service))
    return sorted(set(unknown))


class SeenPolicies:
    """The latest policy of each operator that this user has seen: `policies.json` in the home."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot read {self._file}: {exc}", hint="remove it") from exc
        return data if isinstance(data, dict) else {}

    def check(self, policy: Policy) -> None:
        """Raise StalePolicy or ForkedPolicy; else remember the policy."""
        self.verify(policy)
        self.remember(policy)

    def verify(self, policy: Policy) -> None:
        """Raise StalePolicy or ForkedPolicy if it does not follow the one that was seen."""
        seen = self._read().get(policy.operator)
        if seen is not None:
            back = policy.version - int(seen["version"])
            if back < 0:
                raise StalePolicy(
                    f"this node has version {policy.version} of the policy, and you have seen "
                    f"version {seen['version']}: it is stale, or lies",
                    hint="give it the later one with `ww policy import`, from a node that has it",
                )
            before = (policy.digest, *policy.history)
            known = policy.replaces(int(seen["version"]), str(seen["digest"]))
            if not known and back < len(before) and before[back] != seen["digest"]:
                raise ForkedPolicy(
                    f"this node's policy does not descend from version {seen['version']} that you "
                    "have seen: the policy was changed in two places",
                    hint="ww policy resolve, here or at the other node; if the other branch is in "
                    f"force nowhere, remove {self._file}",
                )

    def remember(self, policy: Policy) -> None:
        """Keep version and digest. A full disk is said, and keeps nobody from ending things."""
        seen = self._read()
        entry = {"version": policy.version, "digest": policy.digest}
        if seen.get(policy.operator) != entry:
            seen[policy.operator] = entry
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                replace_private_file(self._file, json.dumps(seen, indent=1).encode())
            except OSError as exc:
                log.warning("policy.not_remembered", file=self._file, why=exc.strerror)
