"""What a holder might try: one test for each way to get more, or to keep what has ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import capnp
import pytest

from wetware import rpc
from wetware.broker.fences import Fence
from wetware.broker.protocol import CORE
from wetware.broker.sturdy import SturdyRef
from wetware.errors import (
    Amplification,
    Denied,
    Expired,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
    Unsupported,
    WetwareError,
)
from wetware.hookspecs import RoleProfile
from wetware.identity import Key, Principal

from .cluster import BOX, Backend, MemNode, box, terms_to_struct
from .parts import Clock, where

pytestmark = pytest.mark.anyio


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[MemNode]:
    everything = RoleProfile({"box": frozenset({"*"})})
    bounded = RoleProfile({"box": frozenset({"*"})}, where("key=glob:mine/*").where)
    # One may read what is its own, the other may open anything, and read nothing.
    reader = RoleProfile(
        {"box": frozenset({"Box.open", "Item.read"})}, where("key=glob:mine/*").where
    )
    opener = RoleProfile({"box": frozenset({"Box.open", "Item.box"})})
    backend = Backend(
        {"member": everything, "bounded": bounded, "reader": reader, "opener": opener},
        {"ada": {"member"}, "bob": {"member"}, "eve": {"bounded"}, "zoe": {"reader", "opener"}},
    )
    made = MemNode("a", tmp_path, backend, Clock())
    async with rpc.runtime(), made.running():
        yield made


class Holder(rpc.Servant, interface=BOX.Item):
    def __init__(self, data: bytes = b"own") -> None:
        self.data = data

    async def read(self) -> dict[str, Any]:
        return {"data": self.data}

    async def box(self) -> dict[str, Any]:
        raise Unsupported("none")


class SinkServant(rpc.Servant, interface=BOX.Sink):
    def __init__(self) -> None:
        self.items: list[rpc.Ref] = []
        self.own = Holder()

    async def push(self, item: rpc.Ref, data: bytes) -> dict[str, Any]:
        self.items.append(item)
        return {"reply": self.own}


READ_ONE = {"box": ["Box.open", "Item.read", "Item.box"]}


async def test_amplification_by_a_returned_capability(node: MemNode) -> None:
    async with node.login("ada") as session:
        weak = await session.attenuate(READ_ONE, {"key": "a"})
        item = (await (await box(weak)).open(key="a"))["item"]
        back = (await item.box())["box"]  # the servant gives out its whole box
        for attempt in (back.put(key="a", data=b"x"), back.get(key="a"), back.open(key="b")):
            with pytest.raises(Denied):
                await attempt
        await back.open(key="a")


async def test_a_share_of_one_object_is_held_to_it_in_every_method(node: MemNode) -> None:
    node.box.data.update(a=b"1", b=b"2")
    async with node.login("ada") as session:
        whole, _ = await session.share({"box:a": []})
        get, info = await session.share({"box:a": ["Box.get"]})
        assert info.terms[:2] == ("box Box.get", "box key=a"), "no method is added"
        for beyond in ("Box.items", "Box.kept", "Box.keep"):
            with pytest.raises(InvalidArgument, match="is not about one object KEY of box"):
                await session.share({"box:a": [beyond]})
        for wrong in ({"box:": []}, {"session:a": []}, {"*:a": []}, {"nothing:a": []}):
            with pytest.raises((InvalidArgument, NotFound, Amplification)):
                await session.share(wrong)
        with pytest.raises(InvalidArgument, match="named twice"):
            await session.share({"box:a": [], "box": []})
    async with node.redeem(whole) as held:
        shared = await box(held)
        await shared.put(key="a", data=b"3")
        item = (await shared.open(key="a"))["item"]
        assert (await item.read())["data"] == b"3"
        back = (await item.box())["box"]
        assert (await back.get(key="a"))["data"] == b"3"
        for beyond in (
            shared.get(key="b"), shared.put(key="b", data=b""), shared.open(key="b"),
            shared.items(), shared.kept(), shared.slow(), back.items(), back.get(key="b"),
        ):  # fmt: skip
            with pytest.raises(Denied):
                await beyond
        with pytest.raises(InvalidArgument, match="is not about one object"):
            await held.share({"box:a": ["Box.items"]})
    async with node.redeem(get) as held:
        shared = await box(held)
        assert (await shared.get(key="a"))["data"] == b"3"
        for beyond in (shared.get(key="b"), shared.put(key="a", data=b""), shared.open(key="a")):
            with pytest.raises(Denied):
                await beyond
    assert node.box.data == {"a": b"3", "b": b"2"}


async def test_an_object_beside_every_service_is_refused(node: MemNode) -> None:
    node.backend.profiles["all"] = RoleProfile({"*": frozenset({"*"})})
    node.backend.users["root"] = {"all"}
    async with node.login("root", ["all"]) as session:
        for void in ({"*": [], "box:a": ["Box.get"]}, {"box:a": ["Box.get"], "*": []}):
            with pytest.raises(InvalidArgument, match="not held to the object") as refused:
                await session.attenuate(void)
            assert refused.value.code == "invalid.terms"
        await session.attenuate({"*": []})


async def test_amplification_by_a_callback(node: MemNode) -> None:
    async with node.login("ada") as session:
        weak = await session.attenuate({"box": ["Box.watch", "Item.read"]})
        sink = SinkServant()
        await (await box(weak)).watch(sink=sink)
        (held,) = node.box.sinks
        from .cluster import ItemServant

        reply = (await held.push(item=ItemServant(node.box, "a"), data=b""))["reply"]
        (item,) = sink.items
        await item.read()
        with pytest.raises(Denied):
            await item.box()
        assert (await reply.read())["data"] == b"own"
        await session.revoke((await weak.whoami()).grant)
        for dead in (item.read(), held.push(item=None, data=b""), reply.read()):
            with pytest.raises(Revoked):
                await dead


async def test_amplification_by_a_list_element(node: MemNode) -> None:
    node.box.data.update(a=b"1", b=b"2")
    async with node.login("ada") as session:
        weak = await session.attenuate({"box": ["Box.items", "Item.read"]})
        got = await (await box(weak)).items()
        items = [entry["item"] for entry in got["entries"]] + [got["first"]["item"]]
        assert [(await item.read())["data"] for item in items] == [b"1", b"2", b"1"]
        for item in items:
            with pytest.raises(Denied):
                await item.box()
        await session.revoke((await weak.whoami()).grant)
        for item in items:
            with pytest.raises(Revoked):
                await item.read()


async def test_amplification_by_an_untyped_pointer(node: MemNode) -> None:
    async with node.login("ada") as session:
        weak = await session.attenuate({"box": ["Box.any", "Item.read"]})
        item = (await (await box(weak)).any())["cap"].cast(BOX.Item)
        await item.read()
        with pytest.raises(Denied):
            await item.box()
        with pytest.raises(WetwareError):  # cast to what it is not
            await (await (await box(weak)).any())["cap"].cast(BOX.Box).get(key="a")


async def test_amplification_by_pipelining_on_a_promise_that_is_revoked_meanwhile(
    node: MemNode, tmp_path: Path
) -> None:
    """A raw client calls on the result of a call that has not returned."""
    node.box.gate.clear()
    grant = node.broker.open_session(Principal("fake", "ada"), {"member"})
    service = grant.derive(kind="service", label="s", service="box")
    path = tmp_path / "raw"
    async with rpc.serve_unix(path, lambda _: rpc.guarded(node.box.bootstrap(None), service)):  # type: ignore[arg-type]
        stream = await capnp.AsyncIoStream.create_unix_connection(path=str(path))
        client = capnp.TwoPartyClient(stream)
        raw = client.bootstrap().cast_as(BOX.Box.raw)
        opening = raw._request_helper("open", None, None, None)
        opening.key = "a"
        promise = opening.send()
        reading = promise.item._request_helper("read", None, None, None).send()
        while not service.calls_in_flight:
            await asyncio.sleep(0.001)
        service.revoke("now")
        node.box.gate.set()
        for dead in (promise, reading):
            with pytest.raises(capnp.KjException, match="revoked"):
                await dead
        del raw, opening, promise, reading, dead
        client.close()
        stream.close()


async def test_amplification_by_logging_in_again(node: MemNode) -> None:
    async with node.login("eve", ("bounded",)) as session:
        await (await box(session)).put(key="mine/a", data=b"")
        with pytest.raises(Denied):
            await (await box(session)).put(key="a", data=b"")
        ref, _ = await session.share({"box": []}, calls=2)
    async with node.login("eve", ("bounded",)) as session:
        with pytest.raises(Denied):
            await (await box(session)).put(key="a", data=b"")
    done = 0
    for _ in range(4):  # redeeming again gives no new quota
        async with node.redeem(ref) as bearer:
            with contextlib.suppress(LimitExceeded):
                await (await box(bearer)).put(key="mine/b", data=b"")
                done += 1
    assert done == 2


async def test_amplification_by_combining_roles(node: MemNode) -> None:
    """What one role lets reach, and another one's constraint does not, the other does not serve."""
    async with node.login("zoe", ("reader", "opener")) as session:
        opened = await box(session)
        mine = (await opened.open(key="mine/a"))["item"]
        await mine.read()
        await mine.box()
        other = (await opened.open(key="other"))["item"]  # by the opener's leave alone
        with pytest.raises(Denied):
            await other.read()
        back = (await other.box())["box"]
        nested = (await back.open(key="mine/a"))["item"]  # it stays so below
        with pytest.raises(Denied):
            await nested.read()
        await mine.read()
        await (await opened.open(key="mine/b"))["item"].read()
        ref, _ = await session.share({"box": []})
    async with node.redeem(ref) as bearer:
        opened = await box(bearer)
        await (await opened.open(key="mine/a"))["item"].read()
        with pytest.raises(Denied):
            await (await opened.open(key="other"))["item"].read()
    with pytest.raises(Denied):  # as with each role alone
        async with node.login("zoe", ("reader",)) as session:
            await (await box(session)).open(key="other")


