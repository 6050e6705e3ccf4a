"""References that a service passes on: who may call what, and what ends it.

They are of interfaces that no role of the service can name. The grant that they are got under does
not judge their methods, and everything else about it holds; the object's own guard judges as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware import rpc
from wetware.broker.methods import pattern_within
from wetware.errors import CapabilityError, Denied, Expired, LimitExceeded, Revoked
from wetware.hookspecs import RoleProfile

from .cluster import BOX, Backend, BoxService, MemNode, box
from .parts import ADA, Clock, narrow, root, task, tree, where

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
STAT = rpc.WW.Source.methods["stat"]


class Far(rpc.Servant, interface=rpc.WW.Source):
    """Somebody's own object, of an interface that the service `box` does not know."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    async def stat(self) -> dict[str, Any]:
        self.asked.set()
        await self.answers.wait()
        return {"size": 7}

    async def read(self, start: int, end: int) -> dict[str, Any]:
        raise NotImplementedError


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[MemNode]:
    named = RoleProfile({"box": frozenset({"Box.any", "Box.hand", "Item.read"})})
    backend = Backend({"member": named}, {"ada": {"member"}, "bob": {"member"}})
    made = MemNode("a", tmp_path, backend, Clock())
    async with rpc.runtime(), made.running():
        yield made


async def passed(node: MemNode, session: Any, far: rpc.Servant) -> None:
    """Have the service hold an object of a session's, to pass it on."""
    await (await box(session)).hand(session=far, item=None)
    node.box.passed = node.box.handed[1].cast(rpc.WW.Source)


async def got(session: Any) -> rpc.Ref:
    found: rpc.Ref = (await (await box(session)).any())["cap"].cast(rpc.WW.Source)
    return found


async def test_a_role_that_cannot_name_it_can_call_it_and_nothing_of_the_service_more(
    node: MemNode,
) -> None:
    async with node.login("ada") as ada, node.login("bob") as bob:
        await passed(node, ada, Far())
        assert await (await got(bob)).stat() == {"size": 7}
        with pytest.raises(Denied, match=r"does not cover box Box\.get"):
            await (await box(bob)).get(key="a")
        with pytest.raises(CapabilityError):  # who may not ask the service for it has not got it
            await got(await bob.attenuate({"box": ["Item.read"]}))


async def test_a_servant_of_the_service_is_judged_by_its_methods_whatever_it_is_cast_to(
    node: MemNode,
) -> None:
    node.box.passed = Far()  # its own, of an interface that its schema does not lead to
    async with node.login("ada") as ada:
        with pytest.raises(Denied, match=r"does not cover box Source\.stat"):
            await (await got(ada)).stat()


async def test_what_a_role_can_name_is_judged_by_its_methods_though_it_is_passed_on(
    node: MemNode,
) -> None:
    async with node.login("ada") as ada, node.login("bob") as bob:
        item = (await (await box(ada)).any())["cap"]  # of the service itself, back to it
        await (await box(ada)).hand(session=item, item=None)
        node.box.passed = node.box.handed[1].cast(BOX.Item)
        mine = (await (await box(bob)).any())["cap"].cast(BOX.Item)
        assert await mine.read() == {"data": b""}
        with pytest.raises(Denied, match=r"does not cover box Item\.box"):
            await mine.box()


async def test_the_guard_of_the_object_judges_and_its_end_is_the_end(node: MemNode) -> None:
    async with node.login("ada") as ada, node.login("bob") as bob:
        weak = await ada.attenuate({"box": ["Box.any", "Box.hand"]})
        item = (await (await box(weak)).any())["cap"]  # nothing of it may be called
        await (await box(ada)).hand(session=item, item=None)
        node.box.passed = node.box.handed[1].cast(BOX.Item)
        with pytest.raises(Denied):
            await (await (await box(bob)).any())["cap"].cast(BOX.Item).read()
        far = Far()
        await passed(node, ada, far)
        mine = await got(bob)
        await mine.stat()
    async with node.login("bob") as bob:  # ada's session is over, who had given it
        with pytest.raises(CapabilityError):
            await (await got(bob)).stat()


