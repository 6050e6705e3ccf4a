"""What recording decisions costs, and how long it takes to prove that the record is whole.

`python tests/bench/bench_audit.py [--quick] [--records N]`: a record is appended by one caller and
by 64 at the same time, with each policy of fsync, beside a plain write and fsync of the same bytes
in the same directory. Then a log of 1,000,000 records (--quick: 50,000) is verified, and each kind
of tampering with it has to be found: exit status 1 if one is not, with --check also if a target is
missed by more than half.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cluster_report import Report, machine, quantile

from wetware.identity import Key
from wetware_audit.chain import CHECKPOINT_DOMAIN, CHECKPOINTS_FILE, Checkpoint, encode, files
from wetware_audit.config import AuditConfig
from wetware_audit.log import AuditLog
from wetware_audit.verify import verify

RECORD: dict[str, Any] = {
    "event": "service.opened",
    "principal": "local:12D3KooWQ6ad3FnWgx62wVoSFGbA9UVYdXkjPvsHWWVmR1XQAFtr",
    "grant": "0123456789abcdef",
    "parent": "fedcba9876543210",
    "service": "pubsub",
}
IN_FLIGHT = 64
VERIFY_RECORDS_S = 100_000
"""Records verified a second: the target."""


async def timed(call: Callable[[], Awaitable[object]], seconds: float, workers: int) -> Timing:
    """Latencies of a call that `workers` make over and over."""
    latencies: list[float] = []
    start = time.perf_counter()
    end = start + seconds

    async def work() -> None:
        while (began := time.perf_counter()) < end:
            await call()
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(work() for _ in range(workers)))
    return Timing(latencies, time.perf_counter() - start)


class Timing:
    def __init__(self, latencies: list[float], elapsed: float) -> None:
        self.p50_ms = quantile(latencies, 0.5) * 1000
        self.p99_ms = quantile(latencies, 0.99) * 1000
        self.rate = len(latencies) / elapsed

    def __str__(self) -> str:
        return f"p50 {self.p50_ms:7.3f} ms  p99 {self.p99_ms:7.3f} ms  {self.rate:8.0f} records/s"


async def admission(report: Report, folder: Path, seconds: float) -> None:
    """Appending, beside the disk itself."""
    line, _ = encode({"seq": 1, "time_ms": 1, **RECORD}, bytes(32))
    report.say(f"\nadmitting, records of {len(line)} bytes, {machine()}")
    plain = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def write_and_fsync() -> None:
        os.write(plain, line)
        os.fsync(plain)

    beside = await timed(write_and_fsync, seconds, 1)
    os.close(plain)
    report.say(f"  {'plain write + fsync, one after the other':44} {beside}")
    rates = {}
    for policy in ("batch", "interval", "never"):
        log = open_log(folder / policy, AuditConfig(fsync=policy))
        for workers in (1, IN_FLIGHT):
            found = await timed(lambda log=log: log.append(dict(RECORD)), seconds, workers)
            report.say(f"  {f'audit log, fsync {policy}, {workers} in flight':44} {found}")
            rates[policy, workers] = found
        log.close()
    batch = rates["batch", 1]
    report.figure(
        "admission",
        "admit, fsync, one in flight / plain write + fsync, p50",
        batch.p50_ms / beside.p50_ms,
        "×",
        beside=f"{batch.p50_ms:.3f} ms / {beside.p50_ms:.3f} ms",
    )
    report.figure(
        "admission",
        "admit, fsync, 64 in flight / plain write + fsync, rate",
        rates["batch", IN_FLIGHT].rate / beside.rate,
        "×",
        beside="one fsync is shared by what waits together",
    )


def open_log(directory: Path, config: AuditConfig) -> AuditLog:
    key = Key.generate()
    return AuditLog(
        directory,
        key.peer_id,
        lambda data: key.sign(CHECKPOINT_DOMAIN + data),
        clock=Clock(),
        config=config,
    )


class Clock:
    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


async def big_log(directory: Path, records: int) -> Checkpoint:
    """A log of so many records, as a node writes it."""
    config = AuditConfig(
        fsync="never", checkpoint_records=max(1000, records // 100), file_bytes_max=records * 32
    )
    log = open_log(directory, config)
    left = records
    while left > 0:
        some = min(left, 2000)
        await asyncio.gather(*(log.append(dict(RECORD, n=left - n)) for n in range(some)))
        left -= some
    checkpoint = log.checkpoint()
    await asyncio.to_thread(log.close)
    return checkpoint


def tampered(directory: Path, kind: str) -> None:
    """Tamper with a log as somebody would who can write its files, in its middle."""
    path = files(directory)[len(files(directory)) // 2]
    lines = path.read_bytes().splitlines(keepends=True)
    at = len(lines) // 2
    match kind:
        case "flipped":
            lines[at] = lines[at].replace(b"pubsub", b"pubsuc")
        case "dropped":
            del lines[at]
        case "reordered":
            lines[at], lines[at + 1] = lines[at + 1], lines[at]
        case "duplicated":
            lines.insert(at, lines[at])
        case "missing file":
            path.unlink()
            return
        case "cut off":
            (directory / CHECKPOINTS_FILE).unlink()
            for later in files(directory)[len(files(directory)) // 2 + 1 :]:
                later.unlink()
            del lines[at:]
        case "rewritten":
            (directory / CHECKPOINTS_FILE).unlink()
            rewrite(directory, path.name, at)
            return
    path.write_bytes(b"".join(lines))


def rewrite(directory: Path, name: str, at: int) -> None:
    """Change a record, and compute every hash from there on anew."""
    previous, changed = b"", False
    for path in files(directory):
        if not changed and path.name != name:
            last = path.read_bytes().splitlines()[-1]
            previous = bytes.fromhex(json.loads(last)["hash"])
            continue
        out = []
        for number, line in enumerate(path.read_bytes().splitlines()):
            record = json.loads(line)
            stated = bytes.fromhex(record.pop("hash"))
            if record["event"] == "log.opened":
                record["prev"] = previous.hex() if previous else record["prev"]
                previous = previous or bytes.fromhex(record["prev"])
            if path.name == name and number == at:
                record["principal"], changed = "local:somebody-else", True
            new, previous = encode(record, previous) if changed else (line, stated)
            out.append(new)
        path.write_bytes(b"\n".join([*out, b""]))


def verification(report: Report, directory: Path, checkpoint: Checkpoint, records: int) -> bool:
    """Verify the log as it is, then after each kind of tampering; returns whether all was found."""
    good = True
    size = sum(path.stat().st_size for path in files(directory))
    report.say(
        f"\nverifying {records} records, {size / 1e6:.0f} MB in {len(files(directory))} files"
    )
    started = time.perf_counter()
    whole = verify(directory, checkpoints=[checkpoint])
    took = time.perf_counter() - started
    if not whole.ok or whole.records < records:
        good = False
        report.say(f"  THE LOG IS NOT WHOLE: {whole.problems}")
    report.figure(
        "verify",
        "time for each 100,000 records",
        took / whole.records * 100_000,
        at_most=100_000 / VERIFY_RECORDS_S,
        beside=f"{took:.2f} s in all, {whole.records / took:.0f} records/s",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.figure("verify", "peak memory of the process", peak, "MiB", digits=0)
    for kind in (
        "flipped", "dropped", "reordered", "duplicated", "missing file", "cut off", "rewritten"
    ):  # fmt: skip
        copy = directory.with_name("copy")
        shutil.copytree(directory, copy)
        try:
            tampered(copy, kind)
            alone = verify(copy)
            started = time.perf_counter()
            found = verify(copy, checkpoints=[checkpoint])
            took = time.perf_counter() - started
        finally:
            shutil.rmtree(copy)
        if found.ok:
            good = False
            report.say(f"  {kind:14} NOT FOUND")
            continue
        first = found.problems[0]
        how = "by the hashes" if not alone.ok else "by the checkpoint only"
        report.say(
            f"  {kind:14} found {how}, {took:.2f} s: {first.file or 'the log'} record {first.seq}"
        )
    return good


async def measure(report: Report, records: int, seconds: float, folder: Path) -> bool:
    await admission(report, folder, seconds)
    started = time.perf_counter()
    checkpoint = await big_log(folder / "big", records)
    took = time.perf_counter() - started
    report.say(f"\nwrote {records} records in {took:.1f} s ({records / took:.0f}/s, no fsync)")
    return verification(report, folder / "big", checkpoint, records)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50,000 records, in half a minute")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="a missed target is a failure")
    parser.add_argument("--dir", type=Path, help="where to write; default: the temporary directory")
    args = parser.parse_args()
    report = Report(as_json=args.json)
    records, seconds = (50_000, 1.0) if args.quick else (args.records, 4.0)
    with tempfile.TemporaryDirectory(prefix="ww-bench-audit-", dir=args.dir) as folder:
        good = asyncio.run(measure(report, records, seconds, Path(folder)))
    if args.json:
        print(json.dumps(report.figures, indent=2))
    for missed in report.missed:
        report.say(f"missed: {missed}")
    return 0 if good and not (args.check and report.missed) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
