"""`ww user`, `ww role` and `ww policy`: an operator's commands, through the client library."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from wetware.cli.app import (
    Json,
    ask_passphrase,
    confirm,
    examples,
    note,
    options,
    out,
    out_json,
    run_client,
    table,
)
from wetware.cli.given import read_text
from wetware.errors import (
    CapabilityError,
    Denied,
    InvalidArgument,
    KeyFileError,
    Revoked,
    Unsupported,
    WetwareError,
)

if TYPE_CHECKING:
    from wetware.client import Session
    from wetware.identity import Key, PeerId
    from wetware_auth_local.policy import Policy, User

T = TypeVar("T")
BACKEND = "local"

OperatorKey = Annotated[
    str | None,
    typer.Option(
        "--operator-key", help="The operator's key, if it is not the one you log in with."
    ),
]
Roles = Annotated[
    list[str] | None, typer.Option("--role", "-r", metavar="ROLE", help="A role; repeatable.")
]

user_app = typer.Typer(help="Users of the cluster.", no_args_is_help=True)
role_app = typer.Typer(help="Roles: what users may do.", no_args_is_help=True)
policy_app = typer.Typer(help="The signed policy document as a whole.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Mount the three groups."""
    section = "You, and other users"
    shown = examples("ww user add ada --key 12D3Koo… --role member", "ww user list")
    app.add_typer(user_app, name="user", rich_help_panel=section, epilog=shown)
    shown = examples("ww role accept pubsub", "ww role set chatter pubsub", "ww role list")
    app.add_typer(role_app, name="role", rich_help_panel=section, epilog=shown)
    shown = examples("ww policy show", "ww policy status")
    app.add_typer(policy_app, name="policy", rich_help_panel=section, epilog=shown)


def _run(work: Callable[[Session], Awaitable[T]]) -> T:
    """Run `work` in a session; where the cluster's users are elsewhere, say where."""

    async def explained(session: Session) -> T:
        try:
            return await work(session)
        except (Denied, Unsupported):
            with contextlib.suppress(Denied):
                status = await session.status()
                if BACKEND not in (status["auth"], *status["auth_also"]):
                    raise Unsupported(
                        f"the users of this cluster are not in a policy that `ww user` keeps: its "
                        f"auth backend is {status['auth']!r}",
                        hint=status["users"],
                        code="unsupported.service",
                    ) from None
            raise

    return run_client(explained)


def _read() -> Policy:
    policy: Policy = _run(lambda session: session.auth_local.get())
    return policy


def _load(name: str | None) -> Key:
    """A key of this machine; one that is not there is no matter where the users are elsewhere."""
    from wetware.client import KeyChoice

    try:
        return KeyChoice(name, None, ask_passphrase).load()
    except KeyFileError:
        try:
            _read()
        except Unsupported:
            raise
        except WetwareError:
            pass  # no word of the cluster's
        raise


def _change(change: Callable[[Policy], Policy], operator_key: str | None) -> tuple[Policy, int]:
    key = _load(operator_key or options.key)

    async def work(session: Session) -> tuple[Policy, int]:
        try:
            changed: tuple[Policy, int] = await session.auth_local.change(key, change)
        except Revoked as exc:
            # A change is carried out once it is begun; this one took the role away by which we
            # were logged in ourselves.
            raise Revoked(
                "your own session ended with the change", hint="ww policy show", code=exc.code
            ) from None
        return changed

    return _run(work)


def _report(policy: Policy, withdrawn: int) -> None:
    ended = f"; sessions of {withdrawn} withdrawn role(s) ended" if withdrawn else ""
    note(f"policy version {policy.version} is in force{ended}")


def _key_of(text: str) -> PeerId:
    """A peer ID, or the name or file of a key of this machine."""
    from wetware.identity import PeerId

    if text.startswith("12D3Koo"):
        return PeerId.parse(text)
    return _load(text).peer_id


# --- ww user --------------------------------------------------------------------------------------


@user_app.command("list")
def user_list(json: Json = False) -> None:
    """Show the users and their roles."""
    policy = _read()
    if json:
        return out_json(policy.as_dict()["users"])
    rows = [
        (name, str(user.key), ", ".join(sorted(user.roles)) or "-")
        for name, user in sorted(policy.users.items())
    ]
    table(("name", "key", "roles"), rows)


