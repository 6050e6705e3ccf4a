"""Detached programs at real nodes: they survive kill -9 with their grants, and end with a role."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.errors import EXIT_USAGE, Disconnected, Revoked
from wetware.testing import Home, NodeProcess, wait_for
from wetware_proc.client import Exit, Process

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

WITHIN_S = 90.0
"""For what takes a few seconds on an idle machine."""
Guests = Callable[[str], bytes]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with Home(tmp_path_factory.mktemp("home"), libp2p=False) as home:
        home.ww("key", "new", "ada", check=True)
        yield home


@pytest.fixture(scope="module")
def b(home: Home) -> Iterator[NodeProcess]:
    """A node that goes on; `a` comes and goes."""
    with home.node("b") as node:
        node.ww("user", "add", "ada", "--key", "ada", "--role", "member", check=True)
        yield node


@contextlib.contextmanager
def running(b: NodeProcess, name: str = "a") -> Iterator[NodeProcess]:
    first = not (b.home.path / name).exists()
    with b.home.node(name, join=b if first else None) as a:
        a.wait_members([b.peer_id], within_s=WITHIN_S)
        b.wait_members([a.peer_id], within_s=WITHIN_S)
        yield a


@pytest.fixture
def beat(guests: Guests, tmp_path: Path) -> str:
    file = tmp_path / "beat.wasm"
    file.write_bytes(guests("beat"))
    return str(file)


@contextlib.asynccontextmanager
async def at(node: NodeProcess, key: str = "default") -> AsyncIterator[wetware.Session]:
    async with wetware.connect(node.addr, key=node.home.key(key)) as session:
        yield session


def shown(node: NodeProcess, id_: str) -> Any:
    """What `ww ps` at a node says of a process, wherever that is."""
    found = json.loads(node.ww("ps", "--json", check=True).stdout)["processes"]
    return next((each for each in found if each["id"] == id_), None)


def labels(node: NodeProcess) -> list[str]:
    found = json.loads(node.ww("grants", "--json", check=True).stdout)
    return [each["label"] for each in found]


def test_it_survives_kill_9_of_its_node_with_its_grants(b: NodeProcess, beat: str) -> None:
    policy = ("--restart", "on-failure", "--grant", "out=pubsub:chat?data=max:64")
    with running(b) as a:
        id_ = a.ww("run", *policy, "--name", "heart", beat, check=True).stdout.strip()
        assert f"process heart {id_}" in labels(a)
        assert "out=pubsub:chat" in labels(a)
        assert "beat" in b.ww("sub", "chat", "-n", "1", check=True).stdout, "heard elsewhere"
        found = shown(b, id_)
        assert (found["exit"]["kind"], found["policy"], found["restarts"]) == ("", "on-failure", 0)
        before = wait_for(lambda: b.ww("logs", id_[:6], check=True).stdout, "it is in its log")
        assert before.startswith("beat \n")
        assert set(before.split()) == {"beat"}
        a.stop(signal.SIGKILL)
        assert shown(b, id_) is None
    with running(b) as a:
        assert "beat" in b.ww("sub", "chat", "-n", "1", check=True).stdout, "it publishes again"
        found = shown(b, id_)
        assert (found["exit"]["kind"], found["waits"], found["restarts"]) == ("", False, 1)
        assert found["started_ms"] > 0
        assert "0, on-failure" not in a.ww("ps", check=True).stdout
        after = b.ww("logs", id_, check=True).stdout
        assert after.startswith(before), "what it wrote before is kept"
        assert labels(a).count("out=pubsub:chat") == 1
        a.ww("restart", id_, check=True)
        wait_for(lambda: shown(a, id_)["restarts"] == 2, "it was started again")
        with b.start_ww("logs", "-f", id_) as follow, b.start_ww("wait", id_) as waiting:
            assert follow.stdout is not None
            assert follow.stdout.readline() == "beat \n"
            b.ww("kill", id_, check=True)
            assert waiting.wait(timeout=WITHIN_S) == 137
            follow.stdout.read()
            assert follow.wait(timeout=WITHIN_S) == 0
        assert shown(a, id_)["exit"]["kind"] == "killed"
        assert not {f"process heart {id_}", "out=pubsub:chat"} & set(labels(a)), "with the process"
        assert a.ww("restart", id_).returncode == EXIT_USAGE


def test_its_directories_survive_kill_9_of_its_node(
    b: NodeProcess, guests: Guests, tmp_path: Path
) -> None:
    program, content = tmp_path / "cat.wasm", tmp_path / "content"
    program.write_bytes(guests("reread"))
    content.mkdir()
    (content / "x").write_text("of ada\n")
    with running(b) as a:
        cid = a.ww("blob", "put", "--name", "mine", str(content), check=True).stdout.split()[0]
        run = ("run", "--restart", "always", str(program), "/data/x")
        ids = [
            a.ww(*run[:3], "--dir", f"/data={what}", *run[3:], check=True).stdout.strip()
            for what in (cid, "mine", str(content))
        ]
        for id_ in ids:
            wait_for(lambda id_=id_: a.ww("logs", id_, check=True).stdout, "it has read it")
        (hash_,) = {each["hash"] for id_ in ids for each in shown(a, id_)["dirs"]}
        a.ww("blob", "rm", cid, check=True)
        a.stop(signal.SIGKILL)
    (content / "x").unlink()
    with running(b) as a:
        for id_ in ids:
            wait_for(
                lambda id_=id_: a.ww("logs", id_, check=True).stdout == "of ada\n" * 2,
                "it has read the same again",
                within_s=WITHIN_S,
            )
        a.ww("restart", ids[0], check=True)
        wait_for(lambda: a.ww("logs", ids[0], check=True).stdout.count("\n") == 3, "and again")
        for id_ in ids[1:]:
            a.ww("kill", id_, check=True)
        a.stop(signal.SIGKILL)
        (a.data_dir / "plugins/proc/dirs" / hash_).rename(tmp_path / "away")
    with running(b) as a:
        gone = wait_for(lambda: shown(a, ids[0])["exit"]["why"], "it cannot be started")
        assert "the directory /data is not on the node's disk any more" in gone
        assert shown(a, ids[0])["waits"]
        a.ww("kill", ids[0], check=True)
    with running(b) as a:
        assert not list((a.data_dir / "plugins/proc/dirs").iterdir()), "kept for nobody"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stop", "kill -9"])
def test_who_follows_its_log_goes_on_when_its_node_is_back(
    b: NodeProcess, beat: str, how: signal.Signals
) -> None:
    """From another node, and all of it once: what is on disk is asked for from where one was."""
    run = ("run", "--restart", "always", "--grant", "out=pubsub:chat", beat, "100000")
    with running(b, "f") as f:
        id_ = f.ww(*run, check=True).stdout.strip()
        follow = b.start_ww("logs", "-f", id_)
        assert follow.stdout is not None
        assert follow.stdout.readline() == "beat \n"
        f.stop(how)
    with running(b, "f") as f:
        wait_for(lambda: shown(f, id_)["restarts"] == 1, "it runs again", within_s=WITHIN_S)
        f.ww("kill", id_, check=True)
        assert follow.stderr is not None
        rest, said = follow.stdout.read(), follow.stderr.read()
        follow.wait(timeout=WITHIN_S)
        assert "beat \n" + rest == f.ww("logs", id_, check=True).stdout
        assert (follow.returncode, "logged in again" in said) == (0, True), said
        assert "missing" not in said.replace("subscriptions miss", "")


async def test_who_follows_goes_on_though_each_connection_is_lost(
    b: NodeProcess, guests: Guests
) -> None:
    told: list[str] = []
    with running(b, "g") as g:
        connected = wetware.connect(b.addr, key=b.home.key(), reconnect=told.append)
        async with at(g) as there, connected as session:
            given = {"out": "pubsub:chat"}
            made = await there.proc.start(guests("beat"), "100000", grants=given)
            seen, missing = bytearray(), list[int]()
            async with session.proc.find(made.id[:8]) as process:
                far = process.proc.session
                waiting = asyncio.ensure_future(process.wait())
                async for data in process.logs(follow=True, missed=missing.append):
                    seen += data
                    if len(seen) > 40 and len(told) < 2:
                        await far.connection.aclose()
                    elif len(seen) > 80 and len(told) < 4:
                        await session.connection.aclose()
                        await far.connection.aclose()
                    elif len(seen) > 120:
                        await made.kill()
                assert (await waiting).kind == "killed"
            assert seen == b"".join([data async for data in made.logs()])
            assert (missing, len(told)) == ([], 6), told
        async with at(b) as session, session.proc.find(made.id) as process:
            lost = asyncio.ensure_future(_followed(process))
            await process.proc.session.connection.aclose()
            with pytest.raises(Disconnected):  # who does not log in again hears of it
                await lost


async def _followed(process: Any) -> None:
    async for _ in process.logs(follow=True):
        await asyncio.sleep(0)


async def test_it_ends_with_the_role_of_its_user(b: NodeProcess, guests: Guests) -> None:
    """Also where that goes while the node is down."""
    code, grants = guests("beat"), {"out": "pubsub:chat"}
    with running(b, "c") as c:
        async with at(c, "ada") as ada:
            ids = [
                (await ada.proc.start(code, grants=grants, restart="always")).id for _ in range(2)
            ]
            await ada.proc.detached(ids[0]).kill()

    def of(node: NodeProcess, id_: str) -> Any:
        found = json.loads(node.ww("ps", "--all", "--json", check=True).stdout)["processes"]
        return next(each for each in found if each["id"] == id_)

    with running(b, "c") as c:
        assert of(c, ids[0])["exit"]["kind"] == "killed"
        wait_for(lambda: not of(c, ids[1])["exit"]["kind"], "it is back", within_s=WITHIN_S)
        c.stop(signal.SIGKILL)
    b.ww("user", "remove", "ada", check=True)
    with running(b, "c") as c:
        wait_for(lambda: not of(c, ids[1])["waits"], "it is over", within_s=WITHIN_S)
        wait_for(lambda: of(c, ids[1])["exit"]["kind"], "it is over", within_s=WITHIN_S)
        assert of(c, ids[1])["exit"]["kind"] == "killed"
        assert not any(label.startswith("process") for label in labels(c))
    b.ww("user", "add", "ada", "--key", "ada", "--role", "member", check=True)


async def test_what_one_is_given_can_be_revoked_by_itself(b: NodeProcess, guests: Guests) -> None:
    """The process goes on, and handles the error; its own grant ends it, attached or detached."""
    code = guests("beat")

    async def until(process: Process, start: bytes) -> None:
        seen = b""
        while not any(line.startswith(start) for line in seen.splitlines()):
            seen += await process.stdout.receive()

    async with at(b) as session:
        topic = await session.pubsub.join("chat")
        async with session.proc.spawn(code, grants={"out": topic}, name="one") as process:
            id_ = (await process.info()).id
            await until(process, b"beat")
            found = {grant.label: grant for grant in await session.grants()}
            assert found["out=Topic"].parents == (found[f"process one {id_}"].id,)
            await session.revoke(found["out=Topic"].id)
            await until(process, b"failed capability.revoked")
            await session.revoke(found[f"process one {id_}"].id, "enough")
            exit_ = await process.wait()
            assert exit_.kind == "killed"
            assert "enough" in exit_.why
        made = await session.proc.start(code, "30", grants={"out": "pubsub:chat"})
        grants = {grant.label: grant for grant in await session.grants()}
        await session.revoke(grants["out=pubsub:chat"].id)
        assert await made.wait() == Exit("exited", 3, "")
        lines = b"".join([data async for data in made.logs()]).splitlines()
        assert lines[-1].startswith(b"failed capability.revoked"), lines
        labels = {grant.label for grant in await session.grants()}
        assert not any(label.startswith("process") for label in labels)
        other = await session.attenuate({"proc": ()})
        await session.revoke(other.identity.grant)
        with pytest.raises(Revoked):
            await other.proc.start(code)


def test_a_detached_program_is_given_no_more_than_its_user_has(b: NodeProcess, beat: str) -> None:
    refused = b.ww("run", "--detach", "--grant", "out=nothing:chat", beat)
    assert refused.returncode != 0
    assert "nothing" in refused.stderr
    wrong = b.ww("run", "--detach", "--grant", "out=pubsub:chat?size=max:3", beat)
    assert wrong.returncode == EXIT_USAGE
    never = b.ww("run", "--restart", "sometimes", beat)
    assert (never.returncode, "policy" in never.stderr) == (EXIT_USAGE, True)
    bound = b.ww("run", "--grant", "out=pubsub:chat?data=max:3", beat, "1")
    assert (bound.returncode, bound.stdout.split()[:2]) == (3, ["failed", "capability.denied"])


SCRIPT = """
import time, ww
print("begins", flush=True)
while True:
    ww.grant("out").publish(data=b"from python")
    time.sleep(0.05)
