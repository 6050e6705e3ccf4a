"""`ww services`: what may be opened, what its methods take, and what can be constrained.

`python -m wetware.cli.services` prints the list in docs/reference/constraints.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from wetware.cli.app import note, out, out_json, run_client, table
from wetware.errors import NotFound

if TYPE_CHECKING:
    from wetware.client import ServiceInfo, Session
    from wetware.rpc import Interface, Method

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

BUNDLED: Final = ("auth_local", "cluster", "grants", "node", "pubsub")
"""Services that come with the distribution and are on every node."""


def services_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One service.")] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="What each method takes, and can be held to.")
    ] = False,
    json: Json = False,
) -> None:
    """Log in, and show the services that you may open, with the methods that you may call."""

    async def work(session: Session) -> tuple[ServiceInfo, ...]:
        return await session.services()

    found = run_client(work)
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
    data: dict[str, Any] = {
        "name": info.name,
        "interface": info.interface,
        "methods": list(info.methods),
    }
    if describe:
        interface = _interface(info)
        data["described"] = (
            None
            if interface is None
            else [_method(m, interface.naming) for m in _granted(info, interface)]
        )
    return data


def _method(method: Method, naming: str | None) -> dict[str, Any]:
    from wetware.broker.terms import kinds_for

    return {
        "method": method.where,
        "takes": {param: method.param_kinds[param] for param in method.params},
        "returns": list(method.results),
        "constrainable": {
            param: list(kinds_for(method.param_kinds[param]))
            for param in method.params
            if param in method.constrainable
        },
        "name": naming if naming in method.constrainable else None,
    }


def _interface(info: ServiceInfo) -> Interface | None:
    from wetware.client.installed import known_interface

    found = known_interface(info.name)
    return found if found is not None and found.name == info.interface else None


def _granted(info: ServiceInfo, interface: Interface) -> Iterator[Method]:
    """The methods that may be called, of the service's interface and those it leads to."""
    from wetware.broker.grants import matches

    patterns = frozenset(info.methods)
    for reached in interface.reachable():
        for method in reached.methods.values():
            if matches(patterns, reached.name, method.name):
                yield method


def _describe(info: ServiceInfo) -> None:
    out(f"{info.name}: {info.interface}")
    interface = _interface(info)
    if interface is None:
        note(f"what {info.name} takes is not known here: there is no client for {info.interface}")
        out(f"  {' '.join(info.methods)}")
        out("")
        return
    naming = interface.naming or ""
    rows = [
        (
            method.where,
            ", ".join(f"{p} {method.param_kinds[p]}" for p in method.params) or "-",
            ", ".join(p for p in method.params if p in method.constrainable) or "-",
            f"{info.name}:{naming.upper()}" if naming in method.constrainable else "",
        )
        for method in _granted(info, interface)
    ]
    table(("method", "takes", "can be constrained", "shared as"), rows)
    out("")


def reference() -> str:
    """What can be constrained of the bundled services, as Markdown."""
    from wetware.broker.terms import constrainable, kinds_for
    from wetware.client.installed import known_interface

    lines = ["| service | method | parameter | type | kinds |", "|---|---|---|---|---|"]
    for service in BUNDLED:
        interface = known_interface(service)
        items = [] if interface is None else constrainable(interface)
        if not items:
            lines.append(f"| `{service}` | – | | | |")
        for item in items:
            shared = f" (`{service}:{item.param.upper()}` in `ww share`)" if item.named else ""
            kinds = " ".join(f"`{kind}`" for kind in kinds_for(item.kind))
            lines.append(
                f"| `{service}` | `{item.method.where}` | `{item.param}`{shared} | {item.kind} "
                f"| {kinds} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
