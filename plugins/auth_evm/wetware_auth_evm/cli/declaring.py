"""How a command of `ww auth evm` is declared: by its own options, and those that many share."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from wetware_auth_evm.cli.given import Where, Write

if TYPE_CHECKING:
    from types import ModuleType

evm_app = typer.Typer(rich_markup_mode=None)


def _shared(name: str, kind: Any, default: Any, *flags: str, **settings: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*flags, **settings)],
    )


_WHERE: Final = (
    _shared(
        "rpc",
        list[str] | None,
        None,
        "--rpc",
        metavar="URL",
        help="A JSON-RPC endpoint of the chain; repeatable.",
    ),
    _shared("contract", str, "", "--contract", metavar="ADDRESS", help="The contract."),
    _shared("chain_id", int, 0, "--chain-id", min=0, metavar="N", help="The chain (EIP-155)."),
    _shared(
        "scope",
        str,
        "",
        "--scope",
        metavar="NAME",
        help="The cluster's scope in the contract; ROOT holds in every one.",
    ),
    _shared(
        "profile",
        Path | None,
        None,
        "--profile",
        metavar="FILE",
        help="What `ww auth evm export-profile` wrote.",
    ),
)
_WRITE: Final = (
    _shared(
        "calldata",
        bool,
        False,
        "--calldata",
        help="Print the transaction as JSON, for a Safe or a hardware wallet, and send nothing.",
    ),
    _shared("wait", str, "final", "--wait", metavar="final|mined|none", help="For what to wait."),
    _shared(
        "timeout", float | None, None, "--timeout", metavar="SECONDS", help="How long to wait."
    ),
    _shared(
        "nonce",
        int | None,
        None,
        "--nonce",
        min=0,
        metavar="N",
        help="Number of the transaction, to replace one that is stuck.",
    ),
    _shared("fee_gwei", float | None, None, "--fee-gwei", metavar="N", help="At most per gas."),
    _shared("json", bool, False, "--json", help="Print JSON."),
)


def command(
    name: str, done_in: str, *, where: bool = True, writes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mount what is declared: the function of the same name in the module `done_in` does it.

    It is given, beside what is declared, `where` and, if it writes, `write`: from their options.
    """
    groups: dict[str, tuple[type, tuple[inspect.Parameter, ...]]] = {}
    if where:
        groups["where"] = Where, _WHERE
    if writes:
        groups["write"] = Write, _WRITE

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
