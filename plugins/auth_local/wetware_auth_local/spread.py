"""How the signed policy document reaches every node of the cluster.

A node tells each member which version it has: when the member comes up, when it has a new one
itself, and every `recheck_s`. Whoever is behind pulls the document, checks it as if an operator had
put it, and tells its own members in turn, so that a change floods the cluster. Members are trusted
to pass it on, and for nothing else: only what the operator signed is ever parsed.

Protocol `/wetware/auth-local/policy/1.0.0`, members only: one request and one answer a stream, each
a frame of 4 bytes of length, big-endian, and CBOR.

    {"version": int, "digest": 32 bytes}        → the same of the one that is asked
    {"pull": digest}                            → {"policy": canonical form, "signature": 64 bytes},
                                                  or its version and digest if it has another now
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base import bounds
from wetware.errors import (
    AuthError,
    InvalidArgument,
    LimitExceeded,
    OverlayError,
    ProtocolRefused,
)
from wetware.hookspecs import Access, Finding, PeerDown, PeerUp, PluginContext
from wetware.overlay.exchange import ask
from wetware.overlay.frames import read_frame, write_frame
from wetware_auth_local.policy import (
    DOCUMENT_BYTES_MAX,
    HISTORY_MAX,
    VERSION_MAX,
    ForkedPolicy,
    PolicyNotSaved,
    PolicyOutOfReach,
    Relation,
    Signed,
    StalePolicy,
)

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.identity import PeerId
    from wetware.overlay.link import Stream
    from wetware_auth_local.config import AuthLocalConfig
    from wetware_auth_local.contact import Contact

PROTOCOL: Final = "/wetware/auth-local/policy/1.0.0"
REQUEST_BYTES_MAX: Final = 256
ANSWER_BYTES_MAX: Final = DOCUMENT_BYTES_MAX + 256
PULLS_MAX: Final = 4
"""Pulls at a time, each of another member: one that stalls does not hold the others up."""
STREAMS_PER_PEER_MAX: Final = 4
"""Of a member, at a time; an honest one has one."""
REQUESTS_PER_PEER_S, REQUESTS_PER_PEER_BURST = 20.0, 60.0
"""Beyond this a member's requests are refused."""
EXCHANGE_S_MIN: Final = 0.05
"""Between two exchanges with a member: changes that follow each other closely travel as one."""
RETRY_S_MIN: Final = 0.5
"""After a failure; doubles up to `recheck_s`."""
TRIES_MAX: Final = 3
"""Times that a member may have got a newer document between its claim and the pull."""
DIVERGENCES_MAX: Final = 8
"""Documents of other branches that are kept, at most 512 KiB each."""
PEERS_MAX: Final = 1024
"""Members whose rates are remembered; beyond it the one longest silent is forgotten."""
LOG_S: Final = 60.0
"""A member's refusals, and refused logins, are logged once in so long."""

_log_hints = {
    Relation.FORK: "ww policy resolve",
    Relation.OUT_OF_REACH: "stop this node, put the output of `ww policy export` at another node "
    "into [plugins.auth_local] policy, remove policy.json and highest.json of this plugin's "
    "data directory, and start it again",
}


class Misbehaviour(AuthError):
    """A member broke the protocol, or said what cannot be true."""

    code = "auth_local.peer"


@dataclass(frozen=True, slots=True)
class Claim:
    """Which document a member says it has."""

    version: int
    digest: str

    @classmethod
    def of(cls, signed: Signed) -> Claim:
        return cls(signed.version, signed.digest)

    @classmethod
    def parse(cls, message: Any) -> Claim:
        """From the wire; raises Misbehaviour."""
        match message:
            case {"version": int(version), "digest": bytes(digest), **more} if (
                not more and type(version) is int and len(digest) == 32
            ):
                if 1 <= version <= VERSION_MAX:
                    return cls(version, digest.hex())
        raise Misbehaviour("neither a version nor a document")

    def message(self) -> dict[str, object]:
        return {"version": self.version, "digest": bytes.fromhex(self.digest)}


