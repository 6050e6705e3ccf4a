"""`ww context`: names for nodes, with what it takes to log in there, and the clusters pinned."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from wetware.cli.app import Json, done, options, out_json, pairs, table, usage
from wetware.cli.completion import complete_contexts
from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from wetware.client.contexts import Context

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A context.", autocompletion=complete_contexts)
]

context_app = typer.Typer(
    no_args_is_help=True, help="Contexts: names for nodes, and for how you log in there."
)


@context_app.command("add")
def add_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A new name.")],
    cluster: Annotated[
        str,
        typer.Option(
            "--cluster",
            metavar="ID",
            help="The cluster that is expected there; else it is pinned at the first login.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Remember the global options --node, --key and --data-dir under a name.

    `ww --context NAME …`, WW_CONTEXT or `ww context use NAME` then stand for them.
    """
    from wetware.base import paths
    from wetware.client import contexts

    key = options.given.get("key", "")
    data_dir = options.given.get("data_dir", "")
    made = contexts.Context(
        node=_checked_node(options.given.get("node", "")),
        key=str(paths.absolute(key, "--key")) if os.sep in key else key,
        data_dir=str(paths.absolute(data_dir, "--data-dir")) if data_dir else "",
        cluster=cluster,
    )
    contexts.load().add(name, made)  # a wrong name is said first
    if made == contexts.Context():
        usage(
            f"nothing is given that {name} could stand for",
            f"ww context add {name} --node NODE, --key KEY or --data-dir DIR",
        )
    contexts.update(lambda known: known.add(name, made))
    next_step = f"added {name}; to have it without --context {name}: ww context use {name}"
    done(json, _plain(replace(made, name=name)), next_step)


def _checked_node(node: str) -> str:
    """The node as it is kept; raises InvalidArgument for what leads nowhere."""
    from wetware.broker.sturdy import is_ref
    from wetware.client import is_address, peer_in
    from wetware.overlay.membership.selector import Selector

    if is_ref(node):
        raise InvalidArgument(
            "a reference is a secret, and no node: it is not kept here",
            hint="give it to each command: ww use REF COMMAND …",
        )
    if is_address(node):
        peer_in(node)
    else:
        Selector.parse(node)
    return node


@context_app.command("use")
def use_command(name: Name, json: Json = False) -> None:
    """Use a context where no other is named; `local` is this machine's node."""
    from wetware.base import paths
    from wetware.client import contexts

    contexts.update(lambda known: known.use(name))
    notes = [f"commands go to {name} from now on"]
    if paths.variable("WW_CONTEXT"):
        notes.append("where WW_CONTEXT is set, as here, it counts for more")
    done(json, {"current": name}, *notes)


@context_app.command("ls")
def ls_command(json: Json = False) -> None:
    """Show the contexts; the star is at the one that is used."""
    from wetware.base import paths
    from wetware.client import contexts

    known = contexts.load()
    used = options.given.get("context") or paths.variable("WW_CONTEXT") or known.current
    every = {contexts.LOCAL: contexts.Context(name=contexts.LOCAL), **known.named}
    if json:
        return out_json([{**_plain(each), "current": n == used} for n, each in every.items()])
    rows = [
        (
            f"{name} *" if name == used else name,
            each.node or each.data_dir or "this machine's",
            each.key or "-",
            each.cluster[:12] or "-",
        )
        for name, each in every.items()
    ]
    table(("name", "node", "key", "cluster"), rows)


@context_app.command("show")
def show_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Else the current one.", autocompletion=complete_contexts
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show one context."""
    from wetware.client import contexts

    context = contexts.choose(name or options.given.get("context"))
    if json:
        return out_json(_plain(context))
    pairs(*((field, value or "-") for field, value in _plain(context).items()))


@context_app.command("rm")
def rm_command(name: Name, json: Json = False) -> None:
    """Forget a context, and the cluster that was pinned in it; its node and key stay."""
    from wetware.client import contexts

    was = contexts.load().current
    now = contexts.update(lambda known: known.remove(name)).current
    notes = [f"forgot {name}"]
    if was != now:
        notes.append(f"commands go to {now} from now on: this machine's node, with the default key")
    done(json, {"removed": name, "current": now}, *notes)


@context_app.command("accept")
def accept_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A context, or a node's peer ID.", autocompletion=complete_contexts
        ),
    ],
    cluster: Annotated[str, typer.Argument(metavar="CLUSTER", help="Its cluster's ID.")],
    json: Json = False,
) -> None:
    """Expect another cluster than the one that was pinned at the first login."""
    from wetware.client import contexts
    from wetware.overlay.membership.selector import is_peer_id

    def accept(known: contexts.Contexts) -> contexts.Contexts:
        if not is_peer_id(name):
            known.context(name)
        return known.pin(name, cluster)

    contexts.update(accept)
    pinned = f"the cluster of {name} is {cluster} from now on"
    done(json, {"name": name, "cluster": cluster}, pinned)


def _plain(context: Context) -> dict[str, str]:
    fields = asdict(context)
    return {"name": fields.pop("name") or "local", **fields}
