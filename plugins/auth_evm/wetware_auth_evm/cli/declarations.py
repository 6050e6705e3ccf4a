"""The commands of `ww auth evm`: the contract, its roles, and the user's wallets and sessions.

Declarations only, read when one of them is named; the decorator says which module does it.
"""

from __future__ import annotations

from typing import Annotated, Final

import typer

from wetware_auth_evm.cli.declaring import command

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Role = Annotated[str, typer.Argument(metavar="ROLE", help="Name of a role.")]
Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="0x and 40 hex digits.")]
Expires = Annotated[
    str, typer.Option(metavar="TIME", help="When it ends: 90d, 12h, or 2027-01-31. At most 400d.")
]
Rights = Annotated[
    str, typer.Option(metavar="MASK", help="What of the role: a mask such as 0x3, or all.")
]
DEFAULT_EXPIRES: Final = "90d"


# --- the chain and the contract -------------------------------------------------------------------


@command("dev", "deploy", where=False)
def dev(json: Json = False) -> None:
    """Run a local chain with the contract until Ctrl-C; or say where the running node's is."""


@command("deploy", "deploy", writes=True)
def deploy(
    *,
    owner: Annotated[str, typer.Option(metavar="ADDRESS", help="Who owns it. [your wallet]")] = "",
    write_config: Annotated[
        bool, typer.Option("--write", help="Put the section into ww.toml, if it has none.")
    ] = False,
) -> None:
    """Make a contract, and print the section [plugins.auth_evm] for ww.toml."""


@command("status", "status")
def status(*, json: Json = False) -> None:
    """Show chain, contract, endpoints and the local node's replica, and what is wrong."""


# --- roles ----------------------------------------------------------------------------------------


@command("grant", "roles", writes=True)
def grant(
    role: Role,
    address: Annotated[
        list[str], typer.Argument(metavar="ADDRESS...", help="One or more, up to 100.")
    ],
    *,
    expires: Expires = DEFAULT_EXPIRES,
    not_before: Annotated[
        str, typer.Option(metavar="TIME", help="When it begins: 2h, or 2027-01-31.")
    ] = "",
    rights: Rights = "all",
) -> None:
    """Give a role, or change its bounds. By the owner, or an admin of the role."""


@command("revoke", "roles", writes=True)
def revoke(role: Role, address: Address) -> None:
    """Take one role of an account: its live sessions lose it at once."""


@command("revoke-all", "roles", writes=True)
def revoke_all(address: Address, *, yes: Yes = False) -> None:
    """Take everything of an account, in every scope: roles, bound keys, sessions."""


@command("reset-scope", "roles", writes=True)
def reset_scope(*, yes: Yes = False) -> None:
    """End every grant in the scope, of everybody. By the owner."""


@command("renounce", "roles", writes=True)
def renounce(
    role: Annotated[
        str, typer.Argument(metavar="[ROLE]", help="One that you hold; found if left out.")
    ] = "",
    *,
    yes: Yes = False,
) -> None:
    """Give up everything of your own: when your wallet's key is lost or known to others."""


@command("pause", "roles", writes=True)
def pause(*, yes: Yes = False) -> None:
    """Stop everything: nobody holds any role until `unpause`. By the owner or a guardian."""


@command("unpause", "roles", writes=True)
def unpause() -> None:
    """End a pause. By the owner."""


@command("set-admin", "roles", writes=True)
def set_admin(
    role: Annotated[str, typer.Argument(metavar="ROLE|any", help="`any` is every role.")],
    address: Address,
    *,
    expires: Expires = DEFAULT_EXPIRES,
    rights: Rights = "all",
    remove: Annotated[
        bool, typer.Option("--remove", help="End it, and what was granted under it.")
    ] = False,
) -> None:
    """Let an account grant a role, within these bounds. By the owner."""


Peer = Annotated[str, typer.Option("--peer", metavar="PEER_ID", help="The key: 12D3Koo….")]
OfNode = Annotated[bool, typer.Option("--node", help="The key of this machine's node.")]


@command("bind-key", "roles", writes=True)
def bind_key(
    role: Annotated[list[str], typer.Argument(metavar="ROLE...", help="Roles that you hold.")],
    *,
    peer: Peer = "",
    node: OfNode = False,
    expires: Expires = DEFAULT_EXPIRES,
) -> None:
    """Let an Ed25519 key act in roles of yours: for nodes, and for multisigs."""


@command("unbind-key", "roles", writes=True)
def unbind_key(
    role: Annotated[list[str], typer.Argument(metavar="ROLE...", help="What it was bound to.")],
    *,
    peer: Peer = "",
    node: OfNode = False,
    account: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Who bound it. [your wallet]")
    ] = "",
) -> None:
    """End bindings of a key. By the account, the owner or a guardian."""


