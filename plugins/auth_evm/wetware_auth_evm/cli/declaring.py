"""How a command of `ww auth evm` is declared: by its own options, and those that many share."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from wetware_auth_evm.cli.given import Where, Write

if TYPE_CHECKING:
    from types import ModuleType

evm_app = typer.Typer(rich_markup_mode=None)


def _options(kind: type) -> tuple[inspect.Parameter, ...]:
    """The fields of a dataclass, as keyword parameters that typer understands."""
    fields = inspect.signature(kind, eval_str=True).parameters.values()
    return tuple(field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in fields)


def command(
    name: str, done_in: str, *, where: bool = True, writes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mount what is declared: the function of the same name in the module `done_in` does it.

    It is given, beside what is declared, `where` and, if it writes, `write`: from their options.
    """
    groups: dict[str, tuple[type, tuple[inspect.Parameter, ...]]] = {}
    if where:
        groups["where"] = Where, _options(Where)
    if writes:
        groups["write"] = Write, _options(Write)

    def mount_it(declared: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(declared, eval_str=True).parameters.values()
        parameters = [*own, *(p for _, shared in groups.values() for p in shared)]

        def run(**given: Any) -> None:
            for group, (kind, shared) in groups.items():
                given[group] = kind(**{p.name: given.pop(p.name) for p in shared})
            getattr(_module(done_in), declared.__name__)(**given)

        run.__doc__, run.__name__ = declared.__doc__, declared.__name__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        evm_app.command(name)(run)
        return declared

    return mount_it


def _module(name: str) -> ModuleType:
    """A module with commands; PluginError with the remedy where its packages are missing."""
    try:
        return importlib.import_module(f"wetware_auth_evm.cli.{name}")
    except ImportError as exc:
        from wetware.errors import PluginError

        raise PluginError(
            f"`ww auth evm` needs packages that are not installed ({exc.name})",
            hint="pip install 'wetware[evm]'",
        ) from None
