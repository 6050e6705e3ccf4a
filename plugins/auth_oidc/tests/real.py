"""A real OpenID provider (npm's oidc-provider) in a process, and people who log in at it."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest

HERE = Path(__file__).parent / "provider"
needs_provider = pytest.mark.skipif(
    shutil.which("node") is None or not (HERE / "node_modules").is_dir(),
    reason="no oidc-provider: npm ci --prefix plugins/auth_oidc/tests/provider",
)
_FORM = re.compile(r'<form[^>]*action="([^"]*)"[^>]*>(.*?)</form>', re.DOTALL)
_INPUT = re.compile(r"<input[^>]*>")
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class RealProvider:
    """The process.

    Attributes:
        issuer: Its URL.
    """

    def __init__(self, env: Mapping[str, str] | None = None, port: int = 0) -> None:
        self._process = subprocess.Popen(
            ["node", str(HERE / "provider.mjs"), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.issuer = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # the library talks there, too
            if line.startswith("> "):
                return line.removeprefix("> ").strip()
        raise AssertionError("the provider ended")

    def accounts(self, **accounts: Mapping[str, Any]) -> None:
        """Who there is, by ID, with their claims: from now on these alone."""
        self._tell({"accounts": accounts})

    def rotate(self) -> None:
        """Sign with a new key, and publish that one alone."""
        self._tell({"rotate": True})

    def _tell(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        assert self._answer() == "ok"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def real_provider(**env: str) -> Iterator[RealProvider]:
    provider = RealProvider(env)
    try:
        yield provider
    finally:
        provider.end()


def click_through(url: str, who: str) -> str:
    """What a person does in a browser: open a page, say who they are, agree. The last address."""
    with httpx.Client(timeout=30) as browser:
        page = browser.get(url)
        for _ in range(20):
            if page.is_redirect:
                url = urljoin(str(page.url), page.headers["location"])
                try:
                    page = browser.get(url)
                except httpx.ConnectError:
                    return url
                continue
            form = _FORM.search(page.text)
            if form is None:
                return str(page.url)
            fields = {}
            for each in _INPUT.findall(form[2]):
                found = dict(_ATTRIBUTE.findall(each))
                if name := found.get("name"):
                    fields[name] = html.unescape(found.get("value", ""))
            for name in ("login", "password"):
                if name in fields or f'name="{name}"' in form[2]:
                    fields[name] = who
            page = browser.post(urljoin(str(page.url), html.unescape(form[1])), data=fields)
    raise AssertionError(f"no end of forms: {page.text[:500]}")