@command("transfer-owner", "roles", writes=True)
def transfer_owner(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="Who may take it; `none` withdraws an offer.")
    ],
    *,
    yes: Yes = False,
) -> None:
    """Offer the ownership: it can be accepted from 2 days later on, for 14 days."""


@command("accept-owner", "roles", writes=True)
def accept_owner() -> None:
    """Take the ownership that was offered to your wallet."""


# --- reading --------------------------------------------------------------------------------------


@command("list", "records")
def list_(
    *,
    role: Annotated[str, typer.Option(metavar="ROLE", help="Of this role only.")] = "",
    account: Annotated[str, typer.Option(metavar="ADDRESS", help="Of this account only.")] = "",
    all_: Annotated[
        bool, typer.Option("--all", help="In every scope, and what has ended, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Show who holds which role, who may grant, and which keys are bound."""


@command("can", "records")
def can(
    role: Role,
    address: Address,
    *,
    rights: Annotated[
        str, typer.Option(metavar="MASK", help="All of these rights, e.g. 0x3. [any]")
    ] = "",
    explain: Annotated[bool, typer.Option("--explain", help="Say what decided.")] = False,
    json: Json = False,
) -> None:
    """Say whether an account holds a role now. Exit code 77 if not."""


@command("audit", "audit")
def audit(
    *,
    account: Annotated[str, typer.Option(metavar="ADDRESS", help="About this account only.")] = "",
    last: Annotated[
        int, typer.Option("--last", min=0, metavar="N", help="The last N only; 0: all.")
    ] = 0,
    json: Json = False,
) -> None:
    """Show the contract's history: every change, when, and by whom; and whether it is complete."""


# --- sessions, wallets, profiles ------------------------------------------------------------------

Cluster = Annotated[str, typer.Option(metavar="ID", help="The cluster. [that of the profile]")]


@command("login", "sessions")
def login(
    *,
    roles: Annotated[
        str, typer.Option(metavar="A,B…", help="What the session may use. [all that you hold]")
    ] = "",
    hours: Annotated[
        float, typer.Option(min=0.01, max=24, help="How long the session lasts.")
    ] = 24,
    wallet_address: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="A wallet elsewhere: prints what it has to sign."),
    ] = "",
    eip4361: Annotated[
        bool, typer.Option("--eip4361", help="Sign a text instead of typed data (EIP-712).")
    ] = False,
    sign_with_file: Annotated[
        bool,
        typer.Option(
            "--sign-with-file",
            help="With --wallet-address of a contract wallet: your wallet file signs as its owner.",
        ),
    ] = False,
    signature: Annotated[
        str,
        typer.Option(metavar="0x…", help="What the wallet gave for the text printed before."),
    ] = "",
    cluster: Cluster = "",
    json: Json = False,
) -> None:
    """Let your wallet sign for a session key: for up to 24 h, `ww` commands log in with that."""


@command("logout", "sessions", where=False)
def logout(
    cluster: Cluster = "",
    all_: Annotated[bool, typer.Option("--all", help="Of every cluster.")] = False,
) -> None:
    """Forget the session key of this machine."""


Sealed = Annotated[
    bool,
    typer.Option("--passphrase", help="Ask for a passphrase to encrypt with, or WW_PASSPHRASE."),
]


@command("forget", "sessions", where=False)
def forget(
    force: Annotated[
        bool, typer.Option("--force", help="Also where nothing is wrong with what is kept.")
    ] = False,
) -> None:
    """Let the local node read the chain anew: after one that took back what was final."""


@command("new-key", "keeping", where=False)
def new_key(
    name: Annotated[str, typer.Argument(help="A name for ww --key.")] = "default",
    passphrase: Sealed = False,
    json: Json = False,
) -> None:
    """Make a wallet: a keystore v3 with a passphrase, else a file in the clear, for try-outs."""


@command("import-key", "keeping", where=False)
def import_key(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A keystore v3, or the key in hex; - for stdin.")
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="For ww --key. [that of --key]")] = "",
    passphrase: Sealed = False,
    json: Json = False,
) -> None:
    """Bring a wallet's key. A keystore stays encrypted with its passphrase."""


@command("address", "keeping", where=False)
def address(json: Json = False) -> None:
    """Print the address of your wallet."""


@command("export-profile", "keeping")
def export_profile(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Where to; - for stdout.")] = "-",
    *,
    cluster: Cluster = "",
) -> None:
    """Write down chain, contract, endpoints and cluster, for the members of a cluster."""


@command("use-profile", "keeping", where=False)
def use_profile(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A profile; - for stdin.")],
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask its endpoints whether it is right.")
    ] = False,
) -> None:
    """Keep a profile as yours: the commands here then find their chain by it."""
