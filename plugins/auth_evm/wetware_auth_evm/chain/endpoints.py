"""JSON-RPC endpoints of a chain: bounded, timed, and believed only together.

One endpoint is never trusted with what decides: block hashes and the contract's state are taken
when `quorum` of them agree. Logs may come from any one, because the hash of the history proves
them. An endpoint that fails is left alone for a time (circuit breaker), and never named with its
path, which may hold a key.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from wetware.base.log import get_logger
from wetware_auth_evm.chain.errors import (
    BadSettings,
    ChainError,
    EndpointFailed,
    EndpointUnavailable,
    NoQuorum,
    Unreachable,
)
from wetware_auth_evm.chain.finality import is_endpoint, is_loopback

log = get_logger("plugin.auth_evm")

ANSWER_BYTES_MAX: Final = 1 << 20
"""Of one answer; logs have LOGS_BYTES_MAX."""
LOGS_BYTES_MAX: Final = 4 << 20
"""Of one answer with logs. More are asked for in parts; a part takes the loop some 0.1 s."""
BLOCK_LOGS_BYTES_MAX: Final = 64 << 20
"""Of the logs of a single block, which cannot be asked for in parts."""
RANGE_BLOCKS_MAX: Final = 10_000
"""Of one request for logs; halved where an endpoint refuses it."""
CALLS_MAX: Final = 16
"""At one endpoint at the same time; more wait."""
FAILURES_MAX: Final = 3
"""One after another: then the endpoint is left alone."""
BACKOFF_S, BACKOFF_S_MAX = 1.0, 15.0
"""The upper one bounds how long an outage outlasts itself."""
STRAGGLER_S: Final = 0.15
"""How long the heads of slower endpoints are waited for, once a quorum has answered."""
LATE_MAX: Final = 4
"""One after another: then an endpoint is not waited for beyond the quorum, until it is in time."""
ENDPOINTS_MAX: Final = 16
NESTING_MAX: Final = 32
"""Of JSON; what is asked for has 5 levels."""
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A string of JSON, or the rest of the text if it does not end: each byte is looked at once."""
ERROR_CHARS_MAX: Final = 200
ERRORS_CHARS_MAX: Final = 400
"""Of what several endpoints say."""
REVERT_BYTES_MAX: Final = 1024
REFUSED: Final = "evm.endpoint.refused"
"""Code of an EndpointFailed: the endpoint is there, and does not answer this question."""
_REFUSING_STATUSES: Final = frozenset({400, 413, 422})
"""With which some servers refuse too wide a range; the body says so."""


class Reverted(ChainError):
    """The chain ran a call, and the call failed: an answer, not a failure of the endpoint.

    Attributes:
        returned: What the contract said with it: an error of its ABI, or nothing.
    """

    code = "evm.reverted"
    returned: bytes = b""


class _TooLong(Exception):
    """A body longer than it may be."""


class _BadStatus(Exception):
    """An HTTP status that is no answer."""


def _name(url: str) -> str:
    """Scheme, host and port of a URL; raises ConfigError."""
    if not is_endpoint(url):
        raise BadSettings(
            "an endpoint that is no http or https URL",  # it may hold a key: not repeated
            hint='write [plugins.auth_evm] endpoints = ["https://HOST/…", …]',
        )
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}"


def _parse(body: bytearray) -> Any:
    """JSON; raises ValueError, also for more nesting than any answer has.

    The standard parser calls itself for each level, on the C stack: where something in the process
    has raised the limit of recursion (py-evm does), 16 MiB of brackets end the process.
    """
    # Without the strings: a bracket in one would pair with one outside, and hide it.
    brackets = _STRING.sub(b"", body).translate(None, _NO_BRACKETS)
    for _ in range(NESTING_MAX):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    # What is left is deeper than that, or not JSON.
    if brackets.count(b"[") + brackets.count(b"{") > NESTING_MAX:
        raise ValueError("nested too deeply")
    return json.loads(body)


