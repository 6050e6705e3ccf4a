"""At which node a process is to run, and where one runs: for clients, who log in there themselves.

No node spawns for a user of another. The session's node is asked where there is room, and who is in
the cluster; who one logs in to is proven, see `Session.node`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from wetware.base.log import get_logger
from wetware.errors import (
    CapabilityError,
    DialError,
    InvalidArgument,
    NotFound,
    OverlayError,
    WetwareError,
)
from wetware.identity import PeerId
from wetware.member import Member
from wetware_proc.driver import Limits

if TYPE_CHECKING:
    from wetware_proc.running import Detached

log = get_logger("proc")
T = TypeVar("T")

Session = Any  # a `wetware.Session`, whose module knows this one

ANY: Final = "any"  # in place of a selector: whichever member
TRIED_MAX: Final = 3
"""Members that are tried, where one that said it had room does not take a process."""
LATELY_S: Final = 2.0
"""As long what was sent somewhere counts beside what the members say, which is a second old."""
UNPREPARED: Final = 0.5  # processes that it is worth to run a program where it need not be compiled
BUSIER: Final = 1.5
"""Times the load of the least busy member, and one more for each processor: beyond, it is last."""
ASKED_AT_ONCE: Final = 16
ASK_S: Final = 5.0  # for a member to let one log in, and to answer
ASK_ALL_S: Final = 20.0  # for all of them
ID_CHARS: Final = 16  # of a whole ID
ID_CHARS_MIN: Final = 4


@dataclass(frozen=True, slots=True)
class Room:
    """What a member says of itself, as the struct Room of proc.capnp has it."""

    node: str
    name: str
    running: int
    processes: int
    memory_bytes: int
    processors: int
    load: float
    prepared: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """A member that was not heard: its peer ID, its name, and why, for people."""

    node: str
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Heard(Generic[T]):
    """What the members answered, and those that did not."""

    answers: tuple[tuple[Member, T], ...]
    missing: tuple[Missing, ...]


def selector(session: Session, on: str, *terms: str) -> str:
    """Members of which `on` holds, "any" or "" included, and what else is said."""
    on = "" if on.strip() == ANY else on.strip() or f"id={session.identity.node}"
    return ",".join(filter(None, (on, *terms)))


async def nodes(
    session: Session,
    on: str,
    *,
    service: str = "proc",
    programs: Sequence[str] = (),
    memory_bytes: int = 0,
) -> list[Room]:
    """The members that have room for a process, those that can run it best first.

    Best is where the fewest run for each processor; a member that has prepared the program already
    may have half a process more. Those that are busier than others by far come last.
    Log in at one with `session.node(selector(session, on, f"id={NODE}"))`.

    Args:
        session: Whose node is asked.
        on: A selector; "any": all members; "": the session's node alone.
        service: That they have to have.
        programs: Their hashes, or CIDs.
        memory_bytes: That the process may have; 0: what is usual.

    Raises NotFound "not_found.room", InvalidArgument for a selector that is none.
    """
    rooms = await session.proc.rooms(selector(session, on, f"service={service}"), programs)
    now, sent = time.monotonic(), session.proc.sent
    lately = Counter(node for node, at_s in sent if now - at_s < LATELY_S)

    wanted = memory_bytes or Limits().memory_bytes
    fit = [room for room in rooms if room.processes > 0 and room.memory_bytes >= wanted]
    if not fit:
        names = ", ".join(room.name or room.node for room in rooms[:3])
        full = f": {len(rooms)} that match are full, {names}" if rooms else ""
        raise NotFound(
            f"no member has room for the process ({on or 'the node of this session'}){full}",
            hint="another selector, less memory, or `ww ls service=proc` to see who is there",
            code="not_found.room",
        )
    load_max = BUSIER * min(room.load for room in fit) + 1  # of one machine the load differs, too

    def cost(room: Room) -> tuple[bool, float, float]:
        processes = room.running + lately[room.node] + UNPREPARED * (not all(room.prepared))
        chance = random.random()  # noqa: S311  # no secret
        return room.load > load_max, processes / max(1, room.processors), chance

    return sorted(fit, key=cost)


@contextlib.asynccontextmanager
async def placed(
    session: Session, on: str, *, service: str, programs: Sequence[str], memory_bytes: int
) -> AsyncIterator[Any]:
    """A session at the first member that has room by its own word, of the first of `nodes`.

    One that cannot be reached, is full by now, or has no more for this principal is passed by; of
    more than TRIED_MAX, and of the last one, it is raised.
    """
    rooms = await nodes(session, on, service=service, programs=programs, memory_bytes=memory_bytes)
    left = rooms[:TRIED_MAX]
    while True:
        node = left.pop(0).node
        async with contextlib.AsyncExitStack() as stack:
            try:
                login = session.node(selector(session, on, f"id={node}"))
                there = await stack.enter_async_context(login)
                await nodes(there, "", service=service, memory_bytes=memory_bytes)
            except (OverlayError, NotFound) as exc:
                if not left:
                    raise
                log.debug("proc.passed_by", node=node, why=exc.message)
                continue
            session.proc.sent.append((node, time.monotonic()))
            yield there
            return


def named(text: str) -> tuple[str, list[str]]:
    """What a grant "SERVICE:OBJECT?PARAM=VALUE&…" is of, and its constraints."""
    what, _, where = text.partition("?")
    return what, where.split("&") if where else []


@contextlib.asynccontextmanager
async def granted(programs: Any, grants: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Grants of `client.Options`, those that are texts opened by the session of `programs`.

    Each is under a grant of its own below that session's, which ends with the block.
    """
    from wetware.broker.naming import object_of
    from wetware.client.installed import known_interface

    async with contextlib.AsyncExitStack() as stack:
        opened = dict(grants)
        for name, text in grants.items():
            if not isinstance(text, str):
                continue
            what, where = named(text)
            service, colon, object_ = what.partition(":")
            if (interface := known_interface(service)) is None:
                raise InvalidArgument(f"the interface of the service {service!r} is not known here")
            label = f"process: {text}"[:128]
            weaker = await programs.session.attenuate({what: ()}, where, label=label)
            stack.push_async_callback(weaker.close)
            ref = await weaker.open(service, interface)
            opened[name] = await object_of(ref, object_) if colon else ref
        yield opened


