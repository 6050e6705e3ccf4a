"""A capability that travels as a string: `ww share`, `ww use`, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.base.multiaddr import Multiaddr
from wetware.broker.sturdy import SturdyRef
from wetware.errors import (
    EXIT_DENIED,
    EXIT_FAILED,
    EXIT_UNREACHABLE,
    CapabilityError,
    Denied,
    DialError,
    Disconnected,
    Expired,
    InvalidArgument,
    LimitExceeded,
    Revoked,
    WetwareError,
)
from wetware.identity import Key
from wetware.testing import Home, NodeProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Home]:
    """Somebody elsewhere: an empty home, without a key, without an account."""
    with Home(tmp_path / "stranger") as made:
        yield made


def share(node: NodeProcess, *args: str, key: str = "default") -> tuple[str, str]:
    """(reference, ID of the grant) of `ww share ARGS`."""
    printed = json.loads(node.ww("--key", key, "share", *args, "--json", check=True).stdout)
    return printed["ref"], printed["grant"]["id"]


def listed(node: NodeProcess) -> dict[str, dict[str, Any]]:
    """`ww grants`, by ID."""
    found = json.loads(node.ww("grants", "--json", check=True).stdout)
    return {grant["id"]: grant for grant in found}


def add_user(node: NodeProcess, name: str) -> None:
    node.home.ww("key", "new", name, check=True)
    node.ww("user", "add", name, "--key", str(node.home.key(name).peer_id), check=True)


async def over_and_over(call: Callable[[], Awaitable[object]], within_s: float = 60.0) -> None:
    """Until it fails."""
    async with asyncio.timeout(within_s):
        while True:
            await call()


async def refused(ref: str, within_s: float = 20.0) -> CapabilityError:
    """The error once a reference is refused."""
    until = time.monotonic() + within_s
    while True:
        try:
            async with wetware.connect(ref):
                pass
        except CapabilityError as exc:
            return exc
        assert time.monotonic() < until, "the reference is still good"
        await asyncio.sleep(0.05)


async def test_somebody_without_an_account_publishes_and_does_nothing_else(
    node: NodeProcess, stranger: Home
) -> None:
    ref, grant = share(node, "pubsub:shared", "--methods", "Topic.publish", "--uses", "2")

    def use(*args: str) -> subprocess.CompletedProcess[str]:
        return stranger.ww("use", ref, *args)

    async with wetware.connect(node.addr, key=node.home.key()) as owner:
        topic = await owner.pubsub.join("shared")
        async with topic.subscribe() as messages:
            shown = await asyncio.to_thread(use)
            assert shown.returncode == 0, shown.stderr
            assert grant in shown.stdout
            assert re.search(r"uses left\s+2", shown.stdout), "looking spends nothing"

            sent = await asyncio.to_thread(use, "pub", "shared", "hello")
            assert sent.returncode == 0, sent.stderr
            async with asyncio.timeout(60):
                assert (await anext(aiter(messages))).data == b"hello"

            outside = await asyncio.to_thread(use, "pub", "private", "hello")
            assert outside.returncode == EXIT_DENIED
            assert "topic" in outside.stderr
            assert "d-" in outside.stderr, "the ID under which it is explained"

            spent = await asyncio.to_thread(use, "pub", "shared", "again")
            assert spent.returncode == EXIT_FAILED
            assert "used 2 times, which is all it allows" in spent.stderr
    assert not (stranger.path / ".wetware" / "keys").exists(), "nobody logged in"
    assert listed(node)[grant]["uses_left"] == 0
    assert "Traceback" not in outside.stderr + spent.stderr


def test_a_reference_counts_for_more_than_another_node(node: NodeProcess) -> None:
    """Whatever the context, an option or a variable says: what follows REF is done with REF."""
    ref, _ = share(node, "pubsub:chat")
    home = node.home
    home.ww("context", "add", "here", "--data-dir", str(node.data_dir))
    for before, env in (
        (("--context", "here"), {}),
        (("--node", node.addr), {}),
        ((), {"WW_NODE": node.addr}),
        ((), {"WW_CONTEXT": "here"}),
    ):
        done = home.ww(*before, "use", ref, "whoami", "--json", check=True, env=env)
        (service,) = json.loads(done.stdout)["services"]
        assert service == "pubsub", "the session is the reference's, not the user's own"


async def test_two_who_redeem_the_last_use_at_the_same_time(node: NodeProcess) -> None:
    ref, grant = share(node, "pubsub", "--uses", "1")

    async def redeem() -> bool:
        try:
            async with wetware.connect(ref):
                return True
        except LimitExceeded:
            return False

    assert sum(await asyncio.gather(*(redeem() for _ in range(8)))) == 1
    assert listed(node)[grant]["redeemed"] == 1


async def test_a_reference_that_was_tampered_with_tells_nothing(node: NodeProcess) -> None:
    ref, _ = share(node, "pubsub")
    good = SturdyRef.parse(ref)
    wrong_secret = replace(good, secret=bytes(len(good.secret)))
    unknown = replace(good, id="0" * len(good.id))
    said = set()
    for forged in (wrong_secret, unknown):
        with pytest.raises(Denied) as caught:
            async with wetware.connect(forged.text):
                pass
        said.add((caught.value.code, caught.value.message))
    assert len(said) == 1, "a wrong ID and a wrong secret look the same"
    for text in (ref[:-1], ref[:40], "ww1", "ww1" + "!" * 40, f"{ref}\n{ref}"):
        with pytest.raises(WetwareError):
            async with wetware.connect(text):
                pass
    async with wetware.connect(ref):
        pass
    log = node.log.read_text()
    assert good.secret.hex() not in log
    assert ref not in log


async def test_an_expired_reference_is_refused_and_ends_what_came_of_it(node: NodeProcess) -> None:
    ref, _ = share(node, "pubsub:brief", "--expires", "3s")
    async with wetware.connect(ref) as session:
        topic = await session.pubsub.join("brief")
        await topic.publish("in time")
        async with topic.subscribe() as messages:
            stream = aiter(messages)
            with pytest.raises(Expired):
                await over_and_over(lambda: anext(stream))
        with pytest.raises(Expired):
            await topic.publish("late")
    with pytest.raises(Expired):
        async with wetware.connect(ref):
            pass


async def test_revoking_ends_subscriptions_and_calls_now(node: NodeProcess) -> None:
    ref, grant = share(node, "pubsub:cut")
    async with wetware.connect(ref) as session, wetware.connect(ref) as other:
        topic = await session.pubsub.join("cut")
        narrow = await other.attenuate({"pubsub": []}, ["topic=cut"], label="below")
        below = await narrow.pubsub.join("cut")
        async with topic.subscribe() as messages:
            reading = asyncio.create_task(anext(aiter(messages)))
            await asyncio.sleep(0)
            revoked = await asyncio.to_thread(
                node.ww, "revoke", grant, "--reason", "lost laptop", check=True
            )
            assert re.match(r"ended \d+ grants", revoked.stdout)
            for call in (reading, topic.publish("x"), below.publish("x"), session.services()):
                with pytest.raises(Revoked, match="lost laptop"):
                    async with asyncio.timeout(60):
                        await call
    assert isinstance(await refused(ref), Revoked)
    again = node.ww("revoke", grant, check=True)
    assert "had ended before" in again.stdout


async def test_references_survive_a_crash_and_uses_are_not_given_back(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        node = home.start_node("n").wait_ready()
        ref, grant = share(node, "pubsub:kept", "--uses", "3", "--calls", "5")
        gone, gone_id = share(node, "pubsub:gone")
        async with wetware.connect(ref) as session:
            topic = await session.pubsub.join("kept")
            await topic.publish("one")
        node.ww("revoke", gone_id, check=True)
        node.stop(signal.SIGKILL)

        node = home.start_node("n", listen=node.addr.partition("/p2p/")[0]).wait_ready()
        async with wetware.connect(ref) as session:
            topic = await session.pubsub.join("kept")
            with pytest.raises(LimitExceeded, match="calls"):
                await over_and_over(lambda: topic.publish("more"))
        shown = listed(node)[grant]
        assert shown["redeemed"] == 2
        assert shown["uses_left"] == 1
        assert shown["calls_left"] == 0
        assert isinstance(await refused(gone), CapabilityError)
        node.stop()


async def test_what_a_user_shared_dies_with_the_user(node: NodeProcess) -> None:
    add_user(node, "leaver")
    ref, _ = share(node, "pubsub:team", key="leaver")
    async with wetware.connect(ref) as session:
        topic = await session.pubsub.join("team")
        await topic.publish("still here")
        node.ww("user", "remove", "leaver", check=True)
        with pytest.raises(Revoked):
            await over_and_over(lambda: topic.publish("x"))
    await refused(ref)


async def test_whoever_holds_a_reference_passes_on_less_of_it(
    node: NodeProcess, stranger: Home
) -> None:
    ref, grant = share(node, "pubsub:chat/*", "--calls", "4")
    narrower = await asyncio.to_thread(
        stranger.ww, "use", ref, "share", "pubsub:chat/a", "--json", "--calls", "100", check=True
    )
    below = json.loads(narrower.stdout)["ref"]
    again = await asyncio.to_thread(stranger.ww, "use", ref, "share", "pubsub:chat/a", check=True)
    assert "end it: who gave you REF can: ww revoke " in again.stderr
    wider = await asyncio.to_thread(stranger.ww, "use", ref, "share", "grants")
    assert wider.returncode == EXIT_DENIED
    async with wetware.connect(below) as session:
        topic = await session.pubsub.join("chat/a")
        with pytest.raises(Denied, match="topic"):
            await session.pubsub.join("chat/b")
        with pytest.raises(LimitExceeded, match="calls"):
            await over_and_over(lambda: topic.publish("x"))
        node.ww("revoke", grant, check=True)
        with pytest.raises(Revoked):
            await over_and_over(session.services)
    await refused(below)


async def test_a_reference_that_must_not_be_passed_on(node: NodeProcess, stranger: Home) -> None:
    ref, _ = share(node, "pubsub", "--no-delegate")
    passed = await asyncio.to_thread(stranger.ww, "use", ref, "share", "pubsub")
    assert passed.returncode == EXIT_DENIED
    assert passed.stdout == ""


async def test_a_rate_is_for_all_who_redeem(node: NodeProcess) -> None:
    ref, _ = share(node, "pubsub:slow", "--rate", "2/m:3")
    async with wetware.connect(ref) as one, wetware.connect(ref) as two:
        topics = [await session.pubsub.join("slow") for session in (one, two)]
        await topics[0].publish("x")
        for topic in topics:
            with pytest.raises(LimitExceeded, match=r"more than 2/m:3") as caught:
                await topic.publish("beyond the burst, of which joining was two")
            assert "try again in" in caught.value.hint


def test_why_names_the_grant_and_the_constraint(node: NodeProcess, stranger: Home) -> None:
    ref, grant = share(node, "pubsub:only")
    denied = stranger.ww("use", ref, "pub", "other", "x")
    found = re.search(r"d-[0-9a-z-]+", denied.stderr)
    assert found, denied.stderr
    why = json.loads(node.ww("why", found[0], "--all", "--json", check=True).stdout)
    assert not why["allowed"]
    assert [s["grant"] for s in why["steps"] if s["verdict"] == "denies"] == [grant]
    assert "topic=only" in why["reason"]
    again = stranger.ww("use", ref, "why", found[0], "--json", check=True)
    assert json.loads(again.stdout)["decision"] == found[0]
    latest = stranger.ww("use", ref, "why", "--json", check=True)
    assert json.loads(latest.stdout)["decision"] == found[0]
    would = node.ww("why", "pubsub.join", "topic=chat", "--json", check=True)
    assert json.loads(would.stdout)["allowed"]


def test_why_explains_to_an_ordinary_user_what_the_refusal_names(node: NodeProcess) -> None:
    for name in ("cara", "dan"):
        add_user(node, name)
    denied = node.ww("--key", "cara", "evict", str(node.peer_id), "--yes")
    assert denied.returncode == EXIT_DENIED
    found = re.search(r"ww --data-dir \S+ why (d-[0-9a-f]+)", denied.stderr)
    assert found, denied.stderr
    for what in ((found[1],), ()):
        why = node.ww("--key", "cara", "why", *what, "--json", check=True)
        assert json.loads(why.stdout)["method"].startswith("Cluster.evict")
        hidden = node.ww("--key", "dan", "why", *what)
        assert hidden.returncode == EXIT_FAILED
        assert "no denial" in hidden.stderr


def test_bad_input_says_what_to_write(node: NodeProcess) -> None:
    for args, says in (
        (("pubsub:",), "SERVICE:NAME"),
        (("nope",), "nope"),
        (("pubsub", "--where", "topik=a"), "topic"),
        (("pubsub", "--where", "topic=chat/*"), "glob:"),
        (("pubsub", "--expires", "soon"), "soon"),
        (("pubsub", "--rate", "fast"), "fast"),
        (("pubsub", "--methods", "PubSub.nope"), "PubSub.nope"),
    ):
        done = node.ww("share", *args)
        assert done.returncode != 0, args
        assert says in done.stderr, (args, done.stderr)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
    bad = node.ww("revoke", "0" * 16)
    assert bad.returncode != 0
    assert f"ww --data-dir {node.data_dir} grants" in bad.stderr


# --- references of another node -------------------------------------------------------------------

DEAD = Multiaddr.parse("/ip4/127.0.0.1/tcp/1")
"""Where nobody listens."""
DIRECT_OR_TUNNEL = pytest.mark.parametrize("direct", [True, False], ids=["direct", "tunnel"])


def out_of_reach(ref: str, **fields: Any) -> str:
    """The reference of an issuer that this machine cannot dial."""
    return replace(SturdyRef.parse(ref), addrs=(DEAD,), **fields).text


def tunnels(node: NodeProcess) -> int:
    """How many it has carried."""
    return node.log.read_text().count("tunnel.opened")


@DIRECT_OR_TUNNEL
async def test_a_reference_of_another_node_is_redeemed_there(
    pair: tuple[NodeProcess, NodeProcess], direct: bool
) -> None:
    """Dialled or through b's tunnel, it is the issuer's session: a's revocation cuts all of it."""
    a, b = pair
    ref, grant = share(a, "pubsub:far/*")
    before = tunnels(b)
    async with (
        wetware.connect(b.addr, key=b.home.key()) as at_b,
        at_b.redeem(ref if direct else out_of_reach(ref)) as held,
    ):
        assert held.identity.node == a.peer_id
        assert held.identity.principal == f"bearer:{grant}"
        assert tunnels(b) == before + (not direct)
        narrow = await held.attenuate({"pubsub": []}, ["topic=far/a"], label="below")
        topic = await narrow.pubsub.join("far/a")
        with pytest.raises(Denied):
            await narrow.pubsub.join("far/b")
        with pytest.raises(Denied):
            await held.pubsub.join("near")
        passed_on, _ = await held.share({"pubsub": []})
        async with topic.subscribe() as messages:
            reading = aiter(messages)
            await topic.publish("over two nodes")
            assert (await asyncio.wait_for(anext(reading), 60)).data == b"over two nodes"
            waiting = asyncio.create_task(anext(reading))
            await asyncio.sleep(0)
            await asyncio.to_thread(a.ww, "revoke", grant, "--reason", "lost laptop", check=True)
            for call in (waiting, topic.publish("x"), held.whoami(), narrow.services()):
                with pytest.raises(Revoked, match="lost laptop"):
                    async with asyncio.timeout(60):
                        await call
        with pytest.raises(Revoked):
            async with at_b.redeem(passed_on):
                pass
        assert await at_b.whoami(), "b's own session goes on"