@user_app.command("add")
def user_add(
    name: str,
    key: Annotated[
        str, typer.Option("--key", "-k", metavar="KEY", help="The user's public key (12D3Koo…).")
    ],
    role: Roles = None,
    operator_key: OperatorKey = None,
) -> None:
    """Add a user, with the role `member` unless --role says otherwise."""
    from wetware_auth_local.policy import MEMBER, User

    public = _key_of(key)

    def change(policy: Policy) -> Policy:
        if name in policy.users:
            raise InvalidArgument(
                f"there is a user {name!r} already", hint=f"change it with `ww user set {name} …`"
            )
        user = User(public, frozenset(role or [MEMBER]))
        return policy.next(users={**policy.users, name: user})

    _report(*_change(change, operator_key))


@user_app.command("set")
def user_set(
    name: str,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", "-k", metavar="KEY", help="A new public key: the old one ends at once."
        ),
    ] = None,
    role: Roles = None,
    no_roles: Annotated[bool, typer.Option("--no-roles", help="Take all roles away.")] = False,
    operator_key: OperatorKey = None,
) -> None:
    """Change a user's key or roles; what is taken away ends at once."""
    if key is None and role is None and not no_roles:
        raise InvalidArgument("nothing to change", hint="give --key, --role or --no-roles")
    public = _key_of(key) if key is not None else None

    def change(policy: Policy) -> Policy:
        user = _user(policy, name)
        if public is not None:
            user = replace(user, key=public)
        if role is not None or no_roles:
            user = replace(user, roles=frozenset(role or ()))
        return policy.next(users={**policy.users, name: user})

    _report(*_change(change, operator_key))


@user_app.command("remove")
def user_remove(name: str, operator_key: OperatorKey = None) -> None:
    """Remove a user; their sessions end at once."""

    def change(policy: Policy) -> Policy:
        _user(policy, name)
        return policy.next(users={k: v for k, v in policy.users.items() if k != name})

    _report(*_change(change, operator_key))


def _user(policy: Policy, name: str) -> User:
    if name not in policy.users:
        have = ", ".join(sorted(policy.users))
        raise InvalidArgument(f"there is no user {name!r}; there are {have}")
    return policy.users[name]


# --- ww role --------------------------------------------------------------------------------------


@role_app.command("list")
def role_list(json: Json = False) -> None:
    """Show the roles and what they allow."""
    policy = _read()
    if json:
        return out_json(policy.as_dict()["roles"])
    rows = []
    for name, services in sorted(policy.roles.items()):
        where = policy.where.get(name, {})
        for service in sorted({*services, *where}):  # with "*" the constrained are not all listed
            methods = " ".join(sorted(services.get(service, ()))) or "(as *)"
            rows.append((name, service, methods, " ".join(where.get(service, ()))))
    table(("role", "service", "methods", "where"), rows)


@role_app.command("set")
def role_set(
    name: str,
    allow: Annotated[
        list[str],
        typer.Argument(
            metavar="SERVICE[=PATTERNS]...",
            help='With PATTERN,PATTERN: "*", "Interface.*" or "Interface.method". [*]',
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="PATTERNS", help="The patterns, for a single SERVICE."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            "-w",
            metavar="[SERVICE/]CONSTRAINT",
            help="What arguments have to be, e.g. topic=glob:chat/*; repeatable. Replaces the "
            "constraints that the role has.",
        ),
    ] = None,
    no_where: Annotated[
        bool, typer.Option("--no-where", help="Drop the constraints that the role has.")
    ] = False,
    operator_key: OperatorKey = None,
) -> None:
    """Make or replace a role, e.g. `ww role set chatter pubsub=PubSub.join,Topic.publish`.

    Its constraints stay, unless --where or --no-where is given, or the service they are on is not
    named. `ww services NAME --describe` shows what can be constrained.
    """
    from wetware.hookspecs import Where

    if where and no_where:
        raise InvalidArgument("--where and --no-where", hint="give one of them")
    services: dict[str, frozenset[str]] = {}
    for item in allow:
        service, equals, patterns = item.partition("=")
        if not service or (equals and not patterns):  # an unset variable is not every method
            raise InvalidArgument(
                f"{item!r} names no {'methods' if service else 'service'}",
                hint=f"write {service or 'SERVICE'}=PATTERN, or {service or 'SERVICE'} for all",
                code="invalid.empty",
            )
        if methods is not None:
            if equals or len(allow) != 1:
                raise InvalidArgument(
                    "--methods is for a single SERVICE", hint="write SERVICE=PATTERN,PATTERN"
                )
            patterns = methods
        services[service] = frozenset(patterns.split(",") if patterns else ["*"])
    constraints: dict[str, tuple[str, ...]] = {}
    for text in where or ():
        parsed = Where.parse_option(text, services)
        constraints[parsed.service] = (*constraints.get(parsed.service, ()), parsed.text)
    kept: dict[str, tuple[str, ...]] = {}

    def change(policy: Policy) -> Policy:
        kept.update(
            (service, texts)
            for service, texts in policy.where.get(name, {}).items()
            if not (where or no_where) and (service in services or "*" in services)
        )
        return policy.next(
            roles={**policy.roles, name: services},
            where={**policy.where, name: {**kept, **constraints}},
        )

    unchecked = _change_roles(change, operator_key)
    for service, texts in sorted(kept.items()):
        note(f"the role keeps its constraints of {service}: {' '.join(texts)}")
    _warn_of_roles(services, unchecked)


