"""Logging in: a node's challenge is checked here, and answered by the user's signer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.base.structs import to_struct
from wetware.broker.protocol import CORE
from wetware.client import contexts
from wetware.errors import AuthError, InvalidArgument, WetwareError
from wetware.identity import Challenge, Channel, LoginStatus, PeerId, Signer

if TYPE_CHECKING:
    from wetware.client.dial import Place

_HINTS = {
    LoginStatus.UNKNOWN_PRINCIPAL: "somebody who administers the cluster has to add you",
    LoginStatus.NO_ROLE: "somebody who administers the cluster has to give you a role",
    LoginStatus.EXPIRED: "try again; if it persists, compare the clocks of both machines",
    LoginStatus.BACKEND_UNAVAILABLE: "try again; the node's log says why",
    LoginStatus.TOO_MANY_TRIES: "wait a minute, then try again",
}


class LoginRefused(AuthError):
    """The node refused the login; `status` says which check failed, and so does the code.

    "auth.refused.no_role", for example. The class has no code of its own: what a peer sends under
    such a code is an AuthError, not this.
    """

    def __init__(self, status: LoginStatus, reason: str, hint: str = "") -> None:
        name = status.name.lower().replace("_", " ")
        super().__init__(
            f"login refused ({name}): {reason}",
            hint=hint or _HINTS.get(status, ""),
            code=f"auth.refused.{status.name.lower()}",
        )
        self.status = status


class SignerServant(rpc.Servant, interface=CORE.Signer):
    """Answers one challenge, if it is from the node that was dialled, on our own connection.

    This comparison is what stops a malicious node from relaying a login to another one; it uses
    only what this end knows, never what the challenge says.
    """

    def __init__(self, login: Login, verifier: PeerId, channel: Channel) -> None:
        self._login, self._verifier, self._channel = login, verifier, channel
        self._signer: Signer | None = None
        self.failure: WetwareError | None = None
        self.spent = False

    async def sign(self, challenge: bytes) -> dict[str, object]:
        """Check, then sign, once: a node that keeps the signer gets nothing more out of it."""
        if self.spent:
            raise AuthError("a signer answers one challenge", code="auth.signer")
        self.spent = True
        try:
            parsed = _parsed(challenge)
            if parsed.verifier != self._verifier:
                raise AuthError(
                    f"the challenge is from {parsed.verifier}, not from {self._verifier} that was "
                    "dialled: this node may be relaying your login",
                    hint="do not use this node; tell its operator",
                    code="auth.wrong_verifier",
                )
            if parsed.channel != self._channel:
                raise AuthError(
                    "the challenge is bound to another connection than this one: this node may be "
                    "relaying your login",
                    hint="do not use this node; tell its operator",
                    code="auth.wrong_channel",
                )
            self._login.check_cluster(parsed.cluster, self._verifier)
            self._signer = self._login.choose(parsed)
            proof = await self._signer.sign(parsed)
        except WetwareError as exc:
            self.failure = exc
            # Only that it failed: the node need not know paths or key names of this machine.
            raise AuthError("the signer refused", code="auth.signer") from None
        return {"proof": to_struct(proof)}

    def hint(self, status: LoginStatus) -> str:
        """What its kind of user does about a refusal; "" if it does not say."""
        hints: Mapping[LoginStatus, str] = getattr(self._signer, "hints", {})
        return hints.get(status, "")


def _parsed(challenge: bytes) -> Challenge:
    try:
        return Challenge.from_signed_bytes(challenge)
    except ValueError as exc:
        raise InvalidArgument(f"the node's challenge is none: {exc}") from None


@dataclass(frozen=True, slots=True)
class Login:
    """How a user logs in, here and at other nodes.

    Attributes:
        choose: The signer for a challenge.
        cluster: The ID of the cluster that is expected; "" before the first login.
        pinned: By what name `contexts` has that; "" at other nodes than the first.
    """

    choose: Callable[[Challenge], Signer]
    cluster: str
    pinned: str = ""

    def check_cluster(self, cluster: str, node: PeerId) -> None:
        """Raise AuthError where a node says that it is of another cluster than is expected."""
        hint = "do not use this node; tell its operator"
        try:
            contexts.check_cluster(cluster)
        except InvalidArgument as exc:
            what = f"names no cluster: {exc.message}"
        else:
            if cluster == (self.cluster or cluster):
                return
            what = f"says that it is of cluster {cluster}, not of {self.cluster}"
            if self.pinned:
                what += ", which was pinned at the first login"
                hint = "ask its operator; if the cluster was founded anew, accept the new one: "
                hint += f"ww context accept {self.pinned} {cluster}"
        raise AuthError(f"the node {node} {what}", hint=hint, code="auth.wrong_cluster")

    async def open(self, place: Place) -> rpc.Ref | None:
        """Log in, and get the session's reference; raises LoginRefused, what the signer raised."""
        connection, verifier, channel = place
        signing = SignerServant(self, verifier, channel)
        gate = connection.bootstrap(CORE.Gate)
        terminal = (await gate.call("terminal"))["terminal"]
        try:
            reply = await terminal.call("login", signer=signing)
        finally:
            signing.spent = True
        status = LoginStatus(reply["status"])
        if status is not LoginStatus.GRANTED:
            raise signing.failure or LoginRefused(status, reply["reason"], signing.hint(status))
        session: rpc.Ref | None = reply["session"]
        return session
