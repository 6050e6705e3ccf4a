"""A provider in this process that says whatever a test wants: what a real one must never say."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from joserfc import jws
from joserfc.jwk import ECKey, Key, RSAKey

from wetware.identity import Key as SessionKey
from wetware_auth_oidc.session import StoredSession
from wetware_auth_oidc.tokens import encoded, nonce_of, thumbprint

CLIENT = "team"
RSA, OTHER = (RSAKey.generate_key(2048, {"kid": kid, "use": "sig"}) for kid in ("r1", "r2"))
EC = ECKey.generate_key("P-256", {"kid": "e1", "use": "sig"})


class FakeProvider:
    """Its answers, which a test may replace.

    Attributes:
        issuer: Its URL.
        metadata: The discovery document.
        keys: What `jwks_uri` gives.
        people: Access token → claims; an unknown token is refused.
        raw: Path → (status, content type, body) instead of the real answer.
        asked: The paths that were asked for, in order.
        stall_s: How long it thinks before each answer.
        headers: Path → further headers of the answer.
        cookies: What came with the questions.
    """

    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}"
        names = ("authorization", "token", "userinfo", "device_authorization")
        self.metadata: dict[str, Any] = {
            "issuer": self.issuer,
            "jwks_uri": f"{self.issuer}/jwks",
            **{f"{name}_endpoint": f"{self.issuer}/{name}" for name in names},
        }
        self.keys: list[dict[str, Any]] = [key.as_dict(private=False) for key in (RSA, EC)]
        self.people: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, Any] = {"error": "invalid_grant"}
        self.raw: dict[str, tuple[int, str, bytes]] = {}
        self.asked: list[str] = []
        self.stall_s = 0.0
        self.headers: dict[str, str] = {}
        self.cookies: list[str] = []

    def claims(self, key: SessionKey, sub: str = "ada", **more: Any) -> dict[str, Any]:
        """Those of a good ID token for a session's key; None leaves one out."""
        now = time.time()
        claims = {
            "iss": self.issuer, "sub": sub, "aud": CLIENT, "iat": now, "exp": now + 3600,
            "nonce": nonce_of(key.public), "groups": ["eng"], **more,
        }  # fmt: skip
        return {name: value for name, value in claims.items() if value is not None}

    def session(self, key: SessionKey, sub: str = "ada", **more: Any) -> StoredSession:
        """One that is good; its owner is known here."""
        access = f"access-{sub}-{len(self.people)}"
        self.people[access] = {"sub": sub}
        claims = self.claims(key, sub, **more)
        return StoredSession(
            self.issuer, CLIENT, "", key.seed.hex(), signed(claims), "", access, "", claims["exp"]
        )

    def service_claims(self, key: SessionKey, sub: str = "ci", **more: Any) -> dict[str, Any]:
        """Those of a good token of a client, bound to a session's key; None leaves one out."""
        bound = {"cnf": {"jkt": thumbprint(key.public)}, "client_id": sub}
        return self.claims(key, sub, **{**bound, "nonce": None, **more})

    async def answer(self, path: str, token: str) -> tuple[int, str, bytes]:
        self.asked.append(path)
        await asyncio.sleep(self.stall_s)
        if path in self.raw:
            return self.raw[path]
        found: Any = {
            "/.well-known/openid-configuration": self.metadata,
            "/jwks": {"keys": self.keys},
            "/userinfo": self.people.get(token),
            "/token": self.tokens,
        }.get(path)
        if found is None:
            return 401, "text/plain", b"no"
        status = 400 if path == "/token" and "error" in found else 200
        return status, "application/json", json.dumps(found).encode()


@contextlib.asynccontextmanager
async def fake_provider() -> AsyncIterator[FakeProvider]:
    """One that listens on loopback for the block."""
    provider: FakeProvider | None = None

    at_work: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            assert provider is not None
            path = (await reader.readline()).decode().split(" ")[1]
            token, size = "", 0
            while line := (await reader.readline()).strip():
                name, _, value = line.decode().partition(": ")
                if name.lower() == "authorization":
                    token = value.removeprefix("Bearer ")
                if name.lower() == "cookie":
                    provider.cookies.append(value)
                if name.lower() == "content-length":
                    size = int(value)
            await reader.readexactly(size)
            status, kind, body = await provider.answer(path, token)
            head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            head += provider.headers.get(path, "")
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        at_work.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        provider = FakeProvider(server.sockets[0].getsockname()[1])
        try:
            yield provider
        finally:
            for task in at_work:
                task.cancel()
            await asyncio.gather(*at_work, return_exceptions=True)
            await asyncio.sleep(0)  # what was closed is let go of in the next turn


def signed(claims: dict[str, Any], key: Key = RSA, **header: Any) -> str:
    """A compact JWS of some claims."""
    alg = {"RSA": "RS256", "EC": "ES256"}[key.key_type]
    full = {"alg": alg, "kid": key.kid, **header}
    head = {name: value for name, value in full.items() if value is not None}
    return jws.serialize_compact(head, json.dumps(claims).encode(), key, algorithms=[alg])


def unsigned(claims: dict[str, Any]) -> str:
    """With `alg: none`."""
    return ".".join((*_parts({"alg": "none"}, claims), ""))


def by_secret(claims: dict[str, Any], secret: bytes) -> str:
    """With HS256, as who takes a public key for a secret would verify it."""
    text = ".".join(_parts({"alg": "HS256", "kid": RSA.kid}, claims))
    return f"{text}.{encoded(hmac.digest(secret, text.encode(), 'sha256'))}"


def _parts(*parts: Any) -> list[str]:
    return [encoded(json.dumps(part).encode()) for part in parts]


@contextlib.contextmanager
def fake_in_thread() -> Iterator[FakeProvider]:
    """One with a loop of its own, for tests that run theirs."""
    ready: queue.Queue[tuple[FakeProvider, asyncio.AbstractEventLoop, asyncio.Event]] = (
        queue.Queue()
    )

    async def main() -> None:
        async with fake_provider() as provider:
            end = asyncio.Event()
            ready.put((provider, asyncio.get_running_loop(), end))
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    provider, loop, end = ready.get(timeout=10)
    try:
        yield provider
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