@pytest.mark.parametrize("flying", [True, False], ids=["in flight", "later"])
async def test_a_revocation_of_the_holder_cuts_it(node: MemNode, flying: bool) -> None:
    far = Far()
    async with node.login("ada") as ada, node.login("bob") as bob:
        await passed(node, ada, far)
        part = await bob.attenuate({"box": ["Box.any"]})
        mine = await got(part)
        await mine.stat()
        far.asked.clear()
        if flying:
            far.answers.clear()
            calling = asyncio.ensure_future(mine.stat())
            await far.asked.wait()
            await bob.revoke((await part.whoami()).grant)
            with pytest.raises(Revoked):
                await calling
        else:
            await bob.revoke((await part.whoami()).grant)
            with pytest.raises(Revoked):
                await mine.stat()
            assert not far.asked.is_set()
        far.answers.set()
        assert await (await got(ada)).stat() == {"size": 7}, "what others have of it goes on"


async def test_an_end_a_rate_and_a_quota_count_for_it(node: MemNode) -> None:
    async with node.login("ada") as ada, node.login("bob") as bob:
        await passed(node, ada, Far())
        few = await got(await bob.attenuate({"box": []}, calls=3))  # one was to get it
        await few.stat()
        await few.stat()
        with pytest.raises(LimitExceeded):
            await few.stat()
        short = await got(await bob.attenuate({"box": []}, expires_s=10))
        await short.stat()
        node.clock.now += 11
        with pytest.raises(Expired):
            await short.stat()


async def test_a_share_passes_it_on_as_far_as_it_goes(node: MemNode) -> None:
    async with node.login("ada") as ada, node.login("bob") as bob:
        await passed(node, ada, Far())
        ref, info = await bob.share({"box": ["Box.any"]})
        bare, _ = await bob.share({"box": ["Item.read"]})
        async with node.redeem(ref) as bearer, node.redeem(bare) as nobody:
            mine = await got(bearer)
            assert await mine.stat() == {"size": 7}
            with pytest.raises(Denied):
                await got(nobody)
            await bob.revoke(info.id)
            with pytest.raises(Revoked):
                await mine.stat()


# --- the decision itself --------------------------------------------------------------------------

_PATTERNS = st.sets(
    st.sampled_from(["*", "Box.*", "Item.*", "Box.any", "Item.read"]), min_size=0, max_size=3
)
_METHODS = [BOX.Box.methods["any"], BOX.Item.methods["read"], BOX.Item.methods["box"]]


def allowed(grant: Any, method: Any, *, through: bool, **args: object) -> bool:
    running = task()
    try:
        grant.enter(method, args, running, through)
    except CapabilityError:
        return False
    grant.leave(running)
    return True


@given(st.lists(_PATTERNS, min_size=1, max_size=4), st.integers(0, 4))
def test_it_is_never_more_than_the_chain_and_never_of_methods_that_a_role_can_name(
    patterns: list[set[str]], revoked: int
) -> None:
    async def judge() -> None:
        on = tree()
        on.services = {"box": BoxService()}  # type: ignore[dict-item]
        top = root(on, box=patterns[0])
        chain = [top]
        for some in patterns[1:]:
            kept = [p for p in some if pattern_within(p, chain[-1].patterns("box"))]
            chain.append(chain[-1].derive(label="d", terms=narrow(box=kept)))
        held = chain[-1].derive(label="s", service="box")
        for method in _METHODS:
            assert allowed(held, method, through=True) is allowed(held, method, through=False)
        covered = all(grant.patterns("box") for grant in chain)
        assert allowed(held, STAT, through=True) is covered
        assert allowed(held, STAT, through=False) is all("*" in g.patterns("box") for g in chain)
        if revoked < len(chain):
            chain[revoked].revoke("enough")
            assert not allowed(held, STAT, through=True)

    asyncio.run(judge())


async def test_of_several_roles_all_that_cover_the_service_have_to_allow_it() -> None:
    """Which of them gave it away is not known; one that has nothing of the service has no say."""

    class Bytes(BoxService):
        name = "bytes"
        interface = rpc.WW.Source

    on = tree()
    on.services = {"box": BoxService(), "bytes": Bytes()}  # type: ignore[dict-item]
    strict = RoleProfile({"box": frozenset({"Box.any"})}, where("start=max:9").where)
    roots = {
        "strict": on.root(ADA, "strict", strict),
        "free": root(on, role="free", box={"Item.read"}),
        "none": root(on, role="none", bytes={"Source.stat"}),
    }
    read = rpc.WW.Source.methods["read"]

    def reads(names: str, start: int) -> bool:
        session = on.session(ADA, [roots[name] for name in names.split()])
        held = session.derive(label="s", service="box")
        return allowed(held, read, through=True, start=start, end=20)

    assert reads("strict none", 9)
    assert not reads("strict none", 10)
    assert not reads("strict free", 10)
    assert not reads("none", 0)
    assert reads("free none", 10)