class Endpoint:
    """One JSON-RPC server.

    Args:
        url: http or https; it may hold a key and is not logged.
        timeout_s: For one answer, connecting included.

    Attributes:
        name: Scheme, host and port.
        failures: Since it last answered.
        late: How often, one after another, it was slower than a quorum of the others.
        dissents: How often it contradicted a quorum.
        error: The last failure, or "".

    Raises ConfigError for a URL that is none.
    """

    def __init__(
        self, url: str, *, timeout_s: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = _name(url)
        self._url, self._timeout_s, self._monotonic = url, timeout_s, monotonic
        self._http: aiohttp.ClientSession | None = None
        self._ids = itertools.count(1)
        self._slots = asyncio.Semaphore(CALLS_MAX)
        self._closed_until = 0.0
        self.failures = self.late = self.dissents = 0
        self.error = ""
        self.latency_s = 0.0

    @property
    def available(self) -> bool:
        return self._monotonic() >= self._closed_until

    async def call(self, method: str, *params: Any, bytes_max: int = ANSWER_BYTES_MAX) -> Any:
        """The result of a request; raises EndpointFailed, Reverted."""
        if not self.available:
            raise EndpointUnavailable(f"{self.name} is left alone for now: {self.error}")
        request = {
            "jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": list(params)
        }  # fmt: skip
        started = self._monotonic()
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                answer = await self._post(request, bytes_max)
        except TimeoutError:
            raise self._failed(f"no answer within {self._timeout_s:g} s") from None
        except _BadStatus as exc:
            raise self._failed(str(exc)) from None
        except (aiohttp.ClientError, OSError) as exc:
            raise self._failed(type(exc).__name__) from None  # its text may hold the URL
        except _TooLong:
            # The endpoint is there; less may be asked of it.
            self._answered()
            self.error = f"an answer of more than {bytes_max} bytes"
            raise EndpointFailed(f"{self.name}: {self.error}", code=REFUSED) from None
        except (ValueError, RecursionError):
            raise self._failed("an answer that is not JSON-RPC") from None
        self.latency_s = self._monotonic() - started
        return self._result(request, answer)

    async def logs(self, contract: bytes, first: int, last: int) -> AsyncIterator[tuple[Any, int]]:
        """(logs of a contract as JSON, up to which block) for one range of blocks after another.

        Raises EndpointFailed, also where it refuses a single block.
        """
        width = RANGE_BLOCKS_MAX
        while first <= last:
            until = min(last, first + width - 1)
            asked = {
                "address": "0x" + contract.hex(), "fromBlock": hex(first), "toBlock": hex(until)
            }  # fmt: skip
            most = LOGS_BYTES_MAX if until > first else BLOCK_LOGS_BYTES_MAX
            try:
                raw = await self.call("eth_getLogs", asked, bytes_max=most)
            except EndpointFailed as exc:
                if exc.code != REFUSED or until == first:
                    raise
                width = (until - first + 1) // 2  # too many blocks, or too many logs
                continue
            yield raw, until
            first = until + 1

    def _result(self, request: dict[str, Any], answer: Any) -> Any:
        if not isinstance(answer, dict):
            raise self._failed("an answer that is not JSON-RPC")
        error = answer.get("error")
        allowed = (request["id"],) if error is None else (request["id"], None)
        if answer.get("id") not in allowed:  # what could not be read has no ID to repeat
            raise self._failed("an answer to another request")
        if error is not None:
            text = _error_text(error)
            if isinstance(error, dict) and (error.get("code") == 3 or "revert" in text.lower()):
                self._answered()
                reverted = Reverted(f"the call failed: {text}")
                reverted.returned = _returned(error)
                raise reverted
            # A definite refusal, e.g. of too wide a range: the endpoint itself is there.
            self.error = text
            raise EndpointFailed(f"{self.name}: {text}", code=REFUSED)
        if "result" not in answer:
            raise self._failed("an answer without a result")
        self._answered()
        return answer["result"]

    def _answered(self) -> None:
        if self.failures >= FAILURES_MAX:
            log.info("endpoint.back", endpoint=self.name)
        self.failures, self._closed_until = 0, 0.0

    def _failed(self, why: str) -> EndpointUnavailable:
        self.failures += 1
        self.error = why
        if self.failures >= FAILURES_MAX:
            backoff_s = min(BACKOFF_S * 2 ** (self.failures - FAILURES_MAX), BACKOFF_S_MAX)
            self._closed_until = self._monotonic() + backoff_s
            if self.failures == FAILURES_MAX:
                log.warning("endpoint.failing", endpoint=self.name, error=why)
        return EndpointUnavailable(f"{self.name}: {why}")

    async def _post(self, request: dict[str, Any], bytes_max: int) -> Any:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CALLS_MAX),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a small body stays small
                trust_env=not is_loopback(
                    self._url
                ),  # a proxy for the Internet, not for this machine
            )
        try:
            return await self._post_once(request, bytes_max)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as exc:
            if isinstance(exc, aiohttp.ClientConnectorError):
                raise
            return await self._post_once(request, bytes_max)  # a kept connection that had ended

    async def _post_once(self, request: dict[str, Any], bytes_max: int) -> Any:
        assert self._http is not None  # noqa: S101  # _post made it
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        async with self._http.post(
            self._url, data=json.dumps(request), headers=headers, allow_redirects=False
        ) as response:
            body = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                body += piece
                if len(body) > bytes_max:
                    raise _TooLong
            if response.status == 200:
                return _parse(body)
            answer = _parse(body) if response.status in _REFUSING_STATUSES else None
            if isinstance(answer, dict) and answer.get("error") is not None:
                return answer
            raise _BadStatus(f"HTTP {response.status}")

    async def aclose(self) -> None:
        """End its connections. Idempotent."""
        if self._http is not None:
            await self._http.close()
            self._http = None


