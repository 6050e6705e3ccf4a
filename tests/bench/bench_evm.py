"""What decisions by a contract cost on a node, beside asking the chain.

`python tests/bench/bench_evm.py [--quick] [--check]`: on a real anvil with WetwareACL, 20 grants
and then 20,000, minted by `grantMany`. Decisions from the replica's memory beside `eth_call` for
the same answers in the same run; reading the whole history at a first start, from the checkpoint
at the next; the memory that it takes, in a process of its own; from a revocation in a block to
the replica's denial, and to the end of every session of two nodes; logins by wallet. All on one
machine over loopback HTTP, without TLS; the files of the replica are fsynced. --check: exit
status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT_DIR = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT_DIR))

import evm_login  # noqa: E402  # below the path that it needs
import evm_sessions  # noqa: E402
from cluster_report import Report, machine, quantile  # noqa: E402

if TYPE_CHECKING:
    from plugins.auth_evm.tests.chain.net import Net

    from wetware_auth_evm.chain.follower import Follower

DECISION_US = 10.0
BATCH = 100
POLL_S = 0.25
MIB = 1 << 20


def account(number: int) -> str:
    from eth_utils.address import to_checksum_address

    return str(to_checksum_address((number + (1 << 100)).to_bytes(20, "big")))


def mint(chain: Net, first: int, count: int) -> float:
    """Grants to accounts from a number on; returns the seconds that it took."""
    from plugins.auth_evm.tests.contract.people import MEMBER, OWNER, TEAM

    started = time.perf_counter()
    for at in range(first, first + count, BATCH):
        numbers = range(at, min(at + BATCH, first + count))
        end = chain.chain.time + 300 * 86400
        items = [(TEAM, MEMBER, account(number), 0, end, 3) for number in numbers]
        chain.acl.send("grantMany", items, sender=OWNER)
    chain.mine(2)
    return time.perf_counter() - started


def timed(call: Callable[[int], object], rounds: int, *, inner: int = 1) -> list[float]:
    """Seconds of each call; the timer is read once for `inner` of them."""
    took = []
    for number in range(rounds):
        started = time.perf_counter()
        for _ in range(inner):
            call(number)
        took.append((time.perf_counter() - started) / inner)
    return took


async def decisions(report: Report, chain: Net, count: int, rounds: int) -> None:
    from plugins.auth_evm.tests.chain.net import raw
    from plugins.auth_evm.tests.contract.chains import calldata
    from plugins.auth_evm.tests.contract.people import MEMBER, TEAM

    section = f"decisions, {count:,} grants"
    report.say(f"\n{section}: is an account a member, and with which rights; {rounds} each")
    rng = random.Random(count)
    chosen = [account(rng.randrange(count)) for _ in range(rounds)]
    plain = [raw(who) for who in chosen]
    stranger = bytes(20)
    address = chain.acl.address
    calls = [
        {"to": address, "data": "0x" + calldata("rightsOf", TEAM, MEMBER, who).hex()}
        for who in chosen[: rounds // 10]
    ]
    async with chain.follower() as follower:
        await follower.look()
        replica = follower.replica
        assert (replica.unfit(), replica.rights(MEMBER, plain[0])) == ("", 3)
        gc.collect()
        for name, call, target in (
            ("one role, allowed", lambda n: replica.rights(MEMBER, plain[n]), DECISION_US),
            ("one role, refused", lambda n: replica.rights(MEMBER, stranger), DECISION_US),
            ("all roles of an account", lambda n: replica.roles(plain[n]), DECISION_US),
        ):
            took = timed(call, rounds)
            report.figure(
                section, f"replica: {name}, p50", quantile(took, 0.5) * 1e6, "µs", at_most=target
            )
            report.figure(section, f"replica: {name}, p99", quantile(took, 0.99) * 1e6, "µs")
        answer = int(chain.chain.rpc("eth_call", calls[0], "latest"), 16)
        assert answer == replica.rights(MEMBER, plain[0])
        took = timed(lambda n: chain.chain.rpc("eth_call", calls[n], "latest"), len(calls))
        beside = "anvil, one kept connection over loopback"
        report.figure(
            section, "peer: eth_call rightsOf, p50", quantile(took, 0.5) * 1e6, "µs", beside=beside
        )
        report.figure(section, "peer: eth_call rightsOf, p99", quantile(took, 0.99) * 1e6, "µs")


async def starts(report: Report, chain: Net, count: int, folder: Path) -> None:
    section = f"starting with {count:,} grants"
    logs = chain.chain.rpc(
        "eth_getLogs", {"address": chain.acl.address, "fromBlock": "0x0", "toBlock": "latest"}
    )
    size = len(json.dumps(logs, separators=(",", ":")))
    report.say(
        f"\n{section}: {len(logs):,} events in {size / MIB:.1f} MiB of JSON, one endpoint, loopback"
    )
    for name in ("the whole history from the chain", "from the checkpoint, and the newest block"):
        started = time.perf_counter()
        async with chain.follower(directory=folder) as follower:
            await follower.look()
            took = time.perf_counter() - started
            assert follower.replica.unfit() == ""
            assert len(follower.replica.final.grants) == count
        report.figure(section, name, took, "s", digits=3)
    kept = sum(path.stat().st_size for path in folder.iterdir())  # noqa: ASYNC240  # a bench
    report.figure(section, "kept on disk", kept / MIB, "MiB")
    memory(report, section, chain, count)


def memory(report: Report, section: str, chain: Net, count: int) -> None:
    """Of a process that does nothing else."""
    order = {
        "url": chain.chain.url,
        "address": chain.acl.address,
        "time": chain.chain.time,
        "chain_id": chain.chain.chain_id,
    }
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(order)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert found["grants"] == count
    report.figure(section, "resident memory, more than before", found["more"] / MIB, "MiB")
    report.figure(section, "at its peak, while the history is read", found["peak"] / MIB, "MiB")


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


async def child(order: dict[str, Any]) -> None:
    """What `memory` starts: prints how much a follower and its replica take."""
    from plugins.auth_evm.tests.chain.net import BOUNDS, CODE_HASH, FINALIZED, FakeClock, raw
    from plugins.auth_evm.tests.contract.people import TEAM

    from wetware_auth_evm.chain.endpoints import Endpoints
    from wetware_auth_evm.chain.follower import Follower
    from wetware_auth_evm.chain.replica import Replica

    clock = FakeClock(order["time"])
    endpoints = Endpoints([order["url"]], quorum=1, timeout_s=30.0)
    replica = Replica(order["chain_id"], raw(order["address"]), TEAM, bounds=BOUNDS, clock=clock)
    follower = Follower(endpoints, replica, finality=FINALIZED, code_hash=CODE_HASH)
    await follower.identify()
    gc.collect()
    before = resident_bytes()
    await follower.look()
    gc.collect()
    after = resident_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    await endpoints.aclose()
    found = {"more": after - before, "peak": peak - before, "grants": len(replica.final.grants)}
    print(json.dumps(found))


async def revocations(report: Report, chain: Net, count: int, rounds: int) -> None:
    """From the block with a revocation to the replica that denies."""
    section = f"revocation, {count:,} grants"
    report.say(
        f"\n{section}: in a block → the replica denies; {rounds} each; three endpoints "
        "(one anvil), two have to agree"
    )
    urls = [f"{chain.chain.url}/?{name}" for name in "abc"]
    number = 0
    for name, woken in ((f"polled every {POLL_S:g} s", False), ("woken at once", True)):
        took = []
        async with chain.follower(urls, poll_s=POLL_S if not woken else 60.0) as follower:
            looks: asyncio.Queue[None] = asyncio.Queue()
            task = asyncio.create_task(follower.run(functools.partial(_told, looks)))
            try:
                await looks.get()
                assert not follower.replica.fault, follower.replica.fault
                for _ in range(rounds):
                    took.append(await _revoked(chain, follower, looks, number, woken=woken))
                    number += 1
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        for share in (0.5, 0.99):
            of = f"{name}, p{share * 100:g}"
            report.figure(section, of, quantile(took, share) * 1000, "ms", digits=1)


def _told(looks: asyncio.Queue[None], touched: frozenset[bytes] | None) -> None:
    looks.put_nowait(None)


async def _revoked(
    chain: Net, follower: Follower, looks: asyncio.Queue[None], number: int, *, woken: bool
) -> float:
    from plugins.auth_evm.tests.chain.net import raw
    from plugins.auth_evm.tests.contract.people import MEMBER, TEAM

    who = raw(account(number))
    assert follower.replica.rights(MEMBER, who) == 3
    await asyncio.sleep(random.uniform(0.0, 0.05 if woken else POLL_S))  # at any time of the poll
    # With it the clock moves on, as the chain's does.
    await asyncio.to_thread(chain.send, "revoke", TEAM, MEMBER, account(number))
    started = time.perf_counter()
    if woken:
        follower.wake()
    while follower.replica.rights(MEMBER, who):
        await looks.get()
    return time.perf_counter() - started


async def measure(report: Report, *, quick: bool) -> None:
    from plugins.auth_evm.tests.chain.net import net

    few, many = 20, 20_000
    rounds = 2_000 if quick else 20_000
    with net() as chain, tempfile.TemporaryDirectory(prefix="ww-bench-evm-") as folder:
        mint(chain, 0, few)
        await decisions(report, chain, few, rounds)
        took = mint(chain, few, many - few)
        report.say(f"\nminted {many - few:,} grants by grantMany of {BATCH} in {took:.1f} s")
        await decisions(report, chain, many, rounds)
        await starts(report, chain, many, Path(folder))
        await revocations(report, chain, many, 8 if quick else 100)
    await evm_login.login_figures(report, 200 if quick else 2000)
    await evm_sessions.session_figures(
        report, accounts=4 if quick else 10, rounds=1 if quick else 5
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, in half a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="a missed target is a failure")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.child:
        asyncio.run(child(json.loads(args.child)))
        return 0
    report = Report(as_json=args.json)
    report.say(machine())
    asyncio.run(measure(report, quick=args.quick))
    if args.json:
        print(json.dumps(report.figures, indent=2))
    for missed in report.missed:
        report.say(f"missed: {missed}")
    return 1 if args.check and report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
