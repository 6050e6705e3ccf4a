"""What the broker's tests are made of: a clock, methods without a schema, roots."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from wetware.broker.grants import Grant
from wetware.broker.limits import BrokerLimits
from wetware.broker.terms import Terms
from wetware.broker.tree import Tree
from wetware.broker.where import Where
from wetware.hookspecs import RoleProfile
from wetware.identity import Principal

ADA = Principal("local", "ada")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Method(SimpleNamespace):
    __hash__ = object.__hash__


_METHODS: dict[str, Any] = {}


def method(name: str, **kinds: str) -> Any:
    """A schema's method; the parameters in `kinds` can be constrained."""
    interface, _, short = name.partition(".")
    return _METHODS.setdefault(
        name,
        Method(
            name=short,
            interface=SimpleNamespace(name=interface, lineage=frozenset({interface})),
            where=name,
            params=tuple(kinds),
            constrainable=frozenset(kinds),
            param_kinds=kinds,
            named=None,
            packed=None,
        ),
    )


def tree(clock: Clock | None = None, **limits: int) -> Tree:
    return Tree(clock or Clock(), limits=BrokerLimits(**limits))


def root(on: Tree | None = None, role: str = "r", **services: set[str]) -> Grant:
    profile = RoleProfile({name: frozenset(patterns) for name, patterns in services.items()})
    return (on or tree()).root(ADA, role, profile)


def narrow(**services: list[str]) -> Terms:
    return Terms(services={name: frozenset(patterns) for name, patterns in services.items()})


def task() -> Any:
    return asyncio.get_running_loop().create_future()


JOIN = method("PubSub.join", topic="text")
PUBLISH = method("Topic.publish", data="data")


def where(*texts: str, service: str = "*") -> Terms:
    return Terms(where=tuple(Where.parse(text, service) for text in texts))


def call(grant: Grant, called: Any, **args: object) -> None:
    """A call that ends at once."""
    running = task()
    assert grant.enter(called, args, running) is None
    grant.leave(running)
