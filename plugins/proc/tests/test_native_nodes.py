"""Native programs at a real node: what they are given, their ports, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import wetware
from wetware.errors import EXIT_USAGE, InvalidArgument, NotFound, Unsupported, WetwareError
from wetware.testing import Home, NodeProcess, wait_for
from wetware_proc.client import Exit, spec_of
from wetware_proc.driver import DriverUnavailable
from wetware_proc.native import sandbox
from wetware_proc.native.client import forwarded
from wetware_proc.sources import Source

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    try:
        sandbox.bwrap()
    except DriverUnavailable as exc:
        pytest.skip(f"{exc.message}: {exc.hint}")
    settings = {"WW_PLUGINS_PROC_NATIVE": "true"}
    with (
        Home(tmp_path_factory.mktemp("home"), settings, libp2p=False) as home,
        home.node() as node,
    ):
        if "bubblewrap works" not in found(node):
            pytest.skip(found(node))
        yield node


def found(node: NodeProcess) -> str:
    """What the doctor says of what a native program has around it, and what is limited."""
    findings = json.loads(node.ww("doctor", "--json").stdout)["findings"]
    return str(next(each["text"] for each in findings if each["check"] == "native programs"))


def limited(ran: subprocess.CompletedProcess[str]) -> bool:
    """Whether a program was run with a limit. Else it was refused, and did not run."""
    assert (ran.returncode, "cannot be enforced" in ran.stderr) in ((0, False), (1, True))
    return ran.returncode == 0


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        yield session


def test_ww_run_runs_a_program_of_the_machine(node: NodeProcess) -> None:
    ran = node.ww("run", "--", "sort", "-r", input="a\nb\n")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "b\na\n", "")
    ran = node.ww("run", "--", "sh", "-c", 'echo "$@"; exit 3', "--", "-x", "--", "y")
    assert (ran.returncode, ran.stdout) == (3, "-x -- y\n")
    assert limited(node.ww("run", "--memory", "64", "--", "true")) is ("memory" in found(node))
    assert limited(node.ww("run", "--cpu", "10", "--", "true")) is ("processor time" in found(node))
    missing = node.ww("run", "--", "no-such-program")
    assert "could not be started" in missing.stderr
    processes = json.loads(node.ww("ps", "--json").stdout)["processes"]
    assert {each["kind"] for each in processes} == {"native"}
    assert all(each["cpu_ms"] > 0 for each in processes if each["exit"]["kind"] == "exited")


def test_what_is_run_is_on_record_before_it_runs(node: NodeProcess) -> None:
    node.ww("run", "--grant", "out=pubsub:chat", "--", "echo", "for the record", check=True)
    told = node.ww("audit", "tail", "--event", "native.spawned", "--json", check=True).stdout
    assert '"program": "echo for the record"' in told or '"program":"echo for the record"' in told
    assert '"out"' in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_an_end_of_the_command_ends_the_program(node: NodeProcess, number: signal.Signals) -> None:
    def runs() -> list[str]:
        processes = json.loads(node.ww("ps", "--json", check=True).stdout)["processes"]
        return [each["name"] for each in processes if not each["exit"]["kind"]]

    with node.start_ww("run", "--name", "it", "--", "sleep", "1000") as run:
        wait_for(lambda: runs() == ["it"], "it runs")
        run.send_signal(number)
        run.wait(timeout=60)
    wait_for(lambda: not runs(), "the program has ended")


SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * 300000 + self.path.encode())
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Answer).serve_forever()
"""


