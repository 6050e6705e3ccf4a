"""The conformance suites find what is planted, by the check that is about it, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import InvalidArgument, PluginError, Unrecorded
from wetware.hookspecs import Accept, NotMine, Reject, RoleProfile, Service, Withdrawn
from wetware.identity import Challenge, Key, LoginStatus, PeerId, Principal, Proof, verify
from wetware.testing import AuthConformance, RecorderConformance, ServiceConformance, run_watched

SCHEMA = rpc.load(Path(__file__).with_name("planted.capnp"))
HANGS_S = 3.0
"""For what hangs: so long has everything else to work, on a busy machine too."""
BLOCKS_S = 1.5
"""A turn of the loop: as long as what does not block may wait for a processor or a disk."""
STUBBORN_S = 0.05
"""For a `run` that ignores its cancellation: nothing else has to work, and anyio never rests."""


def failing(suite: Any) -> dict[str, str]:
    """The checks of a suite that fail, as pytest would run them: name → message."""
    found = {}
    for name in dir(suite):
        if name.startswith("test_"):
            try:
                getattr(suite, name)()
            except (AssertionError, PluginError) as exc:  # the latter is the loader's
                found[name.removeprefix("test_")] = str(exc)
    return found


# --- a loop that is watched -----------------------------------------------------------------------


def test_a_blocked_loop_is_interrupted_and_named() -> None:
    async def spins() -> None:
        while True:
            with contextlib.suppress(Exception):
                pass

    async def sleeps() -> None:
        time.sleep(3600)  # noqa: ASYNC251  # the defect

    for blocks in (spins, sleeps):
        with pytest.raises(AssertionError, match=rf"blocks the event loop: .*{blocks.__name__}"):
            run_watched(blocks, blocked_s=0.2)


def test_a_loop_that_waits_is_not_blocked() -> None:
    async def waits() -> None:
        await asyncio.sleep(1.0)

    run_watched(waits, blocked_s=0.1)


def test_what_nobody_looks_at_is_found() -> None:
    async def forgets() -> None:
        async def fails() -> None:
            raise ValueError("boom")

        task = asyncio.create_task(fails())
        await asyncio.sleep(0.01)
        del task

    with pytest.raises(AssertionError, match=r"nobody got: .*ValueError: boom at .*fails"):
        run_watched(forgets)


def test_a_task_that_stays_is_found_and_one_that_ends_is_not() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    kept: list[Any] = []

    async def leaves() -> None:
        kept.append(asyncio.create_task(wait_for_ever()))

    async def ends_later() -> None:
        kept.append(asyncio.create_task(asyncio.sleep(0.05)))

    with pytest.raises(AssertionError, match=r"leaves 1 tasks behind: .*wait_for_ever"):
        run_watched(leaves, ends_s=0.1)
    run_watched(ends_later)


def test_the_timer_of_others_goes_on() -> None:
    import signal

    async def nothing() -> None:
        pass

    before = signal.setitimer(signal.ITIMER_REAL, 1000.0)
    try:
        run_watched(nothing)
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


# --- services -------------------------------------------------------------------------------------

ADA, EVE = (Key.from_seed(seed * 32) for seed in (b"a", b"e"))


class ShelfService(Service):
    """What the contract asks for."""

    name = "shelf"
    interface = SCHEMA.Shelf
    roles = {
        "reader": frozenset({"Box.get", "Shelf.open"}),
        "member": frozenset({"Box.*", "Shelf.open"}),
        "admin": frozenset({"*"}),
    }
    ending = frozenset({"Shelf.drop"})

    def __init__(self) -> None:
        self.boxes: dict[str, bytes] = {}
        self.tasks: set[asyncio.Task[Any]] = set()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return ShelfServant(self)


class ShelfServant(rpc.Servant, interface=SCHEMA.Shelf):
    def __init__(self, service: Any) -> None:
        self.service = service

    async def open(self, name: str) -> Any:
        if len(name) > 100:
            raise InvalidArgument("a long name")
        return {"box": BoxServant(self.service, name)}

    async def count(self, from_: int = 0, **_: Any) -> Any:
        return {"count": len(self.service.boxes)}

    async def drop(self) -> None:
        self.service.boxes.clear()


class BoxServant(rpc.Servant, interface=SCHEMA.Box):
    def __init__(self, service: Any, name: str) -> None:
        self.service, self.name = service, name

    async def put(self, value: bytes) -> None:
        self.service.boxes[self.name] = value

    async def get(self) -> Any:
        return {"value": self.service.boxes.get(self.name, b"")}

    async def watch(self, sink: Any) -> None:
        if sink is None:
            raise InvalidArgument("no sink")
        await sink.changed(value=b"")


class TwinServant(rpc.Servant, interface=SCHEMA.Twin):
    def __init__(self, service: Any, node: Principal) -> None:
        self.service = service
        assert PeerId.parse(node.subject)
        assert node.backend == "node"

    async def have(self, name: str) -> Any:
        return {"value": self.service.boxes.get(name, b"")}

    async def wait(self) -> None:
        await asyncio.sleep(0.2)  # in flight when its node is put out

    async def box(self) -> Any:
        return {"box": BoxServant(self.service, "")}


class TwinsService(ShelfService):
    """The same, which has siblings."""

    peer_interface = SCHEMA.Twin

    def peer_bootstrap(self, node: Principal) -> rpc.Servant | None:
        return TwinServant(self, node)


class TestTwins(ServiceConformance):
    examples = {"Twin.have": {"name": "one"}}

    def make(self, ctx: Any) -> Service:
        return TwinsService()


class TestShelf(ServiceConformance):
    """Collected by pytest, as in a plugin's tests."""

    examples = {"Shelf.open": {"name": "one"}}

    def make(self, ctx: Any) -> Service:
        return ShelfService()


