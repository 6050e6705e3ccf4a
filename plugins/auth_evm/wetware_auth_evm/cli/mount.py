"""`ww auth evm`: mounted for little, declared when it is used.

Declaring its two dozen commands takes 20 ms, which no other command of `ww` is to pay.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from wetware.cli.app import examples


class _Evm(TyperGroup):
    """The group whose commands are in `declarations`."""

    _declared: Any = None

    @property
    def commands(self) -> Any:
        """Name → command, as click asks for them."""
        if self._declared is None:
            from wetware_auth_evm.cli import declarations  # noqa: F401  # it declares them
            from wetware_auth_evm.cli.declaring import evm_app

            self._declared = typer.main.get_group(evm_app).commands
        return self._declared

    @commands.setter
    def commands(self, _: Any) -> None:
        """Typer sets the commands that were mounted: none."""


evm_app = typer.Typer(
    cls=_Evm, help="Roles in a smart contract on an EVM chain.", no_args_is_help=True
)


def mount(app: typer.Typer) -> None:
    """Mount `auth evm`."""
    auth = typer.Typer()
    shown = examples("ww auth evm login", "ww auth evm list")
    auth.add_typer(evm_app, name="evm")
    app.add_typer(auth, name="auth", epilog=shown)