def fetch(number: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{number}{path}", timeout=60) as answer:
        data: bytes = answer.read()
        return data


async def fetched(number: int, path: str) -> bytes:
    """Once the server has started."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await asyncio.to_thread(fetch, number, path)
            except (OSError, urllib.error.URLError):
                await asyncio.sleep(0.05)


async def test_ww_forward_leads_to_a_web_server_in_a_program(node: NodeProcess) -> None:
    async with at(node) as session:
        spawned = session.proc.spawn("python3", "-c", SERVER, kind="native", ports={"web": 8080})
        async with spawned as server:
            id_ = (await server.info()).id
            with node.start_ww("forward", "0", f"{id_}:web") as forward:
                assert forward.stderr is not None
                told = await asyncio.to_thread(forward.stderr.readline)
                number = int(told.split()[0].rpartition(":")[2])
                pages = await asyncio.gather(*(fetched(number, f"/{i}") for i in range(10)))
                assert [page[300_000:] for page in pages] == [b"/%d" % i for i in range(10)]
                await server.kill()
                assert await asyncio.to_thread(forward.wait, 60) == 0


async def test_a_detached_server_comes_back_with_its_node(node: NodeProcess) -> None:
    """Also after kill -9, which leaves none of it behind; its port leads to the new one."""

    async def served(at_node: NodeProcess, id_: str) -> None:
        with at_node.start_ww("forward", "0", f"{id_}:web") as forward:
            assert forward.stderr is not None
            told = await asyncio.to_thread(forward.stderr.readline)
            number = int(told.split()[0].rpartition(":")[2])
            assert (await fetched(number, "/x"))[300_000:] == b"/x"
            forward.terminate()

    command = ("--port", "web=8080", "--", "python3", "-c", SERVER)
    with node.home.node("k") as k:
        id_ = k.ww("run", "--restart", "always", *command, check=True).stdout.strip()
        await served(k, id_)
        k.stop(signal.SIGKILL)
    wait_for(lambda: not alive(SERVER), "no program is left")
    with node.home.node("k") as k:
        await served(k, id_)
        (info,) = json.loads(k.ww("ps", "--json", check=True).stdout)["processes"]
        assert (info["kind"], info["restarts"], info["exit"]["kind"]) == ("native", 1, "")
        k.ww("kill", id_, check=True)
        assert not alive(SERVER)
        detached = k.ww("run", "--detach", "--memory", "64", "--", "true")
        assert limited(detached) is ("memory" in found(k))
        async with at(k) as session:
            elf, spec = Source(4, lambda count, at: b"\x7fELF"), spec_of("it", (), {}, "", [])
            with pytest.raises(Unsupported, match="no programs of the kind"):
                await session.service("proc").detach(
                    code=elf, kind="native", spec=spec, policy="never", session=session.ref
                )


def alive(script: str) -> list[int]:
    """The processes of this machine with such an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if script.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


async def test_a_port_can_be_shared_and_revoked(node: NodeProcess) -> None:
    async with at(node) as session:
        spawned = session.proc.spawn("python3", "-c", SERVER, kind="native", ports={"web": 8080})
        async with spawned as server:
            id_ = (await server.info()).id
            with pytest.raises(NotFound, match="offers nothing named 'ssh'"):
                await server.export("ssh", wait_s=0)
            ref, grant = await session.share({f"proc:{id_}": ()})
            async with wetware.connect(ref) as guest:
                port = await guest.proc.detached(id_).export("web")
                with pytest.raises(WetwareError):
                    await guest.proc.run("true", kind="native")
                async with forwarded(port, 0) as number:
                    assert (await fetched(number, "/a")).endswith(b"/a")
                    await session.revoke(grant.id)
                    with pytest.raises(OSError):
                        await asyncio.to_thread(fetch, number, "/b")
                with pytest.raises(WetwareError):
                    await port.call("connect")


async def test_who_has_no_role_for_it_runs_nothing(node: NodeProcess) -> None:
    async with at(node) as session:
        weaker = await session.attenuate({"proc": ()})
        with pytest.raises(wetware.WetwareError) as refused:
            await weaker.proc.run("true", kind="native")
        assert refused.value.code.startswith("capability.denied")
        elf = Source(4, lambda count, at: b"\x7fELF")
        with pytest.raises(Unsupported, match="no programs of the kind"):
            await session.service("proc").load(code=elf, kind="native")


async def test_a_program_is_sent_signals(node: NodeProcess, guests: Callable[[str], bytes]) -> None:
    script = "trap 'echo got it' USR1; echo up; while :; do sleep 0.05; done"
    async with at(node) as session:
        async with session.proc.spawn("sh", "-c", script, kind="native") as process:
            assert await process.stdout.receive() == b"up\n"
            await process.signal("USR1")
            assert await process.stdout.receive() == b"got it\n"
            with pytest.raises(InvalidArgument, match="no signal") as wrong:
                await process.signal("SEGV")
            assert "TERM" in wrong.value.hint
            id_ = (await process.info()).id
            sent = node.ww("kill", "--signal", "sigterm", id_, check=True)
            assert sent.stderr == f"{id_} was sent TERM\n"
            assert await process.wait() == Exit("exited", 128 + signal.SIGTERM, "")
            with pytest.raises(InvalidArgument, match="has ended"):
                await process.signal("TERM")
        made = await session.proc.start("sleep", "1000", restart="always", kind="native")
        await made.signal("KILL")
        async with asyncio.timeout(60):
            while not (await made.info()).waits:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0.01)
        with pytest.raises(WetwareError) as waits:
            await made.signal("TERM")
        assert waits.value.code == "not_found.running"
        await made.kill()
        async with session.proc.spawn(guests("cat")) as guest:
            with pytest.raises(Unsupported, match="has no signals") as refused:
                await guest.signal("HUP")
            assert "ww kill" in refused.value.hint
            await guest.signal("TERM")
            assert await guest.wait() == Exit("killed", 0, "by SIGTERM")
    both = node.ww("kill", "--all", "--signal", "TERM", id_)
    assert (both.returncode, "--all" in both.stderr) == (EXIT_USAGE, True)


async def test_it_runs_at_a_member_that_has_the_service(node: NodeProcess) -> None:
    async with at(node) as session:
        async with session.proc.at("any", kind="native") as proc:
            ran = await proc.run("sort", "-u", stdin=b"b\na\nb\n", kind="native")
            assert (ran.exit, ran.stdout) == (Exit("exited", 0, ""), b"a\nb\n")
            made = await proc.start("sleep", "1000", kind="native")
            assert (await made.info()).kind == "native"
            await made.kill()
        with pytest.raises(NotFound, match="no member has room"):
            async with session.proc.at("zone=nowhere", kind="native"):
                pass
    assert node.ww("run", "--on", "any", "--", "echo", "here", check=True).stdout == "here\n"


async def test_a_revoked_session_ends_its_programs(node: NodeProcess) -> None:
    async with at(node) as session, at(node) as other:
        weaker = await session.attenuate({"native": ()})
        async with weaker.proc.spawn("sh", "-c", "echo up; sleep 1000", kind="native") as process:
            assert await process.stdout.receive() == b"up\n"
            id_ = (await process.info()).id
            await session.revoke(weaker.identity.grant)
            end = await other.proc.detached(id_).wait()
            assert end.kind == "killed"
