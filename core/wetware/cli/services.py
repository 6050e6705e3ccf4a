"""`ww services`: what may be opened, what its methods take, and what can be constrained."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wetware.cli.app import Json, note, out, out_json, run_client, table
from wetware.errors import NotFound

if TYPE_CHECKING:
    from wetware.client import ServiceInfo
    from wetware.rpc import Interface


def services_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One service.")] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="What each method takes, and can be held to.")
    ] = False,
    json: Json = False,
) -> None:
    """Log in, and show the services that you may open, with the methods that you may call."""
    found = run_client(lambda session: session.services())
    if name is not None:
        chosen = tuple(info for info in found if info.name == name)
        if not chosen:
            have = ", ".join(info.name for info in found) or "none"
            raise NotFound(
                f"there is no service {name!r} that you may open; there are: {have}",
                hint="`ww whoami` shows your roles",
            )
        found = chosen
    if json:
        out_json([_as_dict(info, describe=describe) for info in found])
    elif describe:
        for info in found:
            _describe(info)
    else:
        rows = [(info.name, info.interface, " ".join(info.methods)) for info in found]
        table(("service", "interface", "methods"), rows)


def _as_dict(info: ServiceInfo, *, describe: bool) -> dict[str, Any]:
    data: dict[str, Any] = asdict(info)
    if describe:
        interface = _interface(info)
        data["described"] = None if interface is None else _described(info, interface)
    return data


def _described(info: ServiceInfo, interface: Interface) -> list[dict[str, Any]]:
    """The methods that may be called, of the service's interface and those it leads to."""
    from wetware.broker.methods import all_methods, matches
    from wetware.broker.where import kinds_for

    patterns = frozenset(info.methods)
    return [
        {
            "method": method.where,
            "takes": {param: method.param_kinds[param] for param in method.params},
            "returns": method.results,
            "constrainable": {
                param: kinds_for(method.param_kinds[param])
                for param in method.params
                if param in method.constrainable
            },
            "name": interface.naming if interface.naming in method.constrainable else None,
        }
        for method in all_methods(interface)
        if matches(patterns, method.interface.name, method.name)
    ]


def _interface(info: ServiceInfo) -> Interface | None:
    from wetware.client.installed import known_interface

    found = known_interface(info.name)
    return found if found is not None and found.name == info.interface else None


def _describe(info: ServiceInfo) -> None:
    out(f"{info.name}: {info.interface}")
    if (interface := _interface(info)) is None:
        note(f"what {info.name} takes is not known here: there is no client for {info.interface}")
        out(f"  {' '.join(info.methods)}")
    else:
        rows = [
            (
                method["method"],
                ", ".join(f"{param} {kind}" for param, kind in method["takes"].items()) or "-",
                ", ".join(method["constrainable"]) or "-",
                f"{info.name}:{method['name'].upper()}" if method["name"] else "",
            )
            for method in _described(info, interface)
        ]
        table(("method", "takes", "can be constrained", "shared as"), rows)
    out()