async def test_amplification_by_attenuating_with_more(node: MemNode) -> None:
    async with node.login("ada") as session:
        weak = await session.attenuate(READ_ONE, {"key": "a"})
        for more in ({"box": ["*"]}, {"box": ["Box.*"]}, {"box": ["Box.put"]}, {"other": ["*"]}):
            with pytest.raises(Amplification):
                await weak.attenuate(more)
            with pytest.raises(Amplification):
                await weak.share(more)
        again = await weak.attenuate(None, {"key": "b"})  # both apply: nothing is left
        for key in "ab":
            with pytest.raises(Denied):
                await (await box(again)).open(key=key)


async def test_what_is_held_lives_and_what_nobody_holds_ends(node: MemNode) -> None:
    """Letting go of what a capability came from does not end it; letting go of all of it does."""
    async with node.login("ada") as session:
        item = (await (await box(await session.attenuate())).open(key="a"))["item"]
        below = await (await session.attenuate()).attenuate(READ_ONE)
        gc.collect()
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert await item.read()
            assert await below.whoami()
        async with asyncio.timeout(60):
            ids = {info.id for info in await session.grants() if info.kind == "attenuated"}
            assert len(ids) == 3
            del item, below
            while any(info.kind == "attenuated" for info in await session.grants()):
                gc.collect()
                await asyncio.sleep(0.01)