def _limited(suite: Any, limit_s: float) -> Any:
    suite.limit_s = limit_s
    return suite


def planted(limit_s: float = 20.0, **methods: Any) -> Any:
    """The suite for a service like the good one, with other methods of the service."""
    made = type("Planted", (ShelfService,), methods)

    class Suite(ServiceConformance):
        blocked_s = BLOCKS_S

        def make(self, ctx: Any) -> Any:
            return made()

    return _limited(Suite(), limit_s)


def twins(interface: Any = SCHEMA.Twin, of: Any = TwinServant, **methods: Any) -> Any:
    """The suite for one whose siblings' servant is another one."""
    made: Any = type("Planted", (of,), methods)
    return planted(peer_interface=interface, peer_bootstrap=lambda self, node: made(self, node))


def shelf(**methods: Any) -> Callable[..., rpc.Servant]:
    """A `bootstrap` whose servant has other methods."""
    made: Any = type("Planted", (ShelfServant,), methods)
    return lambda self, principal: made(self)


def box(**methods: Any) -> Callable[..., rpc.Servant]:
    """The same for what `open` gives."""
    made: Any = type("Planted", (BoxServant,), methods)

    async def open_(self: Any, name: str) -> Any:
        return {"box": made(self.service, name)}

    return shelf(open=open_)


async def _raises_at_once(self: Any, *, task_status: Any) -> None:
    raise ValueError("boom")


async def _raises_later(self: Any, *, task_status: Any) -> None:
    task_status.started()
    raise ValueError("boom")


async def _never_starts(self: Any, *, task_status: Any) -> None:
    await asyncio.Event().wait()


async def _ends(self: Any, *, task_status: Any) -> None:
    task_status.started()


async def _forgets_to_start(self: Any, *, task_status: Any) -> None:
    pass


async def _ignores_cancellation(self: Any, *, task_status: Any) -> None:
    task_status.started()
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


async def _leaks(self: Any, *, task_status: Any) -> None:
    self.tasks.add(asyncio.create_task(asyncio.Event().wait()))
    task_status.started()
    await asyncio.Event().wait()


async def _blocks(self: Any, *, task_status: Any) -> None:
    time.sleep(3600)  # noqa: ASYNC251  # the defect


async def _box_raises(self: Any, value: bytes) -> None:
    self.service.boxes[self.name] = value[100_000]