@dataclass(frozen=True, slots=True)
class Divergence:
    """A signed document that cannot replace ours, nor ours it.

    Attributes:
        signed: The document.
        kind: FORK, or OUT_OF_REACH: it is too far ahead to tell.
        peer: Who had it first.
    """

    signed: Signed
    kind: Relation
    peer: PeerId


@dataclass(slots=True)
class _Member:
    """A connected member, as the task that talks to it sees it."""

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    heard: Claim | None = None  # it told us of a document that we do not have
    tell: bool = True  # it should hear of ours
    has: str = ""  # the digest of the last document that it was known to have
    floor: int = 0  # the highest version that it has claimed
    compared: bool = False  # at least once since it came up
    mute: bool = False  # it does not speak the protocol
    failures: int = 0  # in a row


class Spread:
    """This node's part in the spreading of the policy.

    Args:
        ctx: Streams and members, which are used from `run` on; times; threads.
        contact: The age of what this node knows.
        newest: The latest document that this node accepted.
        adopt: Accepts a later one, as `LocalBackend.put` does, with its exceptions.
        settle: Called every `recheck_s`: tries again what the disk refused.
        rng: For jitter.
    """

    def __init__(
        self,
        ctx: PluginContext,
        *,
        contact: Contact,
        newest: Callable[[], Signed],
        adopt: Callable[[Signed], Awaitable[object]],
        settle: Callable[[], Awaitable[None]],
        rng: random.Random | None = None,
    ) -> None:
        self._overlay, self._clock, self._log = ctx.overlay, ctx.clock, ctx.log
        self._run_sync = ctx.run_sync
        self._config: AuthLocalConfig = ctx.config
        self._contact = contact
        self._newest, self._adopt, self._settle = newest, adopt, settle
        self._rng = rng or random.SystemRandom()
        self._members: dict[PeerId, _Member] = {}
        self._speakers: dict[PeerId, asyncio.Task[None]] = {}
        rate, now = (REQUESTS_PER_PEER_S, REQUESTS_PER_PEER_BURST), ctx.clock.monotonic
        self._rates = bounds.Rates(*rate, PEERS_MAX, now)
        self._places = bounds.Places()
        self._refusals = bounds.Throttle(round(60 / LOG_S), PEERS_MAX, now)
        self._divergences: OrderedDict[str, Divergence] = OrderedDict()
        self._pulls = asyncio.Semaphore(PULLS_MAX)
        self._tasks: asyncio.TaskGroup | None = None
        self._started: float | None = None
        self._first_login: float | None = None
        self._stale_logged_at = -math.inf
        self._compared = asyncio.Event()
        self._caught_up = asyncio.Event()
        if not contact.met:  # the whole cluster is this node
            self._caught_up.set()
        self.refused: Counter[str] = Counter()
        """What members did that was refused, by the code of the error."""

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._started = self._clock.monotonic()
            stack.callback(self._overlay.handle(PROTOCOL, self._serve, access=Access.MEMBER))
            stack.callback(self._overlay.watch_peers(self._peer_changed))
            task_status.started()
            while True:
                await asyncio.sleep(self._config.recheck_s)
                await self._contact.save()
                await self._settle()

    # --- questions --------------------------------------------------------------------------------

    @property
    def divergences(self) -> Mapping[str, Divergence]:
        return self._divergences

    @property
    def members(self) -> int:
        """Connected members with which the policy was compared since they came up."""
        return sum(member.compared for member in self._members.values())

    async def why_stale(self) -> str:
        """Why this node cannot decide logins now, for the one who asks; "" if it can.

        Waits, up to `catch_up_s`, for the first comparison after a start, and for one with a
        connected member when the last is too long ago.
        """
        if not self._caught_up.is_set():
            now = self._clock.monotonic()
            if self._first_login is None:
                self._first_login = now
            catch_up_s = self._config.catch_up_s
            # A slow start of other services must not eat up all of the time.
            until = max(
                (now if self._started is None else self._started) + catch_up_s,
                self._first_login + min(1.0, catch_up_s),
            )
            await self._wait(self._caught_up, until - now)
        if not self._contact.met:
            return ""
        behind = [d for d in self._divergences.values() if d.kind is Relation.OUT_OF_REACH]
        if behind:
            return self._stale(
                f"this node missed more than {HISTORY_MAX} versions of the policy: its operator "
                "has to give it the current one, as its log says"
            )
        if self._is_too_old and any(not member.mute for member in self._members.values()):
            self._compared.clear()
            await self._wait(self._compared, self._config.catch_up_s)
        if not self._is_too_old:
            return ""
        age_s = self._contact.age_s
        if math.isinf(age_s):
            return self._stale(
                "this node has yet to compare its policy with another member's: it needs a "
                "connection to one"
            )
        return self._stale(
            f"this node was last in touch with another member {_hours(age_s)} ago, and decides for "
            f"{_hours(self._config.policy_age_s_max)} (policy_age_s_max): it needs a connection to "
            "one"
        )

    def findings(self) -> Iterator[Finding]:
        """What `ww doctor` shall say of the policy here."""
        for divergence in self._divergences.values():
            if divergence.kind is Relation.OUT_OF_REACH:
                yield Finding(
                    "policy",
                    "error",
                    f"this node missed more than {HISTORY_MAX} versions, and admits nobody",
                    "give it the current one: see auth_local's README, `ww policy export`",
                )
            else:
                yield Finding(
                    "policy",
                    "error",
                    "the policy was changed in two places: nodes disagree on users and roles",
                    "`ww policy status`, then `ww policy resolve`",
                )
        if self._contact.met and self._is_too_old:
            yield Finding(
                "policy",
                "error",
                "this node has not compared its policy with another member's for too long, and "
                "admits nobody",
                "connect it to the others: `ww ls`, then `ww policy status`",
            )

    @property
    def _is_too_old(self) -> bool:
        return self._contact.age_s > self._config.policy_age_s_max

    def _stale(self, why: str) -> str:
        now = self._clock.monotonic()
        if now - self._stale_logged_at >= LOG_S:
            self._stale_logged_at = now
            self._log.warning("policy.stale", why=why)
        return why

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await event.wait()

    # --- what happens here ------------------------------------------------------------------------

    def announce(self) -> None:
        """This node accepted a later document: tell every member that is not known to have it."""
        newest = self._newest()
        for digest, divergence in tuple(self._divergences.items()):
            if newest.judge(divergence.signed) not in (Relation.FORK, Relation.OUT_OF_REACH):
                del self._divergences[digest]
        for member in self._members.values():
            if member.has != newest.digest:
                member.tell = True
                member.wake.set()

    def _peer_changed(self, change: PeerUp | PeerDown) -> None:
        peer = change.peer
        if isinstance(change, PeerUp):
            if peer not in self._members and self._tasks is not None:
                member = self._members[peer] = _Member()
                self._speakers[peer] = self._tasks.create_task(
                    self._keep(peer, member), name=f"policy with {peer.short}"
                )
            return
        self._members.pop(peer, None)
        if (speaker := self._speakers.pop(peer, None)) is not None:
            speaker.cancel()
        self._check_caught_up()

    def _check_caught_up(self) -> None:
        speaking = [member for member in self._members.values() if not member.mute]
        if speaking and all(member.compared for member in speaking):
            self._caught_up.set()

    # --- towards a member -------------------------------------------------------------------------

    async def _keep(self, peer: PeerId, member: _Member) -> None:
        """Compare with one member for as long as it is connected."""
        while True:
            member.wake.clear()
            try:
                await self._compare(peer, member)
            except ProtocolRefused:
                member.mute = True  # a libp2p peer of another kind, or a node without this backend
                member.failures += 1
            except (Misbehaviour, InvalidArgument, AuthError) as exc:
                self._refuse(peer, exc.code, exc)
                member.failures += 1
            except TimeoutError:
                self._refuse(peer, "slow", f"no answer within {self._config.exchange_s:g} s")
                member.failures += 1
            except (OverlayError, EOFError) as exc:
                self._log.debug("exchange.failed", peer=peer, reason=exc)
                member.failures += 1
            except Exception as exc:  # one member's trouble must not end the backend
                self._log.error("exchange.failed", peer=peer, exc_info=exc)
                member.failures += 1
            else:
                member.failures, member.mute = 0, False
            self._check_caught_up()
            await asyncio.sleep(EXCHANGE_S_MIN)
            pause_s = self._config.recheck_s
            if member.failures:
                # What it tells us does not shorten the pause; what we have to tell it does.
                pause_s = min(RETRY_S_MIN * 2 ** min(member.failures - 1, 16), pause_s)
            elif member.heard is not None:
                continue
            if member.tell and not member.failures:
                continue
            await self._wait(member.wake, pause_s * self._rng.uniform(0.5, 1.0))

    async def _compare(self, peer: PeerId, member: _Member) -> None:
        claim, member.heard = member.heard, None
        if claim is None:
            member.tell = False
            try:
                answer = await self._ask(peer, member, Claim.of(self._newest()).message())
                claim = Claim.parse(answer)
            except BaseException:
                member.tell = True
                raise
        for _ in range(TRIES_MAX):
            member.has = claim.digest
            self._contact.meet()
            if not self._wants(claim):
                break
            async with self._pulls:
                if not self._wants(claim):
                    break  # another member had it
                answer = await self._ask(peer, member, {"pull": bytes.fromhex(claim.digest)})
                if "policy" in answer:
                    await self._take(peer, claim, answer)
                    break
                claim = Claim.parse(answer)
        else:
            raise Misbehaviour("it has another document whenever it is asked")
        behind = self._divergences.get(claim.digest)
        if behind is not None and behind.kind is Relation.OUT_OF_REACH:
            await self._contact.save()
            return
        member.compared = True
        self._contact.compared()
        self._compared.set()
        await self._contact.save()

    def _wants(self, claim: Claim) -> bool:
        """Whether it takes the document to know what it is; raises InvalidArgument for a lie."""
        if self._newest().judge_claim(claim.version, claim.digest) is not None:
            return False
        if claim.digest in self._divergences:
            return False
        return not any(
            each.kind is Relation.FORK and each.signed.policy.replaces(claim.version, claim.digest)
            for each in self._divergences.values()
        )

    async def _ask(
        self, peer: PeerId, member: _Member, request: Mapping[str, object]
    ) -> dict[str, Any]:
        floor = member.floor  # of before: what it claims meanwhile may overtake the answer
        bytes_max = ANSWER_BYTES_MAX if "pull" in request else REQUEST_BYTES_MAX
        opening = self._overlay.open_stream(peer, PROTOCOL)
        timeout_s = self._config.exchange_s
        answer = await ask(opening, request, bytes_max=bytes_max, timeout_s=timeout_s)
        if "policy" not in answer:
            version = Claim.parse(answer).version
            if version < floor:
                member.floor = version
                raise Misbehaviour(f"it claimed version {floor}, and has version {version}")
            member.floor = max(member.floor, version)
        return answer

    async def _take(self, peer: PeerId, claim: Claim, answer: dict[str, Any]) -> None:
        """Judge a document that was pulled, and adopt it if it replaces ours."""
        match answer:
            case {"policy": bytes(canonical), "signature": bytes(signature), **more} if not more:
                pass
            case _:
                raise Misbehaviour("neither a version nor a document")
        operator = self._newest().policy.operator
        # A large document takes half a second to check: not on the loop.
        signed = await self._run_sync(Signed.unpack, canonical, signature, operator)
        if Claim.of(signed) != claim:
            raise Misbehaviour(f"the document is not the version {claim.version} that it claimed")
        for _ in range(TRIES_MAX):
            relation = self._newest().judge(signed)
            if relation in (Relation.FORK, Relation.OUT_OF_REACH):
                self._diverge(Divergence(signed, relation, peer))
            if relation is not Relation.NEWER:
                return
            with contextlib.suppress(StalePolicy, ForkedPolicy, PolicyOutOfReach):  # overtaken
                with contextlib.suppress(PolicyNotSaved):  # logged; `settle` tries again
                    await self._adopt(signed)
                return

    def _diverge(self, divergence: Divergence) -> None:
        """Report it once; a later version of a branch that is known replaces the earlier one."""
        found = divergence.signed
        before = [d for d, old in self._divergences.items() if _succeeds(found, old.signed)]
        for digest in before:
            del self._divergences[digest]
        self._divergences[found.digest] = divergence
        while len(self._divergences) > DIVERGENCES_MAX:
            self._divergences.popitem(last=False)
        if before:
            return
        ours = self._newest()
        event = "policy.forked" if divergence.kind is Relation.FORK else "policy.out_of_reach"
        self._log.error(
            event,
            version=found.version,
            digest=found.digest,
            our_version=ours.version,
            our_digest=ours.digest,
            peer=divergence.peer,
            hint=_log_hints[divergence.kind],
        )

    # --- from a member ----------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        peer = stream.peer
        try:
            with self._admitted(peer):
                async with asyncio.timeout(self._config.exchange_s):
                    await self._answer(peer, stream)
        except TimeoutError:
            self._refuse(peer, "slow", f"no request within {self._config.exchange_s:g} s")
            stream.reset()
        except (Misbehaviour, InvalidArgument) as exc:
            self._refuse(peer, exc.code, exc)
            stream.reset()
        except (OverlayError, EOFError) as exc:
            self._log.debug("request.ended", peer=peer, reason=exc)
            stream.reset()

    async def _answer(self, peer: PeerId, stream: Stream) -> None:
        request = await read_frame(stream, bytes_max=REQUEST_BYTES_MAX)
        newest = self._newest()
        if request.keys() == {"pull"} and isinstance(request["pull"], bytes):
            if request["pull"].hex() != newest.digest:
                await write_frame(stream, Claim.of(newest).message())
                return
            document = {"policy": newest.canonical, "signature": newest.signature}
            await write_frame(stream, document)
            await stream.read(1)  # until it has it all; what is finished earlier may be cut short
            return
        claim = Claim.parse(request)
        await write_frame(stream, Claim.of(newest).message())
        self._contact.meet()
        if (member := self._members.get(peer)) is None:
            return  # it is new: it will be asked
        member.floor = max(member.floor, claim.version)
        if self._wants(claim):
            member.heard = claim
            if not member.failures:
                member.wake.set()

    @contextlib.contextmanager
    def _admitted(self, peer: PeerId) -> Iterator[None]:
        often = "it asks too often"
        if not self._rates.take(peer):
            raise Misbehaviour(often, code="auth_local.peer.rate")
        try:
            with self._places.hold(bounds.Claim(peer, STREAMS_PER_PEER_MAX, often)):
                yield
        except LimitExceeded:
            raise Misbehaviour(often, code="auth_local.peer.rate") from None

    def _refuse(self, peer: PeerId, code: str, why: object) -> None:
        self.refused[code] += 1
        if (unlogged := self._refusals.lines(peer)) is not None:
            self._log.warning("peer.refused", peer=peer, code=code, why=why, unlogged=unlogged)


def _succeeds(later: Signed, earlier: Signed) -> bool:
    return later.policy.replaces(earlier.version, earlier.digest)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"