def _change_roles(change: Callable[[Policy], Policy], operator_key: str | None) -> list[str]:
    """Change the policy; returns the services whose constraints could not be checked here."""
    from wetware_auth_local.client import unchecked_constraints

    unchecked: list[str] = []

    def checked(policy: Policy) -> Policy:
        new = change(policy)
        unchecked[:] = unchecked_constraints(policy, new)
        return new

    _report(*_change(checked, operator_key))
    return unchecked


def _warn_of_roles(services: Iterable[str], unchecked: Sequence[str]) -> None:
    """Of constraints that nobody checked, and services that neither we nor the node know.

    A role may be misspelt.
    """
    from wetware.client.installed import known_interface

    if unchecked:
        note(
            f"constraints of {', '.join(unchecked)} were not checked: this machine has no client "
            "for it; a node denies what it cannot judge"
        )
    strange = {name for name in services if name != "*" and known_interface(name) is None}
    if not strange:
        return
    try:
        offered = [info.name for info in _run(lambda session: session.services())]
    except WetwareError:  # the change may have taken away what the question needs
        return
    for name in sorted(strange.difference(offered)):
        near = difflib.get_close_matches(name, offered, 1, 0.6)
        also = f"did you mean {near[0]}?" if near else f"it has {', '.join(offered)}"
        note(f"warning: the node has no service {name!r}, which the role names; {also}")


@role_app.command("accept")
def role_accept(
    service: str,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
    operator_key: OperatorKey = None,
) -> None:
    """Give the roles reader, member and admin what a service of the node proposes for them.

    Until then a service that was installed after the cluster was founded is for admins alone.
    What is proposed is shown and asked about; what a role has already it keeps. --yes is for this
    machine's node: what another one proposes is signed only once somebody has read it. Where the
    roles are in each node's configuration, prints what to write there.
    """
    from wetware_auth_local.policy import ADMIN, MEMBER, READER

    async def ask(session: Session) -> tuple[dict[str, frozenset[str]], str, Policy | None]:
        proposal, how = await session.proposal(service)
        policy: Policy | None = None if how else await session.auth_local.get()
        return proposal, how, policy

    proposal, how, policy = _run(ask)
    shown = {role: sorted(patterns) for role, patterns in proposal.items()}
    if policy is None:
        if json:
            return out_json({"service": service, "proposed": shown, "write": how})
        return out(how.rstrip())
    if service == "*" or not {READER, MEMBER, ADMIN}.issuperset(proposal):
        raise InvalidArgument(
            f"the node says that {service} proposes something for {', '.join(sorted(proposal))}",
            hint="services propose for reader, member and admin alone: do not trust this node",
        )
    changed, lacking = policy.accept(service, proposal), policy.lacking(service, proposal)
    if lacking:
        for role, patterns in sorted(lacking.items()):
            every = " (every method)" if "*" in patterns else ""
            note(f"{role} gets {' '.join(sorted(patterns))}{every} of {service}")
        if yes and options.node is not None:  # who lies there would write the roles of the cluster
            raise InvalidArgument(
                "--yes would sign this on the word of a node that is not this machine's",
                hint="run it without --yes at a terminal, or at the service's node with --yes",
                code="invalid.unconfirmed",
            )
        confirm(f"Sign that into the policy, as version {changed.version}?", yes=yes)
        changed, _ = _change(lambda now: now.accept(service, lacking), operator_key)
    if json:
        added = {role: sorted(patterns) for role, patterns in lacking.items()}
        out_json(
            {"service": service, "proposed": shown, "added": added, "version": changed.version}
        )
    elif lacking:
        _report(changed, 0)
        note("sessions that are open now have it once they log in again")
    elif proposal:
        note(f"the roles have all that {service} proposes")
    else:
        note(f"{service} proposes nothing: `ww role set ROLE {service}` grants it")


@role_app.command("remove")
def role_remove(name: str, operator_key: OperatorKey = None) -> None:
    """Remove a role from the cluster and from every user; sessions that it granted end at once."""

    def change(policy: Policy) -> Policy:
        if name not in policy.roles:
            have = ", ".join(sorted(policy.roles))
            raise InvalidArgument(f"there is no role {name!r}; there are {have}")
        return policy.next(  # its constraints go with it
            roles={k: v for k, v in policy.roles.items() if k != name},
            users={k: replace(user, roles=user.roles - {name}) for k, user in policy.users.items()},
        )

    _report(*_change(change, operator_key))