async def test_a_sealed_session_is_not_passed_on(node: MemNode) -> None:
    async with node.login("ada") as session:
        ref, _ = await session.share({"box": ["Box.get"]}, sealed=True)
        async with node.redeem(ref) as bearer:
            await (await box(bearer)).get(key="a")
            assert await bearer.grants(), "it sees and ends what is its own"
            for attempt in (bearer.share(), bearer.attenuate()):
                with pytest.raises(Denied):
                    await attempt


async def test_what_is_left_out_of_the_session_itself_is_left_out(node: MemNode) -> None:
    async with node.login("ada") as session:
        few = {"box": ["Box.get"], "session": ["Session.open", "Session.whoami"]}
        for sealed in (False, True):
            weak = await session.attenuate(few, sealed=sealed)
            await (await box(weak)).get(key="a")
            for attempt in (weak.grants(), weak.share(), weak.revoke("0" * 16)):
                with pytest.raises(Denied):
                    await attempt
        narrower = await session.attenuate({"session": ["Session.whoami", "Session.services"]})
        assert not await narrower.services()
        with pytest.raises(Denied):
            await narrower.attenuate()


async def test_terms_are_bounded_before_they_are_looked_at(node: MemNode) -> None:
    async with node.login("ada") as session:
        many = [{"name": "box", "methods": []}] * 1000
        for terms in (
            {"services": many},
            {"where": [{"service": "", "text": "key=a"}] * 1000},
            {"where": [{"service": "", "text": f"key=prefix:{'x' * 900}"}] * 10},
            {"services": [{"name": "box", "methods": [f"Box.{'x' * 300}"]}]},
        ):
            wire = {**terms_to_struct(), **terms}
            with pytest.raises(InvalidArgument, match="allowed"):
                await session._ref.call("attenuate", terms=wire, label="")


