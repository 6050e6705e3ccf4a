"""`ww join` and `ww leave`: this machine becomes a member of a cluster, and is none any more."""

from __future__ import annotations

from typing import Annotated

import typer

from wetware.cli.app import Json, confirm, done, here, node_data_dir, options, run_client
from wetware.cli.cluster import LOST, HandOver, handed_over, staying
from wetware.cli.given import read_line
from wetware.errors import NotFound


def join_command(
    ticket: Annotated[
        str, typer.Argument(metavar="TICKET", help="What `ww invite` printed. '-': stdin.")
    ],
    json: Json = False,
) -> None:
    """Join a cluster without running a node yet; `ww node`, or a service of it, takes part."""
    import asyncio

    from wetware import loader
    from wetware.config import load
    from wetware.node.belonging import join_alone

    given = read_line("a ticket") if ticket == "-" else ticket
    config = load({"node.join": given, "node.data_dir": options.data_dir}, path=options.config)
    cluster = asyncio.run(join_alone(config, loader.load(config))).cluster_id
    data = {"cluster": cluster, "data_dir": config.node.data_dir}
    done(json, data, f"this machine is a member of the cluster {cluster}", here("next: ww node"))


def leave_command(
    hand_over: HandOver = False,
    purge: Annotated[
        bool,
        typer.Option("--purge", help="Remove the data of services and the node's key, too."),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask, also where others need this node.")
    ] = False,
    json: Json = False,
) -> None:
    """Leave the cluster: the node of this machine stops, and its certificate is destroyed.

    The others are told, show it as left, and forget it in a day. It can join again with a ticket.
    With --hand-over it is asked to give others what only it has first; it has to run for that.
    """
    from wetware.cli.service import units
    from wetware.node.leaving import leave, refuse_orphans
    from wetware.overlay.admission.store import founding_of

    data_dir = node_data_dir()
    if (founding := founding_of(data_dir)) is None:
        raise NotFound(
            f"the node of {data_dir} belongs to no cluster",
            hint="name the directory of another node with --data-dir, or its WW_HOME",
            code="not_found.cluster",
        )
    if not yes:
        refuse_orphans(data_dir, founding)
    cluster, gone = founding.cluster_id, "the data of its services" if purge else "the users"
    lost = "" if hand_over else LOST
    confirm(f"{lost}Leave the cluster {cluster}, and remove {gone} from {data_dir}?", yes=yes)
    if hand_over:
        with staying("this node"):
            run_client(handed_over, here=True)
    leave(data_dir, founding, purge=purge)
    kept = f"nothing of it is left in {data_dir}"
    if not purge:
        kept = f"its key and the data of its services stay in {data_dir}"
    notes = [
        f"this machine is no member of the cluster {cluster} any more; {kept}",
        here("to join again: ww join TICKET") + "  (a node that starts alone founds a cluster)",
        *(
            "its service does not start it until then"
            if waits
            else f"so that no service starts one: systemctl {how}disable wetware"
            for how, waits in units(data_dir).items()
        ),
    ]
    done(json, {"left": cluster, "data_dir": data_dir, "purged": purge}, *notes)
