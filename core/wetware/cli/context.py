"""`ww context`: which cluster is expected at which node."""

from __future__ import annotations

from typing import Annotated

import typer

from wetware.cli.app import note, out_json

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

context_app = typer.Typer(
    no_args_is_help=True, help="What this machine remembers of nodes and their clusters."
)


@context_app.callback()
def _context() -> None:
    """What this machine remembers of nodes and their clusters."""


@context_app.command("accept")
def accept_command(
    node: Annotated[str, typer.Argument(metavar="NODE", help="A peer ID.")],
    cluster: Annotated[str, typer.Argument(metavar="CLUSTER", help="Its cluster's ID.")],
    json: Json = False,
) -> None:
    """Expect another cluster at a node than the one that was pinned at the first login there."""
    from wetware import contexts
    from wetware.identity import PeerId

    peer = PeerId.parse(node)
    contexts.update(lambda known: known.pin(peer, cluster))
    if json:
        out_json({"node": peer, "cluster": cluster})
    else:
        note(f"the cluster of {peer} is {cluster} from now on")