@DIRECT_OR_TUNNEL
async def test_what_was_redeemed_ends_with_the_session_that_redeemed_it(
    pair: tuple[NodeProcess, NodeProcess], direct: bool
) -> None:
    a, b = pair
    ref, grant = share(a, "pubsub:brief")

    async def held_at_a() -> bool:
        return any(grant in each.parents for each in await at_a.grants())

    async with (
        wetware.connect(a.addr, key=a.home.key()) as at_a,
        contextlib.AsyncExitStack() as later,
    ):
        async with wetware.connect(b.addr, key=b.home.key()) as at_b:
            opening = at_b.redeem(ref if direct else out_of_reach(ref))
            held = await later.enter_async_context(opening)
            assert await held.services()
            assert await held_at_a()
        with pytest.raises(Disconnected):
            await over_and_over(held.services)
        async with asyncio.timeout(60):
            while await held_at_a():
                await asyncio.sleep(0.02)


async def test_a_reference_of_the_session_s_own_node(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    _, b = pair
    ref, _ = share(b, "pubsub:own")
    async with wetware.connect(b.addr, key=b.home.key()) as at_b:
        at_b.timeout_s = 5
        async with at_b.redeem(out_of_reach(ref)) as held:
            assert held.identity.node == b.peer_id
            assert [service.name for service in await held.services()] == ["pubsub"]
        assert at_b.timeout_s == 5
        assert await at_b.services()


async def test_an_issuer_that_nobody_reaches(pair: tuple[NodeProcess, NodeProcess]) -> None:
    """Both ways are named; whoever answers nothing costs no more than the time that is given."""
    _, b = pair
    ref, _ = share(b, "pubsub")
    unknown = Key.generate().peer_id

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    silent = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    mute = replace(
        SturdyRef.parse(ref), peer=unknown, addrs=(Multiaddr("ip4", "127.0.0.1", port),)
    ).text
    async with silent, wetware.connect(b.addr, key=b.home.key()) as at_b:
        for far in (out_of_reach(ref, peer=unknown), mute):
            started = time.monotonic()
            with pytest.raises(DialError) as caught:
                async with at_b.redeem(far, timeout_s=2):
                    pass
            assert time.monotonic() - started < 10
            assert "127.0.0.1" in caught.value.message
            assert "no member of the cluster" in caught.value.message
        for nonsense in ("ww1nonsense", b.addr):
            with pytest.raises(InvalidArgument):
                async with at_b.redeem(nonsense):
                    pass
        narrow = await at_b.attenuate({"pubsub": []})
        with pytest.raises(DialError, match=r"no grant of .* covers a service 'cluster'"):
            async with narrow.redeem(out_of_reach(ref, peer=unknown)):
                pass


def test_the_command_line_goes_through_this_machine_s_node(
    pair: tuple[NodeProcess, NodeProcess], stranger: Home
) -> None:
    a, b = pair
    ref, grant = share(a, "pubsub:far", "--uses", "2")
    far, before = out_of_reach(ref), tunnels(b)
    shown = json.loads(b.ww("use", "--json", far, check=True).stdout)
    assert (shown["node"], shown["grant"]["id"]) == (a.peer_id, grant)
    used = json.loads(b.ww("use", far, "whoami", "--json", check=True).stdout)
    assert used["node"] == a.peer_id
    assert used["principal"] == f"bearer:{grant}"
    assert tunnels(b) == before + 2
    # Without a key there is no tunnel, and without a node none is looked for.
    b.home.ww("key", "new", "nobody", check=True)
    for done, says in (
        (b.ww("--key", "nobody", "use", far, "whoami"), "nor through a tunnel"),
        (b.ww("--key", "missing", "use", far), "key new missing"),
        (stranger.ww("use", far, "whoami"), "tcp/1"),
    ):
        assert done.returncode == EXIT_UNREACHABLE, done.stderr
        assert "tcp/1" in done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert listed(a)[grant]["uses_left"] == 1
