"""The terms that a holder asks for, as a child of their grant may have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from wetware.broker.fences import Fence
from wetware.broker.grants import SESSION_SERVICE, Grant
from wetware.broker.methods import ANY, SERVICES_MAX, known_patterns, patterns_of
from wetware.broker.naming import check_against, one_object
from wetware.broker.terms import Terms
from wetware.broker.values import Rate
from wetware.broker.where import WHERE_MAX, Where
from wetware.errors import Amplification, InvalidArgument, Unsupported

if TYPE_CHECKING:
    from wetware.broker.broker import Broker

TERMS_CHARS_MAX: Final = 4096
"""Of all constraints of one grant, so that `grants_max` of them fit in memory."""
EXPIRES_S_MAX: Final = 100 * 365 * 86_400.0
SEALED: Final = frozenset(
    f"Session.{name}" for name in ("whoami", "services", "open", "logout", "list", "why", "explain")
)
"""What a session can do that is not to be passed on."""


def terms_from_struct(wire: Mapping[str, Any], parent: Grant, broker: Broker) -> Terms:
    """The struct Terms for a child of `parent`.

    Raises InvalidArgument for what is malformed, and for a constraint that binds nothing;
    Unsupported "unsupported.fence".
    """
    _check_size(wire)
    where = [Where.parse(w["text"], w["service"] or ANY) for w in wire["where"]]
    services: dict[str, frozenset[str]] | None = None
    if wire["services"]:
        services = _services(wire["services"], where, parent, broker)
    if wire["sealed"] or services is not None:
        services = dict(parent.services) if services is None else services
        keep = services.get(SESSION_SERVICE, parent.patterns(SESSION_SERVICE))
        if wire["sealed"]:
            keep = SEALED if keep & {ANY, "Session.*"} else SEALED & keep
        services[SESSION_SERVICE] = keep
    seconds = wire["expires_in_s"]
    if not 0 <= seconds <= EXPIRES_S_MAX:
        raise InvalidArgument(
            f"an end in {seconds:g} s", hint="write e.g. 1h", code="invalid.duration"
        )
    granted = parent.services if services is None else services
    for each in where:
        _check_binds(each, granted, broker)
    return Terms(
        services=services,
        where=tuple(where),
        expires_at=parent.tree.clock.time() + seconds if seconds else None,
        rate=Rate.parse(wire["rate"]) if wire["rate"] else None,
        calls=wire["calls"] or None,
        bytes=wire["bytes"] or None,
        fence=_fence(wire["fence"], granted, broker) if wire["fence"] else None,
    )


def _check_size(wire: Mapping[str, Any]) -> None:
    """Before anything is looked at: the work, and what is kept, are bounded."""
    characters = sum(len(w["text"]) for w in wire["where"])
    characters += sum(len(item["name"]) for item in wire["services"])
    for what, found, limit in (
        ("services", len(wire["services"]), SERVICES_MAX),
        ("constraints", len(wire["where"]), WHERE_MAX),
        ("characters of constraints", characters, TERMS_CHARS_MAX),
    ):
        if found > limit:
            raise _bad(f"{found} {what}; {limit} are allowed")


def _services(
    asked: list[dict[str, Any]], where: list[Where], parent: Grant, broker: Broker
) -> dict[str, frozenset[str]]:
    """Service → patterns; `SERVICE:NAME` adds to `where` what holds it to the object."""
    services: dict[str, frozenset[str]] = {}
    everything = any(item["name"] == ANY for item in asked)
    for item in asked:
        name, colon, of = item["name"].partition(":")
        if colon and everything:
            raise _bad(
                f"{ANY!r} is of every service, so beside it {item['name'][:80]!r} is not held "
                "to the object",
                f"make a grant for each, or name services instead of {ANY!r}",
            )
        mine, patterns = parent.patterns(name), patterns_of({name: item["methods"]})[name]
        if not mine:
            raise Amplification(
                f"you have nothing of {name!r} to pass on", hint="`ww services` shows what"
            )
        if name in services:
            raise _bad(f"{name!r} is named twice", "make a grant for each object")
        _check_known(name, patterns, mine, broker)
        services[name] = patterns or mine
        if colon:
            interface = broker.service(name).interface
            services[name], held = one_object(name, interface, of, patterns, mine)
            where.append(held)
    return services


def _check_known(name: str, asked: frozenset[str], mine: frozenset[str], broker: Broker) -> None:
    """What is passed on by name exists: else a typing error makes a grant of nothing."""
    if name in (ANY, SESSION_SERVICE):
        return
    known = known_patterns(broker.service(name).interface)
    for pattern in sorted(asked - known - mine - {ANY}):
        raise InvalidArgument(
            f"{pattern!r} is no method of {name}",
            hint=f"`ww services {name} --describe` shows them",
            code="invalid.methods",
        )


def _check_binds(where: Where, granted: Mapping[str, frozenset[str]], broker: Broker) -> None:
    """A constraint has to bind something of what is granted."""
    names = set(broker.services) if ANY in granted else granted.keys() & broker.services.keys()
    everywhere = granted.get(ANY, frozenset())
    failure = InvalidArgument(
        f"{where.text!r} is about no service that is granted",
        hint="`ww services` shows them",
        code="invalid.where",
    )
    for name in sorted(names - {SESSION_SERVICE}):
        if where.service in (ANY, name):
            patterns = granted.get(name, frozenset()) | everywhere
            try:
                check_against([where], name, broker.services[name].interface, patterns)
            except InvalidArgument as exc:
                failure = exc
            else:
                return
    raise failure


def _fence(token: bytes, granted: Mapping[str, frozenset[str]], broker: Broker) -> Fence:
    """A token, for services of which this node sees all calls; raises Unsupported for others."""
    fence = Fence.decode(token)
    for name in sorted(granted.keys() - {SESSION_SERVICE}):
        service = broker.services.get(name)
        if service is None or service.entries != "one":
            raise Unsupported(
                f"no fencing token holds anybody off {name!r}: it is not declared to be entered "
                "at one node alone, so no broker sees all calls of it",
                hint="fence a service that is, by name; keys and names take `fence=held`",
                code="unsupported.fence",
            )
    return fence


def _bad(what: str, hint: str = "") -> InvalidArgument:
    return InvalidArgument(what, hint=hint, code="invalid.terms")
