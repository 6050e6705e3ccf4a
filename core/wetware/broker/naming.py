"""Constraints against a service's schema: what can be constrained, and what one object of it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.base import subjects
from wetware.broker.methods import ANY, all_methods, matches, patterns_of
from wetware.broker.where import Where, bad_where, kinds_for
from wetware.errors import InvalidArgument
from wetware.rpc import Ref

if TYPE_CHECKING:
    from wetware.rpc import Interface, Method


def constrainable(interface: Interface) -> list[tuple[Method, str]]:
    """The parameters that can be constrained, of an interface and those that it leads to."""
    return [
        (method, param)
        for method in all_methods(interface)
        for param in method.params
        if param in method.constrainable
    ]


def binds(where: Where, interface: Interface) -> bool:
    """Whether a constraint is about any method of a service.

    One that is about none, e.g. because a release of the service renamed a parameter, must not let
    everything pass: whoever enforces it denies the service then.
    """
    return any(map(where.applies, all_methods(interface)))


def check_against(
    constraints: Iterable[Where], service: str, interface: Interface, patterns: frozenset[str]
) -> None:
    """Raise InvalidArgument for a constraint that binds nothing or cannot be judged.

    Args:
        constraints: What is to be granted; those of other services are not looked at.
        service: Of this service.
        interface: The service's.
        patterns: The methods that are granted.
    """
    found = constrainable(interface)
    granted = [(m, param) for m, param in found if matches(patterns, m.interface.name, m.name)]
    for where in constraints:
        if where.service not in (ANY, service):
            continue
        about = [m for m, param in granted if param == where.param and where.applies(m)]
        if not about:
            if granted:
                hint = f"these can: {_listed(granted)}"
            elif found:
                hint = f"with their methods these can: {_listed(found)}"
            else:
                hint = f"nothing of {service} can be constrained"
            raise bad_where(
                f"{where.text!r} names no parameter that can be constrained, of what is granted of "
                f"{service}",
                hint,
            )
        for method in about:
            if where.compile(method) is None:
                kind = method.param_kinds[where.param]
                raise bad_where(
                    f"{where.text!r} does not fit {method.where}, where {where.param} is {kind}",
                    f"{kind} takes {', '.join(kinds_for(kind)) or 'no constraint'}",
                )


def _listed(found: list[tuple[Method, str]]) -> str:
    return ", ".join(f"{m.where}:{param} ({m.param_kinds[param]})" for m, param in found)


def one_object(
    service: str, interface: Interface, name: str, asked: frozenset[str], mine: frozenset[str]
) -> tuple[frozenset[str], Where]:
    """What `SERVICE:NAME` grants: methods, and the constraint that holds them to the object NAME.

    A NAME with a `*` is a glob, and one that ends with the token `>` a pattern, of subjects.

    Of the service's own interface, and its heirs, these are the methods that take the name; of what
    those lead to, all, except where a parameter of that name cannot be constrained. So whatever the
    methods that are granted are called on, it is the object, or came from it.

    Args:
        service: Of this service.
        interface: The service's.
        name: NAME.
        asked: Patterns: of these methods only, and of the one that gives what they are called on.
        mine: Patterns of who grants it.

    Raises InvalidArgument where there is no such object, or `asked` is beyond it.
    """
    param = interface.naming
    if not name:  # such as an unset variable of a shell leaves
        raise bad_where(f"{service}: names no object", f"write {service} alone for all of it")
    if param is None:
        raise bad_where(
            f"{service} has no named objects", f"write --where, or {service} without :{name[:40]}"
        )
    kinds = {method.param_kinds[param] for method in all_methods(interface) if method.named}
    if kinds == {"subject"} and name.rpartition(".")[2] == subjects.REST:
        kind = "subject"
    else:
        kind = "glob" if "*" in name else "equals"
    where = Where.parse(f"{param}={kind}:{name}", service)

    def of_it(method: Method) -> bool:
        if not matches(mine, method.interface.name, method.name):
            return False
        if param in method.params:
            return where.compile(method) is not None
        return not method.interface.is_a(interface)

    found = [m for m in all_methods(interface, of_it) if of_it(m)]
    if not found:
        raise bad_where(
            f"{where.text!r} is about nothing that you have of {service}",
            f"`ww services {service} --describe` shows what can be shared as {service}:NAME",
        )
    chosen = [m for m in found if not asked or matches(asked, m.interface.name, m.name)]
    for pattern in sorted(asked):
        if not any(matches(frozenset({pattern}), m.interface.name, m.name) for m in chosen):
            raise InvalidArgument(
                f"{pattern!r} is not about one object {param.upper()} of {service}",
                hint=f"share it apart, without :{name[:40]}; about one are "
                f"{', '.join(m.where for m in found)}",
                code="invalid.methods",
            )
    chosen += _ways(interface, chosen, found)
    return patterns_of({service: [m.where for m in chosen]})[service], where


async def object_of(service: Ref, name: str) -> Ref:
    """The object NAME of a service, by its method that gives one for a name.

    What else that method takes are flags, which are left off. Raises InvalidArgument where there is
    no such method, and what that raises.
    """
    interface = service.interface
    for method in interface.methods.values() if interface is not None else ():
        flags = [kind for name, kind in method.param_kinds.items() if name != method.named]
        if method.named and len(method.gives) == 1 and set(flags) <= {"bool"}:
            (given,) = (await service.call(method.name, **{method.named: name})).values()
            if isinstance(given, Ref):
                return given
    raise InvalidArgument(
        f"{interface.name if interface else 'it'} has no objects with names",
        hint="leave out what is behind the colon",
    )


def _ways(interface: Interface, chosen: list[Method], found: list[Method]) -> list[Method]:
    """The methods that give what `chosen` are called on, where none of `chosen` does.

    One that gives anything else is not added, and where there are several none is: which one was
    meant, only who asks knows. Raises InvalidArgument.
    """
    wanted = {method.interface for method in chosen}
    lost = wanted.difference(interface.reachable(lambda m: m in chosen))
    givers = [m for m in found if m.interface == interface and m.gives and m.gives <= wanted]
    ways = {}
    for goal in lost:
        to_it = [method for method in givers if goal in method.gives]
        if len(to_it) == 1:
            ways[to_it[0].where] = to_it[0]
    added = list(ways.values())
    lost = wanted.difference(interface.reachable(lambda m: m in chosen or m in added))
    if lost:

        def leads(method: Method) -> bool:
            to = method.interface.reachable(lambda other: other is method)
            return method.interface not in lost and not lost.isdisjoint(to)

        leading = [method.where for method in found if leads(method)]
        raise InvalidArgument(
            f"it has to be said how to get at {', '.join(sorted(i.name for i in lost))}",
            hint=f"name one of these methods as well: {', '.join(leading)}",
            code="invalid.methods",
        )
    return added