async def everywhere(session: Session, ask: Callable[[Session], Awaitable[T]]) -> Heard[T]:
    """Ask at every member, by a login there of one's own; none is waited for beyond ASK_S.

    Those that the session's node takes for dead are not asked. Raises what `session` itself does.
    """
    places = asyncio.Semaphore(ASKED_AT_ONCE)
    try:
        members: Sequence[Member] = await session.cluster.list("service=proc,state!=left")
    except CapabilityError:  # of a part of the services: it has its own node
        members = (Member(PeerId(session.identity.node), is_self=True),)

    async def one(member: Member) -> T:
        if member.is_self:
            return await ask(session)
        if member.state == "dead":
            raise DialError("it is dead")
        async with places, asyncio.timeout(ASK_S), session.node(f"id={member.peer_id}") as there:
            return await ask(there)

    tasks = {asyncio.ensure_future(one(member)): member for member in members}
    try:
        await asyncio.wait(tasks, timeout=ASK_ALL_S)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    answers, missing = [], []
    for task, member in tasks.items():
        try:
            answers.append((member, task.result()))
        except (WetwareError, TimeoutError, asyncio.CancelledError) as exc:
            if member.is_self:
                raise
            why = exc.message if isinstance(exc, WetwareError) else "it did not answer in time"
            missing.append(Missing(str(member.peer_id), member.name, why))
    return Heard(tuple(answers), tuple(missing))


@contextlib.asynccontextmanager
async def where(session: Session, id_: str, *, anybody: bool = False) -> AsyncIterator[Detached]:
    """A process of one's own, or of `anybody`, as a `client.Detached` of a session at its node.

    Args:
        session: Its own node is asked first, then every member.
        id_: A process's ID, or its first characters, ID_CHARS_MIN at least.
        anybody: For operators.

    Raises NotFound "not_found.process", InvalidArgument where several begin so.
    """
    if len(id_) < ID_CHARS_MIN:
        raise InvalidArgument(
            f"{id_!r} is short for a process: give {ID_CHARS_MIN} characters of its ID at least",
            hint="ww ps",
            code="invalid.process",
        )

    async def ask(there: Session) -> list[str]:
        found = await there.proc.processes(all=anybody)
        return [each.id for each in found if each.id.startswith(id_)]

    if len(id_) == ID_CHARS and await ask(session):
        yield session.proc.detached(id_)
        return
    heard = await everywhere(session, ask)
    found = [(member, each) for member, ids in heard.answers for each in ids]
    if not found:
        silent = ", ".join(each.name or each.node for each in heard.missing)
        raise NotFound(
            f"there is no process {id_[:32]!r} of yours in the cluster"
            + f"; not heard: {silent}" * bool(silent),
            hint="ww ps",
            code="not_found.process",
        )
    if len(found) > 1:
        named = ", ".join(
            f"{each} at {member.name or member.peer_id}" for member, each in found[:5]
        )
        raise InvalidArgument(
            f"{id_!r} is ambiguous: {named}", hint="give more of it", code="invalid.ambiguous"
        )
    ((member, whole),) = found
    own = contextlib.nullcontext(session)
    async with own if member.is_self else session.node(f"id={member.peer_id}") as there:
        yield there.proc.detached(whole)
