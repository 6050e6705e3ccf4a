"""Each way in which pycapnp is known to take the process down, in a process of its own.

The programs run with automatic garbage collection and, where it matters, a thread that does nothing
but allocate, so that the collector runs there: that kills a program that uses pycapnp directly.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HEAD = """
import asyncio, gc, os, sys, threading, time, warnings
from pathlib import Path
from wetware import rpc
from wetware.errors import *

schema = rpc.load({zoo!r})
path = Path({path!r})

class Cell(rpc.Servant, interface=schema.Cell):
    async def get(self): return {{"value": b"x"}}
    async def set(self, value): pass

class Zoo(rpc.Servant, interface=schema.Zoo):
    async def echo(self, **kw): return kw
    async def data(self, data, name): return {{"data": data}}
    async def nothing(self): pass
    async def fail(self, how): raise Denied("no")
    async def hang(self): await asyncio.sleep(1000)
    async def make(self, value): return {{"cell": Cell()}}
    async def keep(self, cell): self.cell = cell
    async def kept(self): return {{"cell": self.cell}}
    async def use(self, cell): return await cell.get()
    async def any(self, cap): return {{"cap": cap}}
    async def counter(self): return {{}}
    async def make_many(self, count): return {{"cells": [Cell() for _ in range(count)]}}
    async def bits(self, bits): return {{}}
    async def big(self, bytes): return {{"data": bytes * b"x"}}
    async def relay(self, zoo): return await zoo.make()

def allocate_in_a_thread():
    def run():
        while True:
            junk = [[] for _ in range(3000)]
            for item in junk: item.append(item)     # cycles: only the collector frees them
            time.sleep(0)
    threading.Thread(target=run, daemon=True).start()
"""


def run(tmp_path: Path, program: str, timeout_s: float = 90) -> str:
    zoo = str(Path(__file__).with_name("zoo.capnp"))
    source = HEAD.format(zoo=zoo, path=str(tmp_path / "s")) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", source],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    assert "Fatal Python error" not in done.stderr
    return done.stdout


def test_10000_failing_calls_with_an_allocating_thread_and_automatic_gc(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        async def main():
            settings = gc.isenabled(), gc.get_threshold(), list(gc.callbacks)
            failed = 0
            async with rpc.serve_unix(path, lambda peer: Zoo()):
                async with await rpc.connect_unix(path) as connection:
                    zoo = connection.bootstrap(schema.Zoo)
                    allocate_in_a_thread()
                    async def worker(count):
                        nonlocal failed
                        for i in range(count):
                            try:
                                match i % 3:
                                    case 0: await zoo.fail(how="denied")
                                    case 1: await zoo.data(data=5)
                                    case 2:
                                        cell = (await zoo.make(value=b""))["cell"]
                                        holder = {"cell": cell}; holder["me"] = holder
                                        await zoo.cast(schema.Newer).extra()
                            except (WetwareError, TypeError) as exc:
                                failed += 1
                                exc.me = exc      # its traceback lives until the collector comes
                                del exc.me
                    await asyncio.gather(*(worker(2500) for _ in range(4)))
            assert (gc.isenabled(), gc.get_threshold(), list(gc.callbacks)) == settings
            assert gc.isenabled()
            print(failed, gc.get_stats()[2]["collections"] > 0)

        asyncio.run(main())
        """,
    )
    assert out.split() == ["10000", "True"]