async def test_long_terms_below_do_not_hide_what_was_passed_on(node: MemNode) -> None:
    """A holder of a share must not be able to make the list too large for its owner."""
    async with node.login("ada") as session:
        ref, grant = await session.share({"box": []})
        others = {(await session.share({"box": ["Box.get"]}))[1].id for _ in range(20)}
        async with node.redeem(ref) as bearer:
            for n in range(400):
                long = [f"key=prefix:{n}{c}{'x' * 900}" for c in "abcd"]
                await bearer.share({"box": []}, long, label="l" * 128)
            found = {info.id for info in await session.grants()}
            assert {grant.id, *others} <= found
            assert len(found) > 100
        assert await session.revoke(grant.id) > 400


async def test_who_has_the_secret_is_told_the_end_without_spending_a_use(node: MemNode) -> None:
    async with node.login("ada") as session:
        text, grant = await session.share({"box": []})
        await session.revoke(grant.id, "no more")
    ref = SturdyRef.parse(text)
    async with await rpc.connect_unix(node.path) as connection:
        gate = connection.bootstrap(CORE.Gate)
        with pytest.raises(Revoked, match="no more"):
            await gate.call("describe", id=bytes.fromhex(ref.id), secret=ref.secret)


async def test_a_confused_deputy_acts_for_nobody_but_the_holder(node: MemNode) -> None:
    """The broker is asked, with a weak capability, to act on what others have."""
    async with node.login("ada") as ada, node.login("bob") as bob:
        ref, grant = await ada.share({"box": []})
        adas = (await ada.whoami()).grant
        for held in (bob, await bob.attenuate(READ_ONE)):
            for target in (grant.id, adas):
                with pytest.raises(NotFound):
                    await held.revoke(target)
            ids = {info.id for info in await held.grants()}
            assert not ids & {grant.id, adas}
        # A bearer sees and ends what comes from its own redemption, and neither the share that it
        # came by nor the sharer's session.
        async with node.redeem(ref) as bearer:
            for target in (grant.id, adas):
                with pytest.raises(NotFound):
                    await bearer.revoke(target)
        with pytest.raises(Denied):
            await (await box(await ada.attenuate(READ_ONE))).put(key="a", data=b"")
        decision = (await ada.why()).decision
        async with node.redeem(ref) as bearer:
            for other in (bob, bearer, await bob.attenuate()):
                for asked in (decision, ""):
                    with pytest.raises(NotFound):  # it would tell bob what ada asked for
                        await other.why(asked)
        assert await ada.revoke(grant.id) == 1