def _returned(error: Any) -> bytes:
    """The data of an error, as the several kinds of endpoints give it."""
    found = error.get("data") if isinstance(error, dict) else None
    if isinstance(found, dict):
        found = found.get("data")
    try:
        return data(found)[:REVERT_BYTES_MAX]
    except ValueError:
        return b""


def _error_text(error: Any) -> str:
    text = error.get("message") if isinstance(error, dict) else error
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    return clean[:ERROR_CHARS_MAX]


class Endpoints:
    """Several endpoints, believed when `quorum` of them agree.

    Args:
        urls: Of different operators, for a quorum to mean anything.
        quorum: How many have to agree.
        timeout_s: For one answer.

    Raises ConfigError for endpoints that can give no quorum.
    """

    def __init__(self, urls: Sequence[str], *, quorum: int, timeout_s: float) -> None:
        if not 1 <= quorum <= len(urls) <= ENDPOINTS_MAX or len(set(urls)) < len(urls):
            raise BadSettings(
                f"a quorum of {quorum} and {len(urls)} endpoints, {len(set(urls))} of them "
                "different",
                hint=f"give 1 to {ENDPOINTS_MAX} endpoints of different operators, and a quorum "
                "that they can reach",
            )
        self.each = [Endpoint(url, timeout_s=timeout_s) for url in urls]
        self.quorum = quorum

    async def agree(self, method: str, *params: Any, key: Callable[[Any], Any] = repr) -> Any:
        """An answer on whose `key` a quorum agrees; raises NoQuorum, and Reverted if they agree.

        `key` raises ValueError, TypeError or KeyError for an answer that is malformed.
        """
        votes: Counter[Any] = Counter()
        said: dict[Any, list[Endpoint]] = {}
        errors: list[str] = []
        asked = {asyncio.create_task(e.call(method, *params)): e for e in self.each}
        pending = set(asked)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    vote, value = self._vote(task, key, errors)
                    if vote is None:
                        continue
                    votes[vote] += 1
                    said.setdefault(vote, []).append(asked[task])
                    if votes[vote] >= self.quorum:
                        self._dissent(vote, said)
                        if isinstance(value, Reverted):
                            raise value
                        return value
        finally:
            await let_go(asked)
        raise NoQuorum(self._why(method, said, errors), hint="`ww auth evm status` shows them")

    def _vote(
        self, task: asyncio.Task[Any], key: Callable[[Any], Any], errors: list[str]
    ) -> tuple[Any, Any]:
        try:
            value = task.result()
        except Reverted as exc:
            return ("reverted",), exc
        except EndpointFailed as exc:
            errors.append(exc.message)
            return None, None
        if value is None:
            errors.append("an endpoint does not have it")
            return None, None
        try:
            return ("value", key(value)), value
        except (ValueError, TypeError, KeyError, AttributeError):
            errors.append("a malformed answer")
            return None, None

    def _dissent(self, vote: Any, said: dict[Any, list[Endpoint]]) -> None:
        for other, endpoints in said.items():
            if other != vote:
                for endpoint in endpoints:
                    endpoint.dissents += 1

    def _why(self, method: str, said: dict[Any, list[Endpoint]], errors: Sequence[str]) -> str:
        sizes = sorted((len(group) for group in said.values()), reverse=True)
        if len(sizes) > 1:
            groups = "; ".join(", ".join(e.name for e in group) for group in said.values())
            return f"the endpoints contradict each other about {method} ({groups})"
        answered = sizes[0] if sizes else 0
        why = f": {errors[0]}" if errors else ""
        return f"{answered} of {len(self.each)} endpoints answered, {self.quorum} are needed{why}"

    async def first(self, method: str, *params: Any, key: Callable[[Any], Any]) -> Any:
        """The answer of the first endpoint that gives one that `key` takes.

        Raises Unreachable, Reverted, and EndpointFailed where one refuses.
        """
        refused: EndpointFailed | None = None
        errors: list[str] = []
        for endpoint in self.each:
            try:
                answer = await endpoint.call(method, *params)
                key(answer)
            except EndpointFailed as exc:
                errors.append(exc.message)
                # A refusal says more than that others are down.
                if refused is None and not isinstance(exc, EndpointUnavailable):
                    refused = exc
            except (ValueError, TypeError, KeyError):
                errors.append(f"{endpoint.name}: a malformed answer")
            else:
                return answer
        raise refused or Unreachable(
            f"no endpoint of the chain answers: {'; '.join(errors)[:ERRORS_CHARS_MAX]}",
            hint="check the URL and the network, or name another endpoint with --rpc URL",
        )

    async def broadcast(self, method: str, *params: Any, key: Callable[[Any], Any]) -> Any:
        """Ask all; the answer of one that takes it. Raises EndpointFailed where none does."""

        async def give(endpoint: Endpoint) -> Any:
            answer = await endpoint.call(method, *params)
            key(answer)
            return answer

        answers = await asyncio.gather(*map(give, self.each), return_exceptions=True)
        errors = []
        for answer in answers:
            if not isinstance(answer, BaseException):
                return answer
            if not isinstance(answer, ChainError | ValueError | TypeError):
                raise answer
            errors.append(str(answer))
        raise EndpointFailed("; ".join(errors)[:ERRORS_CHARS_MAX])

    async def newest(self, tag: str) -> Block:
        """The highest block that a quorum of endpoints has reached under a tag; raises NoQuorum."""
        asked = {
            asyncio.create_task(e.call("eth_getBlockByNumber", tag, False)): e for e in self.each
        }
        blocks: dict[asyncio.Task[Any], Block] = {}
        errors: list[str] = []
        pending = set(asked)
        try:
            while pending:
                enough = len(blocks) >= self.quorum
                if enough and all(asked[task].late >= LATE_MAX for task in pending):
                    break
                done, pending = await asyncio.wait(
                    pending,
                    timeout=STRAGGLER_S if enough else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    for task in pending:
                        asked[task].late += 1
                    break
                for task in done:
                    asked[task].late = 0
                    _, value = self._vote(task, Block.parse, errors)
                    if value is not None and not isinstance(value, Reverted):
                        blocks[task] = Block.parse(value)
        finally:
            await let_go(asked)
        if len(blocks) < self.quorum:
            raise NoQuorum(
                f"{len(blocks)} of {len(self.each)} endpoints said which block is {tag}, "
                f"{self.quorum} are needed{f': {errors[0]}' if errors else ''}",
                hint="`ww auth evm status` shows them",
            )
        number = sorted((b.number for b in blocks.values()), reverse=True)[self.quorum - 1]
        same = Counter(block for block in blocks.values() if block.number == number)
        block, votes = same.most_common(1)[0]
        return block if votes >= self.quorum else await self.block(number)

    async def block(self, number: int) -> Block:
        """A block by number, on which a quorum agrees; raises NoQuorum."""
        # On its time, too: a true hash with another time would hide how old it is.
        answer = await self.agree("eth_getBlockByNumber", hex(number), False, key=Block.parse)
        block = Block.parse(answer)
        if block.number != number:
            raise NoQuorum(f"asked for block {number}, the endpoints answered with another")
        return block

    async def aclose(self) -> None:
        for endpoint in self.each:
            await endpoint.aclose()


async def let_go(tasks: Collection[asyncio.Task[Any]]) -> None:
    """End what was asked and is not needed any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Block(NamedTuple):
    """What is used of a block's header."""

    number: int
    hash: bytes
    parent: bytes
    time: int
    """Unix s."""

    @classmethod
    def parse(cls, raw: Any) -> Block:
        """From JSON; raises ValueError, KeyError, TypeError."""
        return cls(
            quantity(raw["number"]),
            fixed(raw["hash"], 32),
            fixed(raw["parentHash"], 32),
            quantity(raw["timestamp"]),
        )

    @property
    def reference(self) -> dict[str, str]:
        """As a parameter of a call at exactly this block (EIP-1898)."""
        return {"blockHash": "0x" + self.hash.hex()}


def quantity(text: Any, chars_max: int = 18) -> int:
    """A JSON-RPC quantity of at most 64 bits; raises ValueError."""
    if not isinstance(text, str) or text[:2] != "0x" or not 3 <= len(text) <= chars_max:
        raise ValueError("not a quantity")
    if not (text.isascii() and text.isalnum()):  # int() takes more than digits
        raise ValueError("not a quantity")
    return int(text, 16)


def wide(text: Any) -> int:
    """A JSON-RPC quantity of at most 256 bits; raises ValueError."""
    return quantity(text, 66)


def data(text: Any) -> bytes:
    """JSON-RPC data; raises ValueError."""
    if not isinstance(text, str) or text[:2] != "0x":
        raise ValueError("not data")
    value = bytes.fromhex(text[2:])
    if len(text) != 2 + 2 * len(value):  # fromhex() takes spaces
        raise ValueError("not data")
    return value


def fixed(text: Any, size: int) -> bytes:
    """JSON-RPC data of a known size; raises ValueError."""
    value = data(text)
    if len(value) != size:
        raise ValueError(f"{len(value)} bytes instead of {size}")
    return value
