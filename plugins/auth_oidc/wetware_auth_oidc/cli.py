"""`ww auth oidc`: log in with an account of the company, and see what one may do."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wetware.cli.app import (
    Json,
    Styled,
    examples,
    note,
    options,
    out,
    out_json,
    pairs,
    stamp,
)
from wetware.errors import EXIT_DENIED, EXIT_OK

if TYPE_CHECKING:
    from wetware_auth_oidc.config import AuthOidcConfig
    from wetware_auth_oidc.session import StoredSession

oidc_app = typer.Typer(help="Accounts of a company, by OpenID Connect.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Mount `auth oidc`."""
    auth = typer.Typer()
    auth.add_typer(oidc_app, name="oidc")
    app.add_typer(auth, name="auth", epilog=examples("ww auth oidc login"))


def _config() -> AuthOidcConfig:
    from wetware.config import load
    from wetware_auth_oidc.config import AuthOidcConfig

    return load(path=options.config).plugin("auth_oidc", AuthOidcConfig)


def _name() -> str:
    from wetware.client import KeyChoice
    from wetware_auth_oidc.session import chosen_name

    return chosen_name(KeyChoice(options.key, None, None))


def _session() -> StoredSession:
    from wetware_auth_oidc.session import load

    return load(_name())


def _claims(session: StoredSession) -> dict[str, Any]:
    """Of the session's own token: it was given to us, and a node verifies it."""
    from wetware_auth_oidc.tokens import part_of

    if session.account is not None and session.account.by == "token":
        from wetware_auth_oidc.accounts import workload_token

        return part_of(workload_token(session, None), 1)
    return part_of(session.access_token if session.account is not None else session.id_token, 1)


def _source(session: StoredSession, claims: dict[str, Any], config: AuthOidcConfig) -> str:
    """Whose account it is: "" for a person's."""
    from wetware_auth_oidc.config import CLIENT

    names = {issuer: name for name, issuer in config.workload_issuers.items()}
    return "" if session.account is None else names.get(claims.get("iss", ""), CLIENT)


def _who(session: StoredSession, claims: dict[str, Any]) -> str:
    source = _source(session, claims, _config())
    return f"oidc:{source}:{claims['sub']}" if source else f"oidc:{claims['sub']}"