# --- ww policy ------------------------------------------------------------------------------------


@policy_app.command("show")
def policy_show(json: Json = False) -> None:
    """Show the policy in force; `ww policy status` tells how it relates to other nodes'."""

    async def work(session: Session) -> tuple[Policy, dict[str, Any]]:
        policy: Policy = await session.auth_local.get()
        try:
            status: dict[str, Any] = await session.auth_local.status()
        except CapabilityError:  # a role may cover reading alone
            status = {}
        return policy, status

    policy, status = _run(work)
    if json:
        out_json(policy.as_dict())
    else:
        out(policy.to_toml().rstrip())
    _warn(status)


def _warn(status: dict[str, Any]) -> None:
    for each in status.get("divergences", ()):
        if each["kind"] == "fork":
            note(
                f"warning: the policy was changed in two places: {each['peer']} has another "
                f"version {each['version']} ({each['digest'][:16]}); try: ww policy resolve"
            )
        else:
            note(
                f"warning: this node missed too much: {each['peer']} has version "
                f"{each['version']}; this node has to be started afresh with that policy"
            )
    if not status.get("saved", True):
        note("warning: the node's disk refuses the policy: what it adds is not granted")


@policy_app.command("status")
def policy_status(json: Json = False) -> None:
    """Show which version a node has, and how it relates to the other nodes'."""
    status = _run(lambda session: session.auth_local.status())
    if json:
        return out_json(status)
    age = "never" if status["age_s"] < 0 else f"{status['age_s']:.0f} s ago"
    rows = (
        ("version", str(status["version"])),
        ("digest", status["digest"]),
        ("compared", "alone in the cluster" if status["alone"] else age),
        ("with", f"{status['members']} connected node(s)"),
        ("refused", f"{status['refused']} message(s) of other nodes"),
    )
    table(("policy", ""), rows)
    _warn(status)


@policy_app.command("export")
def policy_export(
    toml: Annotated[
        bool, typer.Option("--toml", help="Unsigned TOML to edit, instead of the signed document.")
    ] = False,
) -> None:
    """Print the signed document, for another node, or TOML to edit and import."""
    if toml:
        out(_read().to_toml().rstrip())
    else:
        out(_run(lambda session: session.auth_local.document()).decode())


@policy_app.command("import")
def policy_import(
    file: Annotated[str, typer.Argument(help="A signed document or edited TOML; - for stdin.")],
    operator_key: OperatorKey = None,
) -> None:
    """Put a policy in force: a signed document as it is, TOML as a new version that you sign."""
    from wetware_auth_local.policy import Policy, from_toml

    text = read_text(file, "a policy")
    if not text.startswith("{"):
        users, roles, where = from_toml(text)
        unchecked = _change_roles(
            lambda policy: policy.next(users=users, roles=roles, where=where), operator_key
        )
        return _warn_of_roles({name for services in roles.values() for name in services}, unchecked)
    document = text.encode()
    policy = Policy.open(document)
    _, withdrawn = _run(lambda session: session.auth_local.put(document))
    _report(policy, withdrawn)


@policy_app.command("resolve")
def policy_resolve(
    file: Annotated[
        str | None,
        typer.Argument(
            help="The other branch's signed document (`ww policy export` at a node that has it); "
            "without it, what the node itself has met."
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            help="Whose users and roles: this node's (this), the other's (other), or what both "
            "grant (common)."
        ),
    ] = "common",
    operator_key: OperatorKey = None,
) -> None:
    """End a fork: sign a version that nodes on either branch accept.

    A fork is two policies of one version that were both signed: it was changed at two nodes that
    were not connected. No node drops its own for the other's until this is done.
    """
    from wetware_auth_local.policy import Policy, lost_grants

    if keep not in ("common", "this", "other"):
        raise InvalidArgument(f"--keep {keep}: choose common, this or other")
    given = None if file is None else Policy.open(read_text(file, "a policy").encode())
    key = _load(operator_key or options.key)

    async def work(session: Session) -> tuple[list[Policy], Policy, Policy, int]:
        store = session.auth_local
        others = [given] if given is not None else await store.divergent()
        kept: Any = keep
        before, new, withdrawn = await store.resolve(key, others, kept)
        return others, before, new, withdrawn

    others, before, new, withdrawn = _run(work)
    for whose, policy in (("this node", before), *(("the other branch", o) for o in others)):
        for line in lost_grants(policy, new):
            note(f"no longer granted, and was by {whose}: {line}")
    _report(new, withdrawn)
