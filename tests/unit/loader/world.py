"""Plugins that are made here, as if installed."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from wetware import config, hookspecs, loader
from wetware.hookspecs import GROUP, hookimpl
from wetware.loader import Offer, Plugin, Plugins, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wetware.config import Config

NODE = Policy(strict=True, configure=True, hook_s_max=5.0)
CHECK = Policy(strict=False, configure=True, hook_s_max=5.0)
SHORT = Policy(strict=False, configure=True, hook_s_max=0.3)

AUTH_METHODS = (
    "run",
    "authenticate",
    "roles",
    "profile",
    "join_document",
    "admit_node",
    "findings",
    "watch",
)


class Backend:
    schemes, founding, epoch, services = ("s",), b"f", 1, ()

    def __init__(self, name: str = "local") -> None:
        self.name = name

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in AUTH_METHODS:
            return lambda *_: None
        raise AttributeError(name)


class Recorder:
    services = ()

    def __init__(self, name: str = "audit", **given: Any) -> None:
        self.name, self.given = name, given

    async def run(self, *, task_status: Any) -> None: ...

    async def admit(self, record: Any) -> None: ...

    def report(self, record: Any, *, ending: bool) -> None: ...

    async def written(self) -> None: ...

    def findings(self) -> tuple[()]:
        return ()


def sign_as(name: str) -> Callable[[bytes], bytes]:
    return lambda data: name.encode() + data


class Service(hookspecs.Service):
    interface: Any = None

    def __init__(self, name: str) -> None:
        self.name = name

    def bootstrap(self, principal: object) -> Any: ...


def service(name: str) -> Service:
    return Service(name)


def context(name: str, settings: object) -> Any:
    return SimpleNamespace(name=name, config=settings)


class World:
    """Plugins that are modules made here, as if installed."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self._monkeypatch = home, monkeypatch
        self.offers: list[Offer] = []

    def plugin(
        self,
        name: str,
        *,
        dist: str = "",
        group: str = GROUP,
        requires: tuple[str, ...] = (),
        extras: tuple[str, ...] = (),
        **hooks: object,
    ) -> None:
        """An installed plugin; `wetware` as dist makes it a bundled one."""
        dist = dist or f"ww-{name}"
        module = types.ModuleType(f"{dist.replace('-', '_')}_{name}_{len(self.offers)}")
        for hook, function in hooks.items():
            setattr(module, hook, hookimpl(function))
        self._monkeypatch.setitem(sys.modules, module.__name__, module)
        self.offers.append(Offer(group, name, module.__name__, dist, "1.0", extras, requires))

    def config(
        self, text: str = "", env: Mapping[str, str] | None = None, **node: object
    ) -> Config:
        (self.home / "ww.toml").write_text(text)
        flags = {f"node.{key}": value for key, value in node.items()}
        return config.load(flags, env={"WW_HOME": str(self.home), **(env or {})})

    def load(self, text: str = "", policy: Policy = CHECK, **node: object) -> Plugins:
        offers = sorted(self.offers, key=lambda o: (not o.bundled, o.dist, o.name))
        return loader.load(self.config(text, **node), policy, offers=tuple(offers))


def status(loaded: Plugins, name: str, dist: str = "") -> Plugin:
    (found,) = [s for s in loaded.report if s.name == name and dist in s.offer.dist]
    return found


def boom(ctx: object) -> object:
    raise OSError("no chain")
