"""Interfaces of services, as far as this machine knows them.

Not what a node serves, but what is installed here: the core's own services, and those with a client
(entry points `wetware.client.v1`). For describing and checking before a node is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from wetware.log import get_logger

if TYPE_CHECKING:
    from wetware.rpc import Interface

log = get_logger("client")

_CORE: Final = {"node": "Node", "cluster": "Cluster", "grants": "Grants", "audit": "Audit"}


def known_interface(service: str) -> Interface | None:
    """The interface of a service's bootstrap capability; None if it is not known here."""
    from wetware.client import _client_class
    from wetware.protocol import CORE

    if service in _CORE:
        found: Any = getattr(CORE, _CORE[service], None)
    else:
        try:
            found = getattr(_client_class(service), "INTERFACE", None)
        except AttributeError:  # there is no client of that name
            return None
        except Exception:  # somebody else's package that does not load
            log.debug("client.broken", service=service, exc_info=True)
            return None
    from wetware.rpc import Interface

    return found if isinstance(found, Interface) else None