async def test_a_denial_is_explained_to_its_principal_in_a_new_session(node: MemNode) -> None:
    """As a command line asks, which logs in each time."""
    async with node.login("eve", ["bounded"]) as eve:
        with pytest.raises(Denied) as denied:
            await (await box(eve)).get(key="yours/1")
        ref, _ = await eve.share({"box": []})
        narrow = await eve.attenuate(READ_ONE)
    assert denied.value.hint.startswith("`ww why d-")
    decision = denied.value.hint.split()[-3].strip("`")
    async with node.redeem(ref) as bearer:
        with pytest.raises(Denied) as refused:
            await (await box(bearer)).get(key="yours/2")
        assert refused.value.hint.startswith("`ww use REF why d-")
        shared = refused.value.hint.split()[-3].strip("`")
    async with (
        node.login("eve", ["bounded"]) as eve,
        node.login("ada") as ada,
        node.redeem(ref) as bearer,
    ):
        assert (await eve.why(decision)).reason == "key=yours/1 is outside of key=glob:mine/*"
        assert (await eve.why()).decision == shared, "by whom it was shared with"
        assert (await bearer.why()).decision == (await bearer.why(shared)).decision == shared
        part = await eve.attenuate(READ_ONE)
        for other, unseen in ((ada, (decision, shared)), (bearer, (decision,)), (part, ("",))):
            for asked in unseen:
                with pytest.raises(NotFound):
                    await other.why(asked)
        with pytest.raises(NotFound):
            await part.why(decision)
    with pytest.raises(WetwareError):
        await narrow.why(decision)


async def test_a_revoked_holder_keeps_nothing(node: MemNode) -> None:
    async with node.login("ada") as session:
        ref, grant = await session.share({"box": []})
        async with node.redeem(ref) as bearer:
            opened = await box(bearer)
            item = (await opened.open(key="a"))["item"]
            own = Holder()
            await opened.keep(item=own)
            weak = await bearer.attenuate(READ_ONE)
            further, _ = await bearer.share(READ_ONE)
            running = asyncio.create_task(opened.slow())
            while not node.box.running:
                await asyncio.sleep(0.001)
            held = node.box.item
            assert await session.revoke(grant.id, "lost") == 5
            with pytest.raises(Revoked, match="lost"):
                await running
            assert node.box.running == 0
            for dead in (
                opened.get(key="a"), item.read(), held.read(), bearer.whoami(), weak.whoami()
            ):  # fmt: skip
                with pytest.raises(Revoked):
                    await dead
        for text in (ref, further):
            with pytest.raises(WetwareError):
                async with node.redeem(text):
                    pass


async def test_a_removed_user_loses_what_they_shared_and_passed_on(node: MemNode) -> None:
    async with node.login("ada") as session:
        ref, _ = await session.share({"box": []})
    async with node.redeem(ref) as bearer:
        opened = await box(bearer)
        await opened.get(key="a")
        node.backend.withdraw("ada", "member")
        with pytest.raises(Revoked):
            await opened.get(key="a")
    with pytest.raises(Revoked):
        async with node.redeem(ref):
            pass


async def test_a_clock_set_back_prolongs_no_capability(node: MemNode) -> None:
    clock = node.clock
    clock.mono = clock.now  # type: ignore[attr-defined]
    type(clock).monotonic = lambda self: getattr(self, "mono", self.now)  # type: ignore[method-assign]
    try:
        async with node.login("ada") as session:
            weak = await session.attenuate(expires_s=10)
            opened = await box(weak)
            clock.now -= 500
            await opened.get(key="a")
            clock.mono += 11  # type: ignore[attr-defined]
            with pytest.raises(Expired):
                await opened.get(key="a")
    finally:
        type(clock).monotonic = lambda self: self.now  # type: ignore[method-assign]


