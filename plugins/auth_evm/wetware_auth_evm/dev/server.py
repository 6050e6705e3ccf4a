"""JSON-RPC for the try-out chain: `python -m wetware_auth_evm.dev.server`, a child of the node.

On loopback, and for programs of this machine only: a request with an Origin comes from a web page,
one with a foreign Host from a name that somebody points here (DNS rebinding), and one of another
content type from a form; all three are refused. Every body, batch and answer has a limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from wetware_auth_evm.dev.chain import Chain, Refused, Reverted

BODY_BYTES_MAX: Final = 1 << 20
BODY_S_MAX: Final = 10.0
"""For a request's body to arrive."""
BRACKETS_MAX: Final = 4096
"""In a request. py-evm raises the limit of recursion so far that deep nesting ends the process."""
BATCH_MAX: Final = 100
REQUESTS_MAX: Final = 64
"""At the same time; more are told to come again."""

log = logging.getLogger("try-out chain")


def answer(chain: Chain, request: Any) -> dict[str, Any] | None:
    """The answer to one request; None to a notification."""
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        return _error(None, -32600, "not a JSON-RPC request")
    id_, name, params = request.get("id"), request["method"], request.get("params", [])
    if not isinstance(id_, str | int | float | None):
        return _error(None, -32600, "an id is a number or a text")
    if name not in chain.methods:
        return _error(id_, -32601, f"the try-out chain has no method {name[:60]}")
    if not isinstance(params, list):
        return _error(id_, -32602, "the parameters are a list")
    try:
        found = {"jsonrpc": "2.0", "id": id_, "result": chain.methods[name](*params)}
    except Reverted as exc:
        found = _error(id_, 3, str(exc), data="0x" + exc.data.hex())
    except Refused as exc:
        found = _error(id_, -32000, str(exc))
    except sqlite3.Error as exc:
        log.error("the chain cannot be written: %s", exc)  # noqa: TRY400
        found = _error(id_, -32000, f"the chain cannot be written: {exc}")
    except Exception as exc:  # of the libraries, for parameters that are none: each has its own
        found = _error(id_, -32602, f"{name}: {type(exc).__name__}: {str(exc)[:200]}")
    return found if "id" in request else None


def _error(id_: Any, code: int, message: str, **more: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id_, "error": {"code": code, "message": message, **more}}


class _Server:
    """The requests of one chain, over HTTP."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._busy = 0
        self.port = 0

    async def handle(self, request: web.Request) -> web.Response:
        if request.headers.get("Host", "").lower() not in (
            f"127.0.0.1:{self.port}",
            f"localhost:{self.port}",
        ):
            return _plain(403, "this is for programs of this machine: wrong Host")
        if "Origin" in request.headers or "Sec-Fetch-Site" in request.headers:
            return _plain(403, "this is for programs of this machine, and for no web page")
        if request.content_type != "application/json":
            return _plain(415, "send application/json")
        if self._busy >= REQUESTS_MAX:
            return _plain(503, f"{REQUESTS_MAX} requests are being answered")
        self._busy += 1
        try:
            async with asyncio.timeout(BODY_S_MAX):
                body = await request.read()
            return self._answer(body)
        except web.HTTPRequestEntityTooLarge:
            return _plain(413, f"a request has at most {BODY_BYTES_MAX} bytes")
        except TimeoutError:
            return _plain(408, f"the request did not arrive within {BODY_S_MAX:g} s")
        finally:
            self._busy -= 1

    def _answer(self, body: bytes) -> web.Response:
        if body.count(b"[") + body.count(b"{") > BRACKETS_MAX:
            return web.json_response(_error(None, -32600, "a request that is nested too deeply"))
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return web.json_response(_error(None, -32700, "not JSON"))
        if not isinstance(asked, list):
            found: Any = answer(self._chain, asked)
        elif not 1 <= len(asked) <= BATCH_MAX:
            found = _error(None, -32600, f"a batch has 1 to {BATCH_MAX} requests")
        else:
            found = [each for each in (answer(self._chain, one) for one in asked) if each]
        return web.json_response(found) if found else web.Response(status=204)


def _plain(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n")


async def serve(chain: Chain, port: int) -> None:
    """Serve until cancelled; says on stdout where it listens."""
    server = _Server(chain)
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app.router.add_post("/", server.handle)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        server.port = runner.addresses[0][1]
        print(f"ready {server.port}", flush=True)  # noqa: T201  # the parent reads it
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chain until the process is ended."""
    parser = argparse.ArgumentParser(prog="wetware_auth_evm.dev.server")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--owner", type=bytes.fromhex, required=True)
    parser.add_argument("--chain-id", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        chain = Chain(given.file, chain_id=given.chain_id, owner=given.owner)
    except (OSError, sqlite3.Error) as exc:
        print(f"error cannot use {given.file}: {exc}", flush=True)  # noqa: T201
        return 78
    try:
        asyncio.run(serve(chain, given.port))
    except OSError as exc:
        print(f"error cannot listen on port {given.port}: {exc.strerror}", flush=True)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
