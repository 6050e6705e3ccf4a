"""`ww auth oidc`: log in with an account of the company, and see what one may do."""

from __future__ import annotations

import sys
import time
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
    """Of the session's own ID token: the provider gave it to us, and a node verifies it."""
    from wetware_auth_oidc.tokens import part_of

    return part_of(session.id_token, 1)


@oidc_app.command("login", epilog=examples("ww auth oidc login", "ww auth oidc login --device"))
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
    json: Json = False,
) -> None:
    """Log in at the provider: `ww` commands then log in by themselves, until it says no."""
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
    left = session.expires_at - time.time()
    if json:
        out_json(
            {
                "principal": f"oidc:{claims['sub']}",
                "issuer": session.issuer,
                "client_id": session.client_id,
                "expires_at": session.expires_at,
                "renews": bool(session.refresh_token),
            }
        )
        return
    renews = ", renewed by itself" if session.refresh_token else ""
    pairs(
        ("who", f"oidc:{claims['sub']}"),
        ("provider", session.issuer),
        (
            "tokens",
            f"until {stamp(session.expires_at)}{renews}" if left > 0 else f"expired{renews}",
        ),
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
    from wetware_auth_oidc.config import parse_roles, values

    roles = parse_roles(_config().roles)
    if role not in roles:
        raise NotFound(
            f"[plugins.auth_oidc.roles] has no role {role[:40]!r}",
            hint=f"it has {', '.join(sorted(roles)) or 'none'}",
        )
    claims = _claims(_session())
    by = roles[role].has(claims)
    if json:
        wanted = [f"{name}={value}" for name, value in roles[role].claims]
        out_json({"role": role, "has": bool(by), "by": by, "claims": wanted})
    else:
        out(f"yes: {by}" if by else f"no: none of the claims of {role} is in your ID token")
        for name, value in roles[role].claims if explain else ():
            mine = ", ".join(sorted(values(claims, name))) or "nothing"
            out(f"  {name}={value}   you have {name}: {mine}")
    raise typer.Exit(EXIT_OK if by else EXIT_DENIED)
