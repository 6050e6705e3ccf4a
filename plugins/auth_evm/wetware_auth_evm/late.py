"""Has py-evm prepare the pairing of BLS12-381 when a contract asks for one, not at its import.

That takes a third of a second, a third of the start of the try-out chain, and few contracts call
the functions of EIP-2537. Import this module before `eth`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

_NAME: Final = "eth.precompiles.bls12_381"


class _Late(ModuleType):
    """In the place of the module: each function of it, imported when it is called."""

    def __getattr__(self, function: str) -> Callable[..., Any]:
        if function.startswith("__"):
            raise AttributeError(function)

        def run(*args: Any) -> Any:
            if sys.modules[_NAME] is self:
                del sys.modules[_NAME]
            return getattr(importlib.import_module(_NAME), function)(*args)

        return run


if _NAME not in sys.modules:
    sys.modules[_NAME] = _Late(_NAME)
