"""What a call costs: wetware's RPC beside raw pycapnp over plain TCP and grpc.aio over TLS.

`python tests/bench/bench_rpc.py [--quick]`: one client process, one server process on loopback.
Every way is measured in turn, several times over, and the median of the turns is printed, so that a
busy machine hits all of them alike. Payload 64 B there and back; calls one after the other (p50,
p99), and 64 at a time (calls/s). Exit status 1 with --check if a target is missed by more than a
quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import ipaddress
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import wetware

PAYLOAD = os.urandom(64)
IN_FLIGHT = 64
SCHEMA = Path(__file__).with_name("bench.capnp")
IMPORTS = str(Path(wetware.__file__).parents[1])
PROTOCOL = "/wetware/bench/1"
WAYS = ("pycapnp-tcp", "ww-unix", "ww-link", "ww-link-guarded", "ww-link-narrowed", "grpc-tls")
Call = Callable[[], Awaitable[object]]


# --- the server process
# -----------------------------------------------------------------------------


def grants() -> dict[str, Any]:
    """The broker's own guards: of a service that a session opened, and of one far down.

    The second is under a session, a reference, its redemption and an attenuation; it has a
    constraint, a rate and a quota, and every one of its ancestors is charged.
    """
    from wetware.broker.terms import Terms
    from wetware.broker.tree import Tree
    from wetware.broker.values import Rate
    from wetware.broker.where import Where
    from wetware.hookspecs import RoleProfile
    from wetware.identity import Principal

    tree, who = Tree(time), Principal("local", "bench")  # type: ignore[arg-type]
    role = tree.root(who, "member", RoleProfile({"bench": frozenset({"Echo.echo"})}))
    session = tree.session(who, [role])
    terms = Terms(
        where=(Where.parse("data=max:1024", "bench"),), rate=Rate(1e6, 1e6), calls=1 << 40
    )
    deep = session
    for label in ("shared", "redeemed", "attenuated"):
        deep = deep.derive(label=label, terms=terms)
    return {
        "guarded": session.derive(label="service bench", service="bench"),
        "narrowed": deep.derive(label="service bench", service="bench"),
    }


def certificate() -> tuple[bytes, bytes]:
    """A self-signed certificate for 127.0.0.1 and its key, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    return (
        cert.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


async def serve(folder: Path) -> None:
    import capnp
    import grpc

    from wetware import rpc
    from wetware.base.access import Access
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import Key
    from wetware.overlay.link import LinkHost
    from wetware.overlay.rpc_pipe import RpcPipe

    schema = rpc.load(SCHEMA)
    raw = capnp.load(str(SCHEMA), imports=[IMPORTS])

    class Echo(rpc.Servant, interface=schema.Echo):
        async def echo(self, data: bytes) -> dict[str, bytes]:
            return {"data": data}

    class RawEcho(raw.Echo.Server):  # type: ignore[misc, name-defined]
        async def echo(self, data: bytes, **_: Any) -> bytes:
            return data

    async def raw_connection(stream: Any) -> None:
        await capnp.TwoPartyServer(stream, bootstrap=RawEcho()).on_disconnect()

    async def grpc_echo(request: bytes, _context: Any) -> bytes:
        return request

    async with rpc.runtime(), LinkHost(Key.generate()) as host:
        plain = await capnp.AsyncIoStream.create_server(raw_connection, "127.0.0.1", 0)
        addrs = await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        host.handle(
            PROTOCOL, lambda stream: rpc.serve(RpcPipe(stream), Echo()), access=Access.PUBLIC
        )
        for name, grant in grants().items():
            bootstrap = rpc.guarded(Echo(), grant)
            host.handle(
                f"{PROTOCOL}/{name}",
                lambda stream, bootstrap=bootstrap: rpc.serve(RpcPipe(stream), bootstrap),
                access=Access.PUBLIC,
            )
        cert, key = certificate()
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(grpc_echo)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler}),)
        )
        grpc_port = server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials([(key, cert)])
        )
        await server.start()
        async with rpc.serve_unix(folder / "rpc.sock", lambda _peer: Echo()):
            where = {
                "tcp": plain.sockets[0].getsockname()[1],
                "link": str(addrs[0].with_peer(host.peer_id)),
                "grpc": grpc_port,
                "cert": cert.decode(),
                "unix": str(folder / "rpc.sock"),
            }
            print(json.dumps(where), flush=True)
            reader = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
            await reader  # until the client closes the pipe
        await server.stop(0)