"""


@pytest.mark.long
@pytest.mark.timeout(900)  # it may have to build the runner
def test_a_script_survives_as_well(
    home: Home, python_runner: Callable[[Path], None], tmp_path: Path
) -> None:
    for path in (home.path / "p", home.path / "p" / "plugins"):
        path.mkdir(mode=0o700)
    python_runner(home.path / "p" / "plugins" / "proc")
    script = tmp_path / "beat.py"
    script.write_text(SCRIPT)
    with home.node("p") as node:
        run = ("run", "--restart", "always", "--grant", "out=pubsub:chat", str(script))
        id_ = node.ww(*run, check=True).stdout.strip()
        assert "from python" in node.ww("sub", "chat", "-n", "1", check=True).stdout
        wait_for(lambda: node.ww("logs", id_, check=True).stdout, "it is in its log")
        node.stop(signal.SIGKILL)
    with home.node("p") as node:
        assert "from python" in node.ww("sub", "chat", "-n", "1", check=True).stdout
        assert (shown(node, id_)["kind"], shown(node, id_)["restarts"]) == ("python", 1)
        wait_for(lambda: node.ww("logs", id_, check=True).stdout == "begins\n" * 2, "its log")
        node.ww("kill", id_, check=True)


@pytest.mark.long
async def test_after_kill_9_at_any_moment_what_is_shown_is_true(home: Home, guests: Guests) -> None:
    """What is shown as running runs, and all else has left neither a grant nor its code."""
    code, rng = guests("beat"), random.Random(7)

    async def act(session: wetware.Session) -> None:
        policy = rng.choice(("never", "on-failure", "always"))
        made = await session.proc.start(code, grants={"out": "pubsub:chat"}, restart=policy)
        match rng.randrange(3):
            case 0:
                await made.kill()
            case 1:
                await made.restart()

    async def settled(session: wetware.Session) -> set[str]:
        """The IDs of those that run, and each of them does."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                infos = await session.proc.processes()
                if not any(each.waits for each in infos):
                    break
                await asyncio.sleep(0.05)
            living = [each for each in infos if not each.exit.kind]
            assert not any(each.policy == "never" for each in living)
            for each in living:
                was, made = 0, session.proc.detached(each.id)
                while was in (0, now := sum([len(data) async for data in made.logs()])):
                    was = was or now
                    await asyncio.sleep(0.05)
        return {each.id for each in living}

    seen = 0
    for _ in range(10):
        with home.node("k") as node:
            async with contextlib.AsyncExitStack() as stack:
                session = await stack.enter_async_context(at(node))
                living = await settled(session)
                seen += len(living)
                grants = [each for each in await session.grants() if each.kind == "derived"]
                named = {each.label.split()[-1] for each in grants if each.label[:7] == "process"}
                assert named == living
                assert len(grants) == 2 * len(living)
                kept = (node.data_dir / "plugins/proc/detached").glob("*/code")
                assert {path.parent.name for path in kept} == living
                for id_ in sorted(living)[2:]:
                    await session.proc.kill(id_)
                acts = [asyncio.ensure_future(act(session)) for _ in range(4)]
                for first in rng.sample(acts, rng.randrange(4)):  # some have come to their end
                    await asyncio.wait([first], timeout=WITHIN_S)
                await asyncio.sleep(rng.uniform(0, 0.02))
                node.stop(signal.SIGKILL)
                await asyncio.gather(*acts, return_exceptions=True)
                stack.pop_all()
    assert seen > 5, "some did come back"