def test_references_and_results_dropped_in_other_threads(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import queue
        q = queue.SimpleQueue()
        def drop():
            while q.get() is not None: pass

        async def main():
            servant = Zoo()
            async with rpc.serve_unix(path, lambda peer: servant):
                async with await rpc.connect_unix(path) as connection:
                    zoo = connection.bootstrap(schema.Zoo)
                    thread = threading.Thread(target=drop); thread.start()
                    for _ in range(2000):
                        q.put(await zoo.make(value=b"x"))
                        q.put(asyncio.ensure_future(zoo.nothing()))
                    q.put(None); thread.join()
                    end = zoo._end
                    for _ in range(1000):
                        await zoo.nothing()
                        if len(end.clients) <= 3: break
                    print(len(end.clients) <= 3)

        asyncio.run(main())
        """,
    )
    assert out.split() == ["True"]


def test_the_garbage_collector_finds_unclosed_connections(tmp_path: Path) -> None:
    """A client that goes out of scope after a failed call is found by the collector: no crash."""
    out = run(
        tmp_path,
        """
        warnings.simplefilter("ignore", ResourceWarning)
        async def session():
            connection = await rpc.connect_unix(path)
            zoo = connection.bootstrap(schema.Zoo)
            try: await zoo.fail(how="x")
            except Denied as exc: exc.cycle = exc, connection, zoo
            pending = asyncio.ensure_future(zoo.hang())
            pending.add_done_callback(lambda task: task.exception())
            await zoo.nothing()

        async def main():
            async with rpc.serve_unix(path, lambda peer: Zoo()):
                for _ in range(20):
                    await session()
                    gc.collect()
                from wetware.rpc import kjloop
                (runtime,) = kjloop._runtimes.values()
                for _ in range(50):
                    gc.collect(); await asyncio.sleep(0.005)
                print("open", len(runtime.connections))

        asyncio.run(main())
        """,
    )
    # A call in flight refers to its reference, so these connections stay open until the calls end.
    assert out.split()[0] == "open"


def test_unclosed_connections_without_calls_are_closed_on_the_loop(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        warnings.simplefilter("always", ResourceWarning)
        async def session(keep):
            connection = await rpc.connect_unix(path)
            zoo = connection.bootstrap(schema.Zoo)
            await zoo.nothing()
            keep.append(zoo)

        async def main():
            async with rpc.serve_unix(path, lambda peer: Zoo()):
                keep = []
                await session(keep)
                gc.collect()
                await keep[0].nothing()          # a reference keeps its connection
                end = keep[0]._end
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    threading.Thread(target=keep.clear).start()
                    await asyncio.wait_for(end.lost.wait(), 60)
                print(end.closed, caught[0].category.__name__)

        asyncio.run(main())
        """,
    )
    assert out.split() == ["True", "ResourceWarning"]


def test_a_program_that_exits_without_closing(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        warnings.simplefilter("ignore", ResourceWarning)
        async def main():
            cm = rpc.serve_unix(path, lambda peer: Zoo()); await cm.__aenter__()
            connection = await rpc.connect_unix(path)
            zoo = connection.bootstrap(schema.Zoo)
            cell = (await zoo.make(value=b""))["cell"]
            hanging = asyncio.ensure_future(zoo.hang())
            await zoo.nothing()
            globals().update(cm=cm, connection=connection, zoo=zoo, cell=cell, hanging=hanging)
            print("leaving", flush=True)

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        """,
    )
    assert out.split() == ["leaving"]


def test_a_program_that_exits_after_its_loop_is_closed(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        warnings.simplefilter("ignore", ResourceWarning)
        async def main():
            cm = rpc.serve_unix(path, lambda peer: Zoo()); await cm.__aenter__()
            connection = await rpc.connect_unix(path)
            zoo = connection.bootstrap(schema.Zoo)
            cell = (await zoo.make(value=b""))["cell"]
            globals().update(cm=cm, connection=connection, zoo=zoo, cell=cell)

        asyncio.run(main())
        del cell, zoo, connection, cm
        gc.collect()
        print("leaving", flush=True)
        """,
    )
    assert out.split() == ["leaving"]


def test_a_read_that_starts_after_the_end_of_the_stream(tmp_path: Path) -> None:
    """The peer is gone before pycapnp reads for the first time."""
    out = run(
        tmp_path,
        """
        import socket
        from wetware.rpc.pipes import SocketPipe

        class Eager(SocketPipe):
            def start(self, transport):
                transport.feed_eof()
                super().start(transport)

        async def main():
            for pipe in (SocketPipe, Eager):
                for data in (b"", b"\\0", bytes(7), bytes(8), b"\\0\\0\\0\\0\\1\\0\\0\\0",
                bytes(64)):
                    ours, theirs = socket.socketpair()
                    theirs.sendall(data); theirs.close()
                    await asyncio.wait_for(rpc.serve(pipe(ours), Zoo(), rpc.RpcLimits()), 60)
                    ours, theirs = socket.socketpair()
                    theirs.sendall(data); theirs.close()
                    connection = await rpc.connect(pipe(ours), rpc.RpcLimits())
                    try: await connection.bootstrap(schema.Zoo).nothing()
                    except WetwareError as exc: print(type(exc).__name__)
                    await asyncio.wait_for(connection.wait_closed(), 60)
                    await connection.aclose()

        asyncio.run(main())
        """,
    )
    assert out.split() == ["Disconnected"] * 12