async def _box_returns_junk(self: Any) -> Any:
    return {"value": "text"}


async def _box_hangs(self: Any, value: bytes) -> None:
    await asyncio.Event().wait()


async def _box_blocks(self: Any) -> Any:
    while True:
        pass


async def _box_leaks(self: Any, value: bytes) -> None:
    self.service.tasks.add(asyncio.create_task(asyncio.Event().wait()))


async def _drop_ignores_cancellation(self: Any) -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


async def _open_unguarded(self: Any, name: str) -> Any:
    return {"box": rpc.guarded(BoxServant(self.service, name), None)}


async def _twin_returns_junk(self: Any, name: str) -> Any:
    return {"value": "text"}


async def _twin_unguarded(self: Any) -> Any:
    return {"box": rpc.guarded(BoxServant(self.service, ""), None)}


_TWIN = TwinServant(ShelfService(), Principal("node", str(ADA.peer_id)))
_SHARED = ShelfServant(ShelfService())
STARTS = {"it_starts_and_stops", "every_method_answers", "calls_are_cut"}
STOPS = {*STARTS, "it_stops_while_it_starts"}

DEFECTS: dict[str, tuple[Any, set[str], str]] = {
    "raises when started": (planted(run=_raises_at_once), STARTS, "run.. raises ValueError"),
    "raises later": (planted(run=_raises_later), STOPS, "run.. raises ValueError"),
    "hangs when started": (planted(HANGS_S, run=_never_starts), STARTS, "not started, hangs"),
    "ends by itself": (planted(run=_ends), STOPS, "ended by itself"),
    "is never ready": (planted(run=_forgets_to_start), STOPS, "ended before it was started"),
    "ignores cancellation": (
        planted(STUBBORN_S, run=_ignores_cancellation),
        STOPS,
        "was cancelled, hangs",
    ),
    "leaks a task": (planted(HANGS_S, run=_leaks), STOPS, "leaves [0-9] tasks behind"),
    "blocks the loop when started": (
        planted(run=_blocks),
        STOPS,
        "blocks the event loop: .*_blocks",
    ),
    "a method raises": (
        planted(bootstrap=box(put=_box_raises)),
        {"every_method_answers"},
        r"Box.put raises.*IndexError.* at _box_raises",
    ),
    "a method returns junk": (
        planted(bootstrap=box(get=_box_returns_junk)),
        {"every_method_answers"},
        r"Box.get raises, or returns junk.*expected bytes, not str",
    ),
    "a method hangs": (
        planted(HANGS_S, bootstrap=box(put=_box_hangs)),
        {"every_method_answers"},
        "Box.put hangs",
    ),
    "a method blocks the loop": (
        planted(bootstrap=box(get=_box_blocks)),
        {"every_method_answers"},
        "blocks the event loop: _box_blocks",
    ),
    "a method leaks a task": (
        planted(HANGS_S, bootstrap=box(put=_box_leaks)),
        {"every_method_answers"},
        "leaves [0-9] tasks behind: Event.wait",
    ),
    "a method ignores cancellation": (
        planted(HANGS_S, bootstrap=shelf(drop=_drop_ignores_cancellation)),
        {"every_method_answers", "calls_are_cut"},
        "hangs|leaves . tasks behind",
    ),
    "a capability outlives its grant": (
        planted(bootstrap=shelf(open=_open_unguarded)),
        {"every_method_answers"},
        "gives too much: Box.put works after its grant ended",
    ),
    "one object for all": (
        planted(bootstrap=lambda self, principal: _SHARED),
        {"it_is_declared"},
        "gives too much: bootstrap.. is one object for two principals",
    ),
    "bootstrap is junk": (
        planted(bootstrap=lambda self, principal: {"shelf": 1}),
        {"it_is_declared", "every_method_answers", "calls_are_cut"},
        "returns .'shelf': 1.",
    ),
    "bootstrap is of another interface": (
        planted(bootstrap=lambda self, principal: BoxServant(self, "")),
        {"it_is_declared", "every_method_answers", "calls_are_cut"},
        "is a Box, not a Shelf",
    ),
    "a reader may do more than a member": (
        planted(roles={"reader": frozenset({"Box.put"}), "member": frozenset({"Box.get"})}),
        {"what_it_proposes_for_roles_grows"},
        "gives too much: reader has Box.put, and member has not",
    ),
    "a role that there is not": (
        planted(roles={"owner": frozenset({"*"})}),
        {"it_is_declared"},
        "proposes something for a role 'owner'",
    ),
    "a method that there is not": (
        planted(roles={"reader": frozenset({"Box.read"})}),
        {"it_is_declared"},
        "proposes 'Box.read' for 'reader', which is no method",
    ),
    "what ends things gives one": (
        planted(ending=frozenset({"Shelf.open"})),
        {"what_ends_things_gives_nothing"},
        "gives too much: ending methods of Shelf give a Box",
    ),
    "siblings without an interface": (
        twins(None),
        {"its_siblings_answer"},
        "peer_interface is None, and peer_bootstrap.. makes something",
    ),
    "no siblings of its interface": (
        planted(peer_interface=SCHEMA.Twin),
        {"its_siblings_answer"},
        "peer_bootstrap.. returns None",
    ),
    "siblings of another interface": (
        twins(of=BoxServant),
        {"its_siblings_answer"},
        "peer_bootstrap.. is a Box",
    ),
    "a node comes to be a user": (
        twins(SCHEMA.Shelf),
        {"its_siblings_answer"},
        "gives too much: a node comes to hold a Shelf",
    ),
    "one sibling for all": (
        planted(peer_interface=SCHEMA.Twin, peer_bootstrap=lambda self, node: _TWIN),
        {"its_siblings_answer"},
        "gives too much: peer_bootstrap.. is one object for two nodes",
    ),
    "a sibling returns junk": (
        twins(have=_twin_returns_junk),
        {"its_siblings_answer"},
        r"Twin.have raises, or returns junk.*expected bytes, not str",
    ),
    "what a sibling gives outlives a membership": (
        twins(box=_twin_unguarded),
        {"its_siblings_answer"},
        "gives too much: Box.put works after that node was put out",
    ),
    "what ends things is not there": (
        planted(ending=frozenset({"Shelf.close"})),
        {"what_ends_things_gives_nothing"},
        "ending has 'Shelf.close'",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_service_with_a_defect_fails(defect: str) -> None:
    suite, checks, says = DEFECTS[defect]
    found = failing(suite)
    assert set(found) == checks, found
    assert any(re.search(says, text) for text in found.values()), found


# --- auth backends --------------------------------------------------------------------------------


class KeySigner:
    def __init__(self, key: Key) -> None:
        self.key = key

    async def sign(self, challenge: Challenge) -> Proof:
        statement = challenge.signed_bytes()
        return Proof("keys", self.key.public + self.key.sign(statement), statement)


class KeysBackend:
    """What the contract asks for."""

    name, schemes, founding, epoch = "keys", ("keys",), b"the keys", 1
    services = ()

    def __init__(self) -> None:
        self.roles_of = {ADA.peer_id: frozenset({"member"})}
        self.watchers: list[Any] = []
        self.tasks: set[Any] = set()

    async def run(self, *, task_status: Any) -> None:
        task_status.started()
        await asyncio.Event().wait()

    async def authenticate(self, challenge: Challenge, proof: Proof) -> Any:
        if proof.scheme != "keys":
            return NotMine()
        public, signature = proof.payload[:32], proof.payload[32:]
        if not verify(public, signature, challenge.signed_bytes()):
            return Reject(LoginStatus.BAD_SIGNATURE, "the signature is wrong")
        principal = Principal("keys", PeerId.from_public_key(public))
        if not (roles := self.roles(principal)):
            return Reject(LoginStatus.UNKNOWN_PRINCIPAL, "nobody knows the key")
        return Accept(principal, roles)

    def roles(self, principal: Principal) -> frozenset[str]:
        mine = principal.backend == "keys"
        return self.roles_of.get(principal.subject, frozenset()) if mine else frozenset()

    def profile(self, role: str) -> RoleProfile:
        return RoleProfile({"shelf": frozenset({"*"})} if role == "member" else {})

    async def join_document(self) -> bytes:
        return b""

    async def admit_node(self, peer: PeerId) -> bool:
        return True

    def findings(self) -> Any:
        return ()

    def watch(self, callback: Any) -> Callable[[], None]:
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)

    def withdraw(self) -> None:
        for peer in self.roles_of:
            for callback in self.watchers:
                callback(Withdrawn(Principal("keys", peer)))
        self.roles_of.clear()


class KeysConformance(AuthConformance):
    backend: type = KeysBackend

    def make(self, ctx: Any) -> Any:
        return self.backend()

    async def member(self, backend: Any) -> KeySigner:
        return KeySigner(ADA)

    def stranger(self) -> KeySigner:
        return KeySigner(EVE)

    async def withdraw(self, backend: Any) -> None:
        backend.withdraw()


class TestKeys(KeysConformance):
    """Collected by pytest, as in a plugin's tests."""


def bad(limit_s: float = 20.0, **methods: Any) -> Any:
    """The suite for a backend like the good one, with other methods."""

    class Suite(KeysConformance):
        blocked_s = BLOCKS_S
        backend = type("Bad", (KeysBackend,), methods)

    return _limited(Suite(), limit_s)


async def _accepts_all(self: Any, challenge: Challenge, proof: Proof) -> Any:
    return Accept(Principal("keys", ADA.peer_id), frozenset({"member"}))


async def _knows_the_key_alone(self: Any, challenge: Challenge, proof: Proof) -> Any:
    principal = Principal("keys", PeerId.from_public_key(proof.payload[:32]))
    return Accept(principal, self.roles(principal))


async def _raises_for_junk(self: Any, challenge: Challenge, proof: Proof) -> Any:
    if len(proof.payload) != 96:
        raise IndexError("no key")
    return await KeysBackend.authenticate(self, challenge, proof)


async def _hangs(self: Any, challenge: Challenge, proof: Proof) -> Any:
    await asyncio.Event().wait()


async def _returns_junk(self: Any, challenge: Challenge, proof: Proof) -> Any:
    return True


async def _rejects_with_a_grant(self: Any, challenge: Challenge, proof: Proof) -> Any:
    verdict = await KeysBackend.authenticate(self, challenge, proof)
    return verdict if isinstance(verdict, Accept) else Reject(LoginStatus.GRANTED, "well")


async def _blocks_to_decide(self: Any, challenge: Challenge, proof: Proof) -> Any:
    time.sleep(3600)  # noqa: ASYNC251  # the defect


async def _leaks_a_check(self: Any, challenge: Challenge, proof: Proof) -> Any:
    self.tasks.add(asyncio.create_task(asyncio.Event().wait()))
    return await KeysBackend.authenticate(self, challenge, proof)


async def _gives_more_roles(self: Any, challenge: Challenge, proof: Proof) -> Any:
    verdict = await KeysBackend.authenticate(self, challenge, proof)
    if isinstance(verdict, Accept):
        return Accept(verdict.principal, verdict.roles | {"admin"})
    return verdict


def _tells_nobody(self: Any) -> None:
    self.roles_of.clear()


def _keeps_the_role(self: Any) -> None:
    for callback in self.watchers:
        callback(Withdrawn(None))


def _holds_a_callback_once(self: Any, callback: Any) -> Callable[[], None]:
    if callback not in self.watchers:
        self.watchers.append(callback)
    return lambda: self.watchers.remove(callback) if callback in self.watchers else None


LOGINS = {"a_member_is_let_in", "what_is_withdrawn_is_gone"}
REFUSALS = {"strangers_are_refused", "junk_is_refused", "a_proof_is_for_one_challenge"}
RUNS = {"it_is_declared", "it_starts_and_stops", *LOGINS, *REFUSALS}

BAD_BACKENDS: dict[str, tuple[Any, set[str], str]] = {
    "raises when started": (bad(run=_raises_at_once), RUNS, "run.. raises ValueError"),
    "ignores cancellation": (
        bad(STUBBORN_S, run=_ignores_cancellation),
        {*RUNS, "it_stops_while_it_starts"},
        "was cancelled, hangs",
    ),
    "accepts everything": (
        bad(authenticate=_accepts_all),
        {*REFUSALS, "what_is_withdrawn_is_gone"},
        "gives too much: it accepts a stranger's proof",
    ),
    "asks for no signature": (
        bad(authenticate=_knows_the_key_alone),
        REFUSALS,
        "gives too much: it accepts junk",
    ),
    "raises for junk": (
        bad(authenticate=_raises_for_junk),
        {"junk_is_refused"},
        "authenticate.. raises for junk .*IndexError",
    ),
    "hangs": (bad(HANGS_S, authenticate=_hangs), {*LOGINS, *REFUSALS}, "authenticate.. hangs"),
    "returns junk": (
        bad(authenticate=_returns_junk),
        {*LOGINS, *REFUSALS},
        "authenticate.. returns True",
    ),
    "rejects with a grant": (
        bad(authenticate=_rejects_with_a_grant),
        {*REFUSALS, "what_is_withdrawn_is_gone"},
        "gives too much: a Reject is GRANTED",
    ),
    "blocks the loop": (
        bad(authenticate=_blocks_to_decide),
        {*LOGINS, *REFUSALS},
        "blocks the event loop: _blocks_to_decide",
    ),
    "leaks a task": (
        bad(HANGS_S, authenticate=_leaks_a_check),
        {*LOGINS, *REFUSALS},
        "leaves [0-9]+ tasks behind",
    ),
    "logs in with a role that is none": (
        bad(authenticate=_gives_more_roles),
        {"a_member_is_let_in"},
        "gives too much: .'admin'. is no role",
    ),
    "knows everybody": (
        bad(roles=lambda self, principal: frozenset({"member"})),
        {"strangers_are_refused", "what_is_withdrawn_is_gone"},
        "gives too much: nobody has .'member'.|it accepts a stranger",
    ),
    "gives something to any role": (
        bad(profile=lambda self, role: RoleProfile({"*": frozenset({"*"})})),
        {"strangers_are_refused"},
        "gives too much: to an unknown role",
    ),
    "tells nobody of a withdrawal": (
        bad(withdraw=_tells_nobody),
        {"what_is_withdrawn_is_gone"},
        "gives too much: no watcher was told",
    ),
    "ends two watches at once": (
        bad(watch=_holds_a_callback_once),
        {"what_is_withdrawn_is_gone"},
        "gives too much: no watcher was told",
    ),
    "keeps what was withdrawn": (
        bad(withdraw=_keeps_the_role),
        {"what_is_withdrawn_is_gone"},
        "gives too much: .'member'. was withdrawn",
    ),
    "is founded anew at each start": (
        bad(founding=property(lambda self: repr(id(self)).encode())),
        {"it_starts_and_stops"},
        "founding differs after a restart",
    ),
    "has no name of its cluster": (bad(founding=b""), {"it_is_declared"}, "founding is empty"),
}


@pytest.mark.parametrize("defect", BAD_BACKENDS)
def test_a_backend_with_a_defect_fails(defect: str) -> None:
    suite, checks, says = BAD_BACKENDS[defect]
    found = failing(suite)
    assert set(found) == checks, found
    assert any(re.search(says, text) for text in found.values()), found


# --- recorders ------------------------------------------------------------------------------------


class LinesRecorder:
    """What the contract asks for."""

    name, services, ended = "lines", (), False

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tasks: set[Any] = set()

    async def run(self, *, task_status: Any) -> None:
        try:
            task_status.started()
            await asyncio.Event().wait()
        finally:
            self.ended = True

    async def admit(self, record: Any) -> None:
        if self.ended:
            raise Unrecorded("it has ended")
        self.report(record, ending=False)

    def report(self, record: Any, *, ending: bool) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    async def written(self) -> None:
        pass

    def findings(self) -> Any:
        return ()


class LinesConformance(RecorderConformance):
    recorder: type = LinesRecorder

    def make(self, ctx: Any, sign: Any) -> Any:
        return self.recorder(ctx.data_dir / "lines")

    def recorded(self, data_dir: Path) -> Any:
        file = data_dir / "lines"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class TestLines(LinesConformance):
    """Collected by pytest, as in a plugin's tests."""


def unfit(limit_s: float = 20.0, **methods: Any) -> Any:
    """The suite for a recorder like the good one, with other methods."""

    class Suite(LinesConformance):
        blocked_s = BLOCKS_S
        recorder = type("Unfit", (LinesRecorder,), methods)

    return _limited(Suite(), limit_s)


async def _admit_raises(self: Any, record: Any) -> None:
    raise ValueError("boom")


async def _admit_hangs(self: Any, record: Any) -> None:
    await asyncio.Event().wait()


async def _admit_writes_nothing(self: Any, record: Any) -> None:
    pass


async def _admit_writes_later(self: Any, record: Any) -> None:
    asyncio.get_running_loop().call_later(0.01, lambda: self.report(record, ending=False))


async def _admit_goes_on(self: Any, record: Any) -> None:
    if not self.ended:
        self.report(record, ending=False)


async def _admit_leaks(self: Any, record: Any) -> None:
    self.tasks.add(asyncio.create_task(asyncio.Event().wait()))
    await LinesRecorder.admit(self, record)


def _report_blocks(self: Any, record: Any, *, ending: bool) -> None:
    time.sleep(3600)


def _report_forgets(self: Any, record: Any, *, ending: bool) -> None:
    if ending:
        LinesRecorder.report(self, record, ending=ending)


async def _written_hangs(self: Any) -> None:
    await asyncio.Event().wait()


async def _run_starts_anew(self: Any, *, task_status: Any) -> None:
    self.file.write_text("")
    await LinesRecorder.run(self, task_status=task_status)


ADMITS, REPORTS = "what_is_admitted_is_on_record", "what_is_reported_is_on_record_once_written"
ENDED = "it_admits_nothing_once_it_has_ended"
RECORDS = {"it_is_declared", "it_starts_and_stops", ADMITS, REPORTS, ENDED}

UNFIT_RECORDERS: dict[str, tuple[Any, set[str], str]] = {
    "raises when started": (unfit(run=_raises_at_once), RECORDS, "run.. raises ValueError"),
    "ignores cancellation": (
        unfit(STUBBORN_S, run=_ignores_cancellation),
        {*RECORDS, "it_stops_while_it_starts"},
        "was cancelled, hangs",
    ),
    "raises": (unfit(admit=_admit_raises), {ADMITS}, "admit.. raises ValueError"),
    "hangs": (unfit(HANGS_S, admit=_admit_hangs), {ADMITS, ENDED}, "admit.. hangs"),
    "admits what it does not record": (
        unfit(admit=_admit_writes_nothing),
        {ADMITS, ENDED},
        "gives too much: it admits what it does not record",
    ),
    "admits before it is on record": (
        unfit(admit=_admit_writes_later),
        {ADMITS, ENDED},
        "admit.. returned, and test.0 is not there",
    ),
    "admits when it has ended": (unfit(admit=_admit_goes_on), {ENDED}, "gives too much"),
    "leaks a task": (unfit(HANGS_S, admit=_admit_leaks), {ADMITS, ENDED}, "tasks behind"),
    "blocks the loop": (
        unfit(report=_report_blocks),
        {ADMITS, REPORTS},
        "blocks the event loop: _report_blocks",
    ),
    "forgets what took effect": (
        unfit(report=_report_forgets),
        {ADMITS, REPORTS},
        "what was reported is not there",
    ),
    "never says that it is written": (
        unfit(HANGS_S, written=_written_hangs),
        {REPORTS},
        "written.. hangs",
    ),
    "loses all at a restart": (unfit(run=_run_starts_anew), {ADMITS}, "a restart loses"),
}


@pytest.mark.parametrize("defect", UNFIT_RECORDERS)
def test_a_recorder_with_a_defect_fails(defect: str) -> None:
    suite, checks, says = UNFIT_RECORDERS[defect]
    found = failing(suite)
    assert set(found) == checks, found
    assert any(re.search(says, text) for text in found.values()), found