# --- the client process
# -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def connections(where: dict[str, Any]) -> AsyncIterator[dict[str, Call]]:
    import capnp
    import grpc

    from wetware import rpc
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import Key
    from wetware.overlay.link import LinkHost
    from wetware.overlay.rpc_pipe import RpcPipe

    schema = rpc.load(SCHEMA)
    raw = capnp.load(str(SCHEMA), imports=[IMPORTS])
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(rpc.runtime())
        calls: dict[str, Call] = {}

        stream = await capnp.AsyncIoStream.create_connection("127.0.0.1", where["tcp"])
        client = capnp.TwoPartyClient(stream)
        stack.callback(stream.close)
        stack.callback(client.close)
        plain = client.bootstrap().cast_as(raw.Echo)

        async def pycapnp_tcp() -> None:
            if (await plain.echo(data=PAYLOAD)).data != PAYLOAD:
                raise ValueError("wrong echo")

        calls["pycapnp-tcp"] = pycapnp_tcp

        def ours(ref: Any) -> Call:
            async def call() -> None:
                if (await ref.echo(data=PAYLOAD))["data"] != PAYLOAD:
                    raise ValueError("wrong echo")

            return call

        unix = await stack.enter_async_context(await rpc.connect_unix(Path(where["unix"])))
        calls["ww-unix"] = ours(unix.bootstrap(schema.Echo))
        host = await stack.enter_async_context(LinkHost(Key.generate()))
        link = await host.dial([Multiaddr.parse(where["link"])])
        for way, protocol in (
            ("ww-link", PROTOCOL),
            ("ww-link-guarded", f"{PROTOCOL}/guarded"),
            ("ww-link-narrowed", f"{PROTOCOL}/narrowed"),
        ):
            connection = await stack.enter_async_context(
                await rpc.connect(RpcPipe(await link.open_stream(protocol)))
            )
            calls[way] = ours(connection.bootstrap(schema.Echo))

        channel = await stack.enter_async_context(
            grpc.aio.secure_channel(
                f"127.0.0.1:{where['grpc']}",
                grpc.ssl_channel_credentials(where["cert"].encode()),
            )
        )
        echo = channel.unary_unary("/bench.Echo/Echo")

        async def grpc_tls() -> None:
            if await echo(PAYLOAD) != PAYLOAD:
                raise ValueError("wrong echo")

        calls["grpc-tls"] = grpc_tls
        yield calls


async def latencies_us(call: Call, seconds: float) -> list[float]:
    for _ in range(50):
        await call()
    clock, out = time.perf_counter, []
    end = clock() + seconds
    while (start := clock()) < end:
        await call()
        out.append((clock() - start) * 1e6)
    return out


