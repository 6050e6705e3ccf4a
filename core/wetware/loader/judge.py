"""What a plugin may declare: its hooks, and what they return."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from wetware import hookspecs
from wetware.errors import PluginError
from wetware.hookspecs import PROJECT, AuthBackend, Discovery, Recorder, Service
from wetware.loader.find import NAME

if TYPE_CHECKING:
    import pluggy

    from wetware.broker.proposals import Proposal

SERVICES_PER_PLUGIN_MAX: Final = 32
HOOKS: Final = tuple(sorted(name for name in vars(hookspecs) if name.startswith("ww_")))
"""The hooks of API v1."""


def register(
    manager: pluggy.PluginManager, name: str, plugin: object
) -> dict[str, pluggy.HookImpl]:
    """Its hooks, registered by pluggy; raises PluginError where one would not be called."""
    for member in dir(plugin):
        if not member.startswith("ww_") or manager.parse_hookimpl_opts(plugin, member) is not None:
            continue
        found = inspect.getattr_static(plugin, member)
        if inspect.isroutine(found) and not hasattr(found, f"{PROJECT}_spec"):
            raise PluginError(
                f"{member} is not marked with @hookimpl" if member in HOOKS else _no_hook(member)
            )
    if (known := manager.get_name(plugin)) is not None:
        raise PluginError(f"is the same object as the plugin {known!r}")
    manager.register(plugin, name=name)
    hooks: dict[str, pluggy.HookImpl] = {}
    for caller in manager.get_hookcallers(plugin) or ():
        for impl in caller.get_hookimpls():
            if impl.plugin is not plugin or (impl.optionalhook and not caller.has_spec()):
                continue
            if not caller.has_spec():
                raise PluginError(_no_hook(caller.name))
            if impl.wrapper or impl.hookwrapper:
                raise PluginError(f"{caller.name} is a wrapper; hook API v1 has none")
            if inspect.iscoroutinefunction(impl.function):
                raise PluginError(
                    f"{caller.name} is async; a hook declares, and what it returns is async"
                )
            hooks[caller.name] = impl
    return dict(sorted(hooks.items()))


def _no_hook(name: str) -> str:
    near = difflib.get_close_matches(name, HOOKS, 1)
    also = f"did you mean {near[0]}?" if near else f"there are {', '.join(HOOKS)}"
    return f"unknown hook {name!r}; {also}"


def judge_auth(name: str, made: Any) -> AuthBackend:
    """What `ww_register_auth` returned, if it is the backend `name`; raises PluginError."""
    _keep(AuthBackend, "auth backend", made, name)
    for attribute in ("try_out", "users"):
        if not isinstance(getattr(made, attribute, ""), str):
            kind = type(made).__name__
            raise PluginError(f"returned no auth backend: {kind}.{attribute} is no text")
    backend: AuthBackend = made
    return backend


def judge_recorder(name: str, made: Any) -> Recorder:
    """What `ww_register_recorder` returned, if it is the recorder `name`; raises PluginError."""
    _keep(Recorder, "recorder", made, name)
    recorder: Recorder = made
    return recorder


def judge_discovery(made: Any) -> Discovery | None:
    """What `ww_register_discovery` returned; raises PluginError."""
    if made is not None:
        _keep(Discovery, "discovery", made)
    discovery: Discovery | None = made
    return discovery


def _keep(contract: object, what: str, made: Any, name: str | None = None) -> None:
    """Raise PluginError for what lacks a method or an attribute of a protocol, or the name."""
    if made is None:
        raise PluginError(f"returned no {what}")
    wanted = {each: callable(of) for each, of in vars(contract).items() if each[0] != "_"}
    kind = type(made).__name__
    for each in sorted(wanted, key=wanted.__getitem__, reverse=True):
        if wanted[each] and not callable(getattr(made, each, None)):
            raise PluginError(f"returned no {what}: {kind} has no method {each}()")
        if not hasattr(made, each):
            raise PluginError(f"returned no {what}: {kind} has no attribute {each}")
    if name is not None and made.name != name:
        raise PluginError(f"returned the {what} {str(made.name)[:80]!r}, not {name!r}")


def judge_services(made: Any) -> dict[str, tuple[Service, Proposal]]:
    """What `ww_register_services` returned, by name, and what it proposes; raises PluginError."""
    from wetware.broker.proposals import proposal_of  # not in every command's start

    found: dict[str, tuple[Service, Proposal]] = {}
    for service in islice(made or (), SERVICES_PER_PLUGIN_MAX + 1):
        if not isinstance(service, Service):
            raise PluginError(f"returned no service: {type(service).__name__} is no Service")
        for attribute in ("name", "interface"):
            if not hasattr(service, attribute):
                kind = type(service).__name__
                raise PluginError(f"returned no service: {kind} has no attribute {attribute}")
        name = service.name
        if not isinstance(name, str) or not NAME.match(name):
            raise PluginError(f"{name!r:.80} is not a service's name: a-z, 0-9 and _, at most 64")
        if name in found:
            raise PluginError(f"returned two services called {name!r}")
        found[name] = service, proposal_of(service)
    if len(found) > SERVICES_PER_PLUGIN_MAX:
        raise PluginError(f"returned more than {SERVICES_PER_PLUGIN_MAX} services")
    return found


def refuse_taken(what: str, names: Iterable[str], taken: Mapping[str, str]) -> None:
    """Raise PluginError for a name that is there already, in `taken`: name → of which plugin."""
    for name in names:
        if name in taken:
            raise PluginError(
                f"its {what} {name!r} has the name of one of {taken[name]!r}",
                hint="keep one of the two: [plugins] disable",
            )
