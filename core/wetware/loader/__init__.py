"""Find → select → load → check config → call hooks → report.

An own loader over entry points, because pluggy's stops at the first broken plugin with nothing
registered and skips a duplicate name silently. Here every plugin stands alone: an exception, a
`sys.exit` or a hang in its import or in one of its hooks makes *it* failed, and the others go on.

This is fault isolation and not security: an installed plugin has the authority of the process, and
code that never returns to the interpreter, or ends the process, cannot be stopped from here. Load
only what you trust, and name it in `[plugins] enable`.
"""

from wetware.loader.find import Offer, find, is_plugin_name
from wetware.loader.load import CLI, INSPECT, NODE, Plugins, Policy, load
from wetware.loader.report import Plugin, State

__all__ = [
    "CLI",
    "INSPECT",
    "NODE",
    "Offer",
    "Plugin",
    "Plugins",
    "Policy",
    "State",
    "find",
    "is_plugin_name",
    "load",
]
