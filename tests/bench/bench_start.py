"""Start-up: the command line, a node, and what a node costs in memory when idle.

    python tests/bench/bench_start.py [--runs 10]

One host, loopback and unix socket, warm page cache, byte-compiled modules. Peers in the same run:
the bare interpreter, and the imports that the command line and the node cannot avoid.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wetware.testing import Home

_IMPORT_AND_WAIT = "import libp2p, sys; print(flush=True); sys.stdin.read()"


def timed(command: list[str], env: dict[str, str], runs: int) -> list[float]:
    """Wall times in seconds; the first run, which may compile, is not counted."""
    took = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, check=False)
        took.append(time.perf_counter() - started)
        if done.returncode:
            raise SystemExit(f"{command}: {done.stderr.decode()}")
    return took[1:]


def row(name: str, seconds: list[float], target_s: float | None = None) -> None:
    ordered = sorted(seconds)
    p50, worst = statistics.median(ordered), ordered[-1]
    verdict = ""
    if target_s is not None:
        verdict = f"target < {target_s * 1000:.0f} ms: {'met' if p50 < target_s else 'MISSED'}"
    print(f"{name:44} p50 {p50 * 1000:7.0f} ms   max {worst * 1000:7.0f} ms   {verdict}")


def rss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    ww = [str(Path(sys.executable).with_name("ww"))]
    print(f"host: 1, {os.cpu_count()} cores; Python {sys.version.split()[0]}; {runs} runs each")
    with tempfile.TemporaryDirectory() as directory, Home(Path(directory)) as home:
        env = {k: v for k, v in home.env.items() if k != "PYTHONDONTWRITEBYTECODE"}
        home._env["PYTHONDONTWRITEBYTECODE"] = ""  # an empty value means: do write
        row("python -c pass", timed([sys.executable, "-c", "pass"], env, runs))
        row("python -c 'import typer'", timed([sys.executable, "-c", "import typer"], env, runs))
        row("ww --help", timed([*ww, "--help"], env, runs), 0.25)
        started = time.perf_counter()
        node = home.start_node("n").wait_ready()
        row("ww node: first start until it serves", [time.perf_counter() - started])
        node.wait_log("overlay.up", within_s=60)
        row("ww node: first start until libp2p is up", [time.perf_counter() - started])
        local = [*ww, "--data-dir", str(node.data_dir)]
        row("ww whoami (unix socket)", timed([*local, "whoami"], env, runs), 0.4)
        row("ww pub chat hello (unix socket)", timed([*local, "pub", "chat", "x"], env, runs), 0.4)
        remote = [*ww, "--node", node.addr]
        row("ww pub chat hello (noise, TCP)", timed([*remote, "pub", "chat", "x"], env, runs), 0.4)
        time.sleep(2)
        print(f"{'ww node: resident memory, idle':44} {rss_mib(node.process.pid):7.0f} MiB")
        bare = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _IMPORT_AND_WAIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        assert bare.stdout is not None
        assert bare.stdin is not None
        bare.stdout.readline()
        print(f"{'python -c import libp2p: resident memory':44} {rss_mib(bare.pid):7.0f} MiB")
        bare.stdin.close()
        bare.wait()
        node.stop()
        starts = []
        for _ in range(3):
            began = time.perf_counter()
            again = home.start_node("n").wait_ready()
            starts.append(time.perf_counter() - began)
            again.stop()
        row("ww node: later start until it serves", starts)


if __name__ == "__main__":
    main()