@oidc_app.command(
    "login",
    epilog=examples(
        "ww auth oidc login",
        "ww auth oidc login --device",
        "ww auth oidc login --client ci --secret-file /run/secrets/ci",
        "ww auth oidc login --workload token.jwt",
    ),
)
def login(
    *,
    device: Annotated[
        bool, typer.Option("--device", help="With a browser of another machine: shows a code.")
    ] = False,
    no_browser: Annotated[
        bool,
        typer.Option(
            "--no-browser",
            help="The same where the provider has no codes: asks for the browser's last address.",
        ),
    ] = False,
    client: Annotated[
        str, typer.Option(help="As a service account that is a client of the provider: its ID.")
    ] = "",
    secret_file: Annotated[
        Path | None, typer.Option(help="With --client: its secret, in a file of mode 0600.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="With --client: its private key (PEM or JWK), in a file of mode 0600."),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(
            help="As a workload: the token that its platform writes and renews. {node} in it is "
            "the ID of the node. It need not be there yet: the command says for whom it has to be."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Log in at the provider: `ww` commands then log in by themselves, until it says no."""
    chosen = [each for each in (secret_file, key_file, workload) if each is not None]
    if client or chosen:
        if len(chosen) != 1 or bool(client) == (chosen[0] is workload) or device or no_browser:
            raise typer.BadParameter(
                "a service account is --client with --secret-file or --key-file, or --workload"
            )
        by = "secret" if secret_file else "key" if key_file else "token"
        _login_service(by, chosen[0].absolute(), client, json=json)
        return
    import asyncio
    import threading
    import webbrowser

    from wetware_auth_oidc.login import by_address, by_browser, by_code
    from wetware_auth_oidc.provider import Provider
    from wetware_auth_oidc.session import locked, save

    config, name = _config().checked(users=True), _name()

    def open_(url: str) -> None:
        note("Log in there; if no browser opens, open it yourself:")
        note(f"  {url}")
        note("On a machine without a browser: ww auth oidc login --device, or --no-browser")
        # Some browsers keep who starts them waiting, and it is to us that they come back.
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    def ask(url: str) -> str:
        note("Open this page, on any machine, and log in:")
        note(f"  {url}")
        note("The browser ends at a page of 127.0.0.1 that it cannot show. Paste its address here:")
        return sys.stdin.readline(16 << 10)

    def show(where: str, code: str, whole: str) -> None:
        note("Open this page, on any machine, and type the code:")
        note(f"  {where}")
        note("  ", Styled(code, "green"))
        if whole:
            note(f"or: {whole}")

    async def work() -> StoredSession:
        provider = Provider(config.issuer)
        try:
            if device:
                found = await by_code(provider, config, show)
            elif no_browser:
                found = await by_address(provider, config, ask)
            else:
                found = await by_browser(provider, config, open_)
        finally:
            await provider.close()
        async with locked(name):
            save(name, found)
        return found

    session = asyncio.run(work())
    claims = _claims(session)
    who = f"oidc:{claims['sub']}"
    if json:
        out_json({"principal": who, "issuer": session.issuer, "expires_at": session.expires_at})
        return
    mail = f" ({claims['email']})" if isinstance(claims.get("email"), str) else ""
    out(f"logged in as {who}{mail}")
    out("next: ww whoami")


def _login_service(by: str, file: Path, client: str, *, json: bool) -> None:
    import asyncio

    from wetware.identity import Key
    from wetware_auth_oidc import session as sessions
    from wetware_auth_oidc.accounts import new_session
    from wetware_auth_oidc.login import renewed
    from wetware_auth_oidc.tokens import key_audience

    config, name = _config(), _name()
    config = config if by == "token" else config.checked(users=True)
    audience = config.audience or config.client_id
    account = sessions.Account(by, str(file), audience, " ".join(config.service_scopes))

    async def work() -> StoredSession:
        async with sessions.locked(name):
            before = None
            if by == "token" and sessions.path_of(name).exists():  # the token may name its key
                before = sessions.load(name)
            same = before is not None and before.account == account
            key = before.key if before is not None and same else Key.generate()
            session = new_session(config, account, client, key)
            sessions.save(name, session)
        return session if by == "token" else await renewed(name)

    session = asyncio.run(work())
    if by == "token":
        wanted = key_audience(session.key.public)
        if json:
            out_json({"audience": wanted})
        else:
            out(f"the token in {file} has to be for the audience {wanted}")
            out("or, to be used at one node alone, for wetware:NODE, its ID")
        return
    who = _who(session, _claims(session))
    if json:
        out_json({"principal": who, "issuer": session.issuer, "expires_at": session.expires_at})
    else:
        out(f"logged in as {who}")
        out("next: ww whoami")


@oidc_app.command("logout")
def logout() -> None:
    """Forget the session of this machine, and have the provider withdraw its tokens."""
    import asyncio

    from wetware.errors import WetwareError
    from wetware_auth_oidc.provider import Provider
    from wetware_auth_oidc.session import load, locked, remove

    async def forget() -> StoredSession:
        async with locked(_name()):  # another process may be renewing it
            session = load(_name())
            remove(_name())
            return session

    async def withdraw(session: StoredSession) -> int:
        provider = Provider(session.issuer)
        auth = (session.client_id, session.client_secret) if session.client_secret else None
        try:
            at, worst = await provider.endpoint("revocation_endpoint"), 200
            for token in filter(None, (session.refresh_token, session.access_token)):
                form = {"token": token, "client_id": session.client_id}
                worst = max(worst, (await provider.ask("POST", at, form=form, auth=auth))[0])
            return worst
        finally:
            await provider.close()

    session = asyncio.run(forget())
    if session.account is not None:
        out("logged out here; sessions at nodes end when its last token expires")
        return
    try:
        status = asyncio.run(withdraw(session))
        why = "" if status == 200 else f"the provider answers {status}"
    except WetwareError as exc:
        why = exc.message
    if why:
        note(f"logged out here; its tokens live until they expire: {why}")
    else:
        out("logged out; nodes end its sessions when they next ask the provider")


@oidc_app.command("status")
def status(json: Json = False) -> None:
    """Whose session this machine has, and until when."""
    session = _session()
    claims = _claims(session)
    who, issuer = _who(session, claims), str(claims.get("iss", ""))
    until = claims["exp"] if session.expires_at == 0 else session.expires_at  # 0: of a workload
    renews = session.account is not None or bool(session.refresh_token)
    if json:
        out_json(
            {
                "principal": who,
                "issuer": issuer,
                "client_id": session.client_id,
                "expires_at": until,
                "renews": renews,
            }
        )
        return
    more = ", renewed by itself" if renews else ""
    pairs(
        ("who", who),
        ("provider", issuer),
        ("tokens", f"until {stamp(until)}{more}" if until > time.time() else f"expired{more}"),
    )


@oidc_app.command("can", epilog=examples("ww auth oidc can member --explain"))
def can(
    role: Annotated[str, typer.Argument(help="A role of `[plugins.auth_oidc.roles]`.")],
    *,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which claims give it, and which you have.")
    ] = False,
    json: Json = False,
) -> None:
    """Whether your last tokens give a role, by this machine's configuration; exit code 4 if not."""
    from wetware.errors import NotFound
    from wetware_auth_oidc.config import parse_roles, values, written

    config = _config()
    roles = parse_roles(config.roles, config.workload_issuers)
    if role not in roles:
        raise NotFound(
            f"[plugins.auth_oidc.roles] has no role {role[:40]!r}",
            hint=f"it has {', '.join(sorted(roles)) or 'none'}",
        )
    session = _session()
    claims = _claims(session)
    source = _source(session, claims, config)
    by = roles[role].has(claims, source)
    if json:
        wanted = [written(*each) for each in roles[role].claims]
        out_json({"role": role, "has": bool(by), "by": by, "claims": wanted})
    else:
        kind = f"token, of {source}" if source else "ID token"
        out(f"yes: {by}" if by else f"no: none of the claims of {role} is in your {kind}")
        for of, name, value in roles[role].claims if explain else ():
            mine = ", ".join(sorted(values(claims, name)) if of == source else ()) or "nothing"
            out(f"  {written(of, name, value)}   you have {name}: {mine}")
    raise typer.Exit(EXIT_OK if by else EXIT_DENIED)