async def test_a_forged_or_stale_fence_is_refused(node: MemNode) -> None:
    home = Key.from_seed(b"lock".ljust(32, b"."))
    old, new = (Fence.issue(home, "db", epoch=1, counter=n).encode() for n in (1, 2))
    async with node.login("ada") as session:
        holders = [await session.attenuate(fence=token) for token in (old, new)]
        first, second = [await box(holder) for holder in holders]
        await first.put(key="a", data=b"1")
        await second.put(key="a", data=b"2")
        with pytest.raises(Denied, match="later holder"):
            await first.put(key="a", data=b"3")
        with pytest.raises(InvalidArgument):
            await session.attenuate(fence=new[:-1] + b"\0")
    assert node.box.data == {"a": b"2"}


@pytest.mark.parametrize("entries", ["many", "two"])
async def test_no_token_is_taken_for_what_other_nodes_have_as_well(
    node: MemNode, entries: str
) -> None:
    """Whatever a service says but "one", and for no service that is not there by name."""
    token = Fence.issue(Key.generate(), "db", epoch=1, counter=1).encode()
    node.backend.profiles["all"] = RoleProfile({"*": frozenset({"*"})})
    node.backend.users["max"] = {"all"}
    async with node.login("max", ["all"]) as session:
        for services in (None, {"*": ()}):
            with pytest.raises(Unsupported, match="no broker sees all calls") as refused:
                await session.attenuate(services, fence=token)
            assert refused.value.code == "unsupported.fence"
        await session.attenuate({"box": ()}, fence=token)
        node.box.entries = entries  # type: ignore[assignment]
        with pytest.raises(Unsupported, match="'box'"):
            await session.attenuate({"box": ()}, fence=token)


async def test_guessing_references_is_counted_and_tells_nothing(node: MemNode) -> None:
    async with node.login("ada") as session:
        ref = SturdyRef.parse((await session.share({"box": []}))[0])
        dead, grant = await session.share({"box": []})
        await session.revoke(grant.id)
    gone = SturdyRef.parse(dead)
    answers = set()
    async with await rpc.connect_unix(node.path) as connection:
        gate = connection.bootstrap(CORE.Gate)
        for id_, secret in (
            (b"\0" * 8, ref.secret), (bytes.fromhex(ref.id), bytes(32)), (b"", b""),
            (bytes.fromhex(gone.id), bytes(32)), (bytes.fromhex(ref.id), ref.secret[:-1]),
            (b"x" * 1000, b"y" * 1000),
        ):  # fmt: skip
            for method in ("redeem", "describe"):
                with pytest.raises(Denied) as refused:
                    await gate.call(method, id=id_, secret=secret)
                answers.add((refused.value.code, refused.value.message, refused.value.hint))
    assert len(answers) == 1


async def test_a_session_whose_quotas_are_spent_can_say_so(node: MemNode) -> None:
    """What the session itself answers is no payload."""
    node.box.data["a"] = bytes(1000)
    async with node.login("ada") as session:
        ref, info = await session.share({"box": []}, nbytes=1100, calls=1)
        async with node.redeem(ref) as held:
            shared = await box(held)
            await shared.get(key="a")
            assert (await held.whoami()).node == node.key.peer_id
            assert await held.services()
            with pytest.raises(LimitExceeded):
                await shared.get(key="a")
            assert (await held.why()).code.startswith("limit.")
            assert not (await held.explain("box", "get", key="a")).allowed
            assert len(await held.grants())
        async with node.redeem(ref) as again:
            assert (await again.whoami()).principal == f"bearer:{info.id}"


async def test_a_quota_of_bytes_covers_results_and_callbacks(node: MemNode) -> None:
    node.box.data["a"] = bytes(1000)
    async with node.login("ada") as session:
        weak, other_weak = [await session.attenuate(nbytes=3000) for _ in range(2)]
        opened = await box(weak)
        await opened.get(key="a")
        await opened.get(key="a")
        with pytest.raises(LimitExceeded, match="bytes"):
            await opened.get(key="a")
        sink = SinkServant()
        other = await box(other_weak)
        await other.watch(sink=sink)
        (held,) = node.box.sinks
        await held.push(item=None, data=bytes(2000))
        with pytest.raises(LimitExceeded):
            await held.push(item=None, data=bytes(2000))
        assert len(sink.items) == 1
