"""What the packages of this machine bring for a client: clients of services, and signers.

Not what a node serves. Entry points, ours before those of others; nothing is loaded to list them.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from wetware.base.installed import distributions
from wetware.base.log import get_logger
from wetware.broker.protocol import CORE
from wetware.rpc import Interface, known

log = get_logger("client")

CLIENT_GROUP: Final = "wetware.client.v1"
"""Entry points: service name → what an application sees as `session.NAME`, a class that takes a
reference and has its `INTERFACE`, or the interface alone."""
SIGNER_GROUP: Final = "wetware.signer.v1"
"""Entry points: proof scheme → a factory of signers for it."""

_CORE: Final = {"node": CORE.Node}
"""Services that every node has, and that need no client."""


def find(group: str, name: str) -> Any:
    """What is installed under a name; None if nothing is. Raises what its import raises."""
    found = [
        (dist, point)
        for dist in distributions()
        for point in dist.entry_points.select(group=group, name=name)
    ]
    if len(found) > 1:  # a name is in what takes a millisecond to parse
        found.sort(key=lambda of: (of[0].name != "wetware", of[0].name))
    return found[0][1].load() if found else None


@functools.cache  # a look takes milliseconds, and a program may ask for much that is not there
def services() -> frozenset[str]:
    """The services that have a client on this machine."""
    return frozenset(
        name
        for dist in distributions()
        for name in dist.entry_points.select(group=CLIENT_GROUP).names
    )


def interface_of(found: Any) -> Interface | None:
    """The interface of what `find` found for a service; None if it has none."""
    interface = getattr(found, "INTERFACE", found)
    return interface if isinstance(interface, Interface) else None


def known_interface(service: str) -> Interface | None:
    """The interface of a service's first capability; None if it is not known here."""
    if service in _CORE:
        return _CORE[service]
    try:
        return interface_of(find(CLIENT_GROUP, service))
    except Exception:  # somebody else's package that does not load
        log.debug("client.broken", service=service, exc_info=True)
        return None


def interface_of_id(id_: int) -> Interface | None:
    """The interface of an ID, of what is installed here; None if it is not known."""
    if (found := known(id_)) is None:
        for service in services():  # each brings its schema
            known_interface(service)
        found = known(id_)
    return found