def cpu_s(pid: int) -> float:
    """What this process and process `pid` have used of the processors, seconds (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


async def rate(call: Call, seconds: float) -> tuple[int, float]:
    """(calls, seconds) with `IN_FLIGHT` calls in flight."""
    count, start = 0, time.perf_counter()
    end = start + seconds

    async def worker() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call()
            count += 1

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return count, time.perf_counter() - start


def percentile(sorted_values: list[float], share: float) -> float:
    return sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * share))]


async def measure(
    where: dict[str, Any], server_pid: int, turns: int, seconds: float
) -> dict[str, dict[str, float]]:
    p50: dict[str, list[float]] = {way: [] for way in WAYS}
    p99: dict[str, list[float]] = {way: [] for way in WAYS}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    async with connections(where) as calls:
        for turn in range(turns):
            order = WAYS if turn % 2 == 0 else WAYS[::-1]
            for way in order:
                values = sorted(await latencies_us(calls[way], seconds))
                p50[way].append(percentile(values, 0.5))
                p99[way].append(percentile(values, 0.99))
            for way in order:
                used = cpu_s(server_pid)
                count, elapsed = await rate(calls[way], seconds)
                cpu[way].append((cpu_s(server_pid) - used) / count * 1e6)
                rates[way].append(count / elapsed)
    return {
        way: {
            "p50_us": statistics.median(p50[way]),
            "p99_us": statistics.median(p99[way]),
            "calls_s": statistics.median(rates[way]),
            "cpu_us": statistics.median(cpu[way]),
        }
        for way in WAYS
    }


def targets(result: dict[str, dict[str, float]]) -> list[tuple[str, float, str, float]]:
    """(what, figure, relation, target) of the design's table."""
    base, link = result["pycapnp-tcp"], result["ww-link"]
    guarded, narrowed = result["ww-link-guarded"], result["ww-link-narrowed"]
    grpc = result["grpc-tls"]
    return [
        ("link p50 / pycapnp over TCP", link["p50_us"] / base["p50_us"], "<=", 1.15),
        ("guarded p50 / pycapnp over TCP", guarded["p50_us"] / base["p50_us"], "<=", 1.15),
        ("guarded p50 / unguarded", guarded["p50_us"] / link["p50_us"], "<=", 1.10),
        ("narrowed, 3 deep, p50 / unguarded", narrowed["p50_us"] / link["p50_us"], "<=", 1.10),
        ("link calls/s / pycapnp over TCP", link["calls_s"] / base["calls_s"], ">=", 0.8),
        ("guarded calls/s / pycapnp over TCP", guarded["calls_s"] / base["calls_s"], ">=", 0.8),
        ("link CPU a call / pycapnp over TCP", link["cpu_us"] / base["cpu_us"], "<=", 1.25),
        ("link p50 / grpc.aio over TLS", link["p50_us"] / grpc["p50_us"], "<=", 1.0),
        ("link calls/s / grpc.aio over TLS", link["calls_s"] / grpc["calls_s"], ">=", 1.0),
    ]


def report(result: dict[str, dict[str, float]], *, slack: float) -> bool:
    print(f"\n64 B echo, two processes, {os.cpu_count()} cores; calls/s with {IN_FLIGHT} in flight")
    print(f"{'':18}{'p50 µs':>9}{'p99 µs':>9}{'calls/s':>10}{'CPU µs a call, both ends':>27}")
    for way in WAYS:
        row = result[way]
        print(
            f"{way:18}{row['p50_us']:9.0f}{row['p99_us']:9.0f}{row['calls_s']:10.0f}{row['cpu_us']:27.0f}"
        )
    print()
    good = True
    for what, figure, relation, target in targets(result):
        met = figure <= target if relation == "<=" else figure >= target
        near = figure <= target * slack if relation == "<=" else figure >= target / slack
        good = good and near
        print(f"{what:38}{figure:6.2f}  target {relation} {target:<5} {'met' if met else 'MISSED'}")
    return good


def run(*, quick: bool) -> dict[str, dict[str, float]]:
    """One run: a server process, and the client in this one."""
    turns, seconds = (4, 0.4) if quick else (9, 0.7)
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise RuntimeError("the server process did not start")
            return asyncio.run(measure(json.loads(line), server.pid, turns, seconds))
        finally:
            server.terminate()
            server.wait(10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about 15 s instead of 70 s")
    parser.add_argument("--json", action="store_true", help="figures alone, as JSON")
    parser.add_argument("--check", action="store_true", help="fail if a target is far off")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve))
        return 0
    result = run(quick=args.quick)
    if args.json:
        print(json.dumps(result))
        return 0
    good = report(result, slack=1.25)
    return 0 if good or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