def test_an_application_that_runs_pycapnps_loop_itself(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import capnp
        async def main():
            async with capnp.kj_loop():
                async with rpc.serve_unix(path, lambda peer: Zoo()):
                    async with await rpc.connect_unix(path) as connection:
                        await connection.bootstrap(schema.Zoo).nothing()
                print(hasattr(asyncio.get_running_loop(), "_kj_loop"))
            async with rpc.serve_unix(path, lambda peer: Zoo()):
                async with await rpc.connect_unix(path) as connection:
                    await connection.bootstrap(schema.Zoo).nothing()
            print(hasattr(asyncio.get_running_loop(), "_kj_loop"))

        asyncio.run(main())
        """,
    )
    assert out.split() == ["True", "False"]


def test_an_application_that_leaves_its_loop_before_closing(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        import capnp
        async def main():
            async with capnp.kj_loop():
                server = rpc.serve_unix(path, lambda peer: Zoo()); await server.__aenter__()
                connection = await rpc.connect_unix(path)
                zoo = connection.bootstrap(schema.Zoo)
                cell = (await zoo.make(value=b""))["cell"]
                hanging = asyncio.ensure_future(zoo.hang())
                await zoo.nothing()
            try: await hanging
            except Disconnected as exc: print(type(exc).__name__)
            try: await zoo.nothing()
            except Disconnected as exc: print(type(exc).__name__)
            del cell, zoo
            await connection.aclose()
            await server.__aexit__(None, None, None)
            print("end")

        asyncio.run(main())
        """,
    )
    assert out.split() == ["Disconnected", "Disconnected", "end"]


def test_several_loops_in_several_threads(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        async def session(path):
            async with rpc.serve_unix(path, lambda peer: Zoo()):
                async with await rpc.connect_unix(path) as connection:
                    zoo = connection.bootstrap(schema.Zoo)
                    for _ in range(200):
                        cell = (await zoo.make(value=b""))["cell"]
                        try: await zoo.fail(how="x")
                        except Denied: pass
                    return cell

        allocate_in_a_thread()
        kept = []
        def thread(i):
            for turn in range(3):
                kept.append(asyncio.run(session(Path(f"{path}{i}"))))
        threads = [threading.Thread(target=thread, args=(i,)) for i in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
        async def elsewhere():
            try: await kept[0].get()
            except WetwareError as exc: print(exc.code)
        asyncio.run(elsewhere())
        kept.clear(); gc.collect()
        print("end")
        """,
    )
    assert out.split() == ["rpc.wrong_loop", "end"]


@pytest.mark.parametrize("moment", ["while it runs", "after it ended"])
def test_tracebacks_and_tasks_that_outlive_a_call(tmp_path: Path, moment: str) -> None:
    """A servant keeps its exception, its task and the task's frames; another thread drops them."""
    early = moment == "while it runs"
    out = run(
        tmp_path,
        f"""
        kept = []
        class Keeper(Zoo):
            async def fail(self, how):
                task = asyncio.current_task()
                kept.append(task)
                try: raise ValueError(how)
                except ValueError as exc:
                    kept.append(exc)
                    raise
            async def hang(self):
                kept.append(asyncio.current_task())
                try: await asyncio.sleep(1000)
                except asyncio.CancelledError as exc:
                    kept.append(exc)
                    raise

        async def main():
            import logging; logging.disable()
            async with rpc.serve_unix(path, lambda peer: Keeper()):
                async with await rpc.connect_unix(path) as connection:
                    zoo = connection.bootstrap(schema.Zoo)
                    for _ in range(200):
                        try: await zoo.fail(how="x")
                        except InternalError: pass
                        hanging = asyncio.ensure_future(zoo.hang())
                        await zoo.nothing()
                        hanging.cancel()
                        try: await hanging
                        except asyncio.CancelledError as exc: kept.append(exc)
                        if {early}:
                            thread = threading.Thread(target=kept.clear); thread.start()
                            while thread.is_alive(): await asyncio.sleep(0)
                    await zoo.nothing()
            thread = threading.Thread(target=lambda: (kept.clear(), gc.collect())); thread.start()
            thread.join()
            print("end")

        asyncio.run(main())
        """,
    )
    assert out.split() == ["end"]
