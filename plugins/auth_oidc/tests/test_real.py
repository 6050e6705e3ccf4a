"""Nodes and users with a real OpenID provider: logins, and all the ways in which they end."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from joserfc.jwk import ECKey

from wetware.errors import EXIT_DENIED
from wetware.identity import Key
from wetware.testing import Home, wait_for

from .fake import fake_in_thread, signed
from .real import RealProvider, click_through, needs_provider, real_provider

pytestmark = [needs_provider, pytest.mark.timeout(240)]
NODE, AUTH = ".wetware/node", ["--auth", "oidc"]
ADA = {"groups": ["eng"], "email": "ada@acme.example"}


def configured(
    home: Home, issuer: str, setting: str = "", role: str = "groups=none", *, recheck_s: int = 2
) -> None:
    """With one setting more, and who has the role `job`."""
    folder = home.path / ".wetware"
    folder.mkdir(exist_ok=True)
    (folder / "ww.toml").write_text(
        textwrap.dedent(f"""\
            [plugins.auth_oidc]
            issuer = "{issuer}"
            client_id = "team"
            recheck_s = {recheck_s}
            unreachable_s = 3
            {setting}

            [plugins.auth_oidc.roles.member]
            claims = ["groups=eng"]
            services = {{ pubsub = ["*"], node = ["Node.status"] }}

            [plugins.auth_oidc.roles.job]
            claims = ["{role}"]
            services = {{ pubsub = ["*"], node = ["Node.status"] }}

            [plugins.auth_oidc.roles.admin]
            claims = ["groups=ops"]
            services = {{ "*" = ["*"] }}
            """)
    )


@pytest.fixture(scope="module")
def provider() -> Iterator[RealProvider]:
    with real_provider() as found:
        yield found


@pytest.fixture
def home(tmp_path: Path, provider: RealProvider) -> Iterator[Home]:
    provider.accounts(ada=ADA, eve={"groups": ["sales"]}, root={"groups": ["ops"]})
    with Home(tmp_path / "home") as found:
        configured(found, provider.issuer)
        yield found


def logs_in(home: Home, who: str = "ada", key: str = "default") -> str:
    """By the device's code; what the command printed."""
    command = home.start_ww("--key", key, "auth", "oidc", "login", "--device")
    assert command.stderr is not None
    said = []
    for line in command.stderr:
        said.append(line)
        if line.startswith("or: "):
            click_through(line.removeprefix("or: ").strip(), who)
            break
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, "".join(said) + err
    return out


def ticket(home: Home) -> str:
    """For the cluster of the first node, by somebody who may give one."""
    logs_in(home, "root", key="root")
    return home.ww("--key", "root", "invite", check=True).stdout.strip()


def test_a_code_typed_elsewhere_logs_in(home: Home) -> None:
    said = logs_in(home)
    assert said.startswith("logged in as oidc:ada")
    with home.node(NODE, args=AUTH):
        who = home.ww("whoami", "--json", check=True)
        assert json.loads(who.stdout)["principal"] == "oidc:ada"
        logs_in(home, "eve", key="eve")
        denied = home.ww("--key", "eve", "whoami")
        assert denied.returncode == EXIT_DENIED
        assert "none of the claims of a role" in denied.stderr
        assert "ww auth oidc can" in denied.stderr
        can = home.ww("--key", "eve", "auth", "oidc", "can", "member", "--explain")
        assert can.returncode == EXIT_DENIED
        assert "groups=eng   you have groups: sales" in can.stdout
    file = home.path / ".wetware" / "oidc" / "default.json"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_browser_of_this_machine_logs_in(home: Home, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    here = Path(__file__).parent
    browser.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(here)!r})\n"
        "from real import click_through\nclick_through(sys.argv[1], 'ada')\n"
    )
    browser.chmod(0o755)
    done = home.ww("auth", "oidc", "login", "--json", env={"BROWSER": f"{browser} %s"}, timeout=90)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["principal"] == "oidc:ada"
    status = json.loads(home.ww("auth", "oidc", "status", "--json", check=True).stdout)
    assert status["renews"]


def test_a_browser_of_another_machine_logs_in(home: Home) -> None:
    command = home.start_ww("auth", "oidc", "login", "--no-browser")
    assert command.stderr is not None
    url = next(line.strip() for line in command.stderr if line.startswith("  http"))
    out, err = command.communicate(click_through(url, "ada") + "\n", timeout=60)
    assert command.returncode == 0, err
    assert out.startswith("logged in as oidc:ada")
    other = home.ww(
        "auth", "oidc", "login", "--no-browser", input="http://127.0.0.1:8400/callback?code=x\n"
    )
    assert other.returncode == EXIT_DENIED
    assert "not the address at which this login ended" in other.stderr


def test_a_provider_that_leaves_the_nonce_out_of_codes_is_refused(home: Home) -> None:
    with real_provider(NO_DEVICE_NONCE="1") as provider:
        provider.accounts(ada=ADA)
        configured(home, provider.issuer)
        with pytest.raises(AssertionError, match=r"another key \(nonce\)(.|\n)*--no-browser"):
            logs_in(home)


def test_an_offboarded_user_is_out_at_two_nodes_with_their_subscriptions(
    home: Home, provider: RealProvider
) -> None:
    logs_in(home)
    with (
        home.node(NODE, args=AUTH) as first,
        home.node(join=ticket(home), args=AUTH) as second,
    ):
        subs = [home.start_ww("--node", n.addr, "sub", "news") for n in (first, second)]
        for node in (first, second):
            home.ww("--node", node.addr, "pub", "news", "hello", check=True)
        for sub in subs:
            assert sub.stdout is not None
            assert "hello" in sub.stdout.readline()
        provider.accounts()
        gone_at = time.monotonic()
        for sub in subs:
            sub.communicate(timeout=60)
            assert sub.returncode != 0
        took_s = time.monotonic() - gone_at
        for node in (first, second):
            assert home.ww("--node", node.addr, "whoami").returncode == EXIT_DENIED
        assert took_s < 60


def test_keys_rotate_under_a_session_and_tokens_are_renewed(home: Home, tmp_path: Path) -> None:
    with real_provider(ID_TOKEN_S="18") as provider:
        provider.accounts(ada=ADA)
        configured(home, provider.issuer)
        logs_in(home)
        with home.node(NODE, args=AUTH):
            home.ww("whoami", check=True)
            provider.rotate()
            first = (home.path / ".wetware/oidc/default.json").read_text()
            wait_for(
                lambda: (
                    home.ww("whoami").returncode == 0
                    and (home.path / ".wetware/oidc/default.json").read_text() != first
                ),
                "tokens are renewed, and signed by the new key",
                within_s=60,
            )


def test_commands_that_renew_at_once_do_not_look_like_a_theft(home: Home) -> None:
    """The provider ends a login whose refresh token is used twice."""
    with real_provider(ID_TOKEN_S="16") as provider:
        provider.accounts(ada=ADA)
        configured(home, provider.issuer)
        logs_in(home)
        with home.node(NODE, args=AUTH):
            time.sleep(2)  # now the token has less left than it is renewed at
            several = [home.start_ww("whoami") for _ in range(4)]
            ends = [each.communicate(timeout=60) for each in several]
            assert [each.returncode for each in several] == [0] * 4, ends
            time.sleep(2)
            home.ww("whoami", check=True)


def test_who_logs_out_has_no_tokens_left(home: Home, provider: RealProvider) -> None:
    logs_in(home)
    with home.node(NODE, args=AUTH):
        copy = (home.path / ".wetware/oidc/default.json").read_bytes()
        home.ww("whoami", check=True)
        home.ww("auth", "oidc", "logout", check=True)
        assert "auth oidc login" in home.ww("whoami").stderr
        stolen = home.path / ".wetware/oidc/default.json"
        stolen.write_bytes(copy)
        stolen.chmod(0o600)
        wait_for(lambda: home.ww("whoami").returncode == EXIT_DENIED, "the copy is worthless")


def test_nodes_hold_everything_up_while_the_provider_is_down(home: Home, tmp_path: Path) -> None:
    provider = RealProvider()
    try:
        provider.accounts(ada=ADA)
        configured(home, provider.issuer)
        logs_in(home)
        with home.node(NODE, args=AUTH) as node:
            home.ww("whoami", check=True)
            provider.end()
            node.wait_log("auth_oidc.suspended", within_s=30)
            done = home.ww("whoami")
            assert done.returncode != 0
            assert "backend unavailable" in done.stderr
    finally:
        provider.end()


def test_users_of_two_backends_are_at_one_node_and_end_apart(home: Home) -> None:
    provider = RealProvider()
    try:
        provider.accounts(ada=ADA)
        configured(home, provider.issuer)
        with home.node(NODE, args=["--auth-also", "oidc"]) as node:  # a cluster of auth_local
            assert json.loads(home.ww("status", "--json").stdout)["auth_also"] == ["oidc"]
            assert "local:" in home.ww("whoami", check=True).stdout
            logs_in(home, key="work")
            ada = home.start_ww("--key", "work", "sub", "news")
            assert "oidc:" in home.ww("--key", "work", "whoami", check=True).stdout
            assert home.ww("--key", "work", "ls").returncode == EXIT_DENIED, "no operator"
            provider.end()
            node.wait_log("auth_oidc.suspended", within_s=30)
            assert home.ww("--key", "work", "whoami").returncode != 0
            home.ww("pub", "news", "hello", check=True)  # whom auth_local knows, goes on
            heard, said = ada.communicate(timeout=60)
            assert not heard
            assert "of users of 'oidc' are suspended" in said
    finally:
        provider.end()


@pytest.mark.parametrize("by", ["secret", "key"])
def test_a_client_of_the_provider_is_a_service_account(home: Home, tmp_path: Path, by: str) -> None:
    """Its tokens live for 16 s here, and are renewed with 15 s left."""
    key = ECKey.generate_key("P-256", {"kid": "robot1"})
    file, who = tmp_path / by, {"secret": "ci", "key": "robot"}[by]
    file.write_bytes(b"a+secret/of=ci" if by == "secret" else key.as_pem(private=True))
    file.chmod(0o600)
    public = json.dumps({**key.as_dict(private=False), "use": "sig"})
    with real_provider(ROBOT_JWK=public, SERVICE_S="16") as provider:
        provider.accounts(**{who: {"team": "ops"}})
        configured(home, provider.issuer, 'audience = "urn:acme:wetware"', "client:team=ops")
        login = ("auth", "oidc", "login", "--client", who, f"--{by}-file", str(file))
        done = home.ww(*login)
        assert done.stdout.startswith(f"logged in as oidc:client:{who}"), done.stderr
        with home.node(NODE, args=AUTH):
            assert json.loads(home.ww("whoami", "--json", check=True).stdout)["principal"] == (
                f"oidc:client:{who}"
            )
            can = home.ww("auth", "oidc", "can", "job", "--explain", check=True)
            assert "client:team=ops   you have team: ops" in can.stdout
            assert home.ww("auth", "oidc", "can", "member").returncode == EXIT_DENIED
            first = (home.path / ".wetware/oidc/default.json").read_text()
            time.sleep(2)
            home.ww("whoami", check=True)
            assert (home.path / ".wetware/oidc/default.json").read_text() != first
            file.write_bytes(b"wrong" if by == "secret" else _another(key))
            time.sleep(2)
            refused = home.ww("whoami")
            assert refused.returncode == EXIT_DENIED
            assert "the provider refuses the login: invalid_client" in refused.stderr


def _another(key: ECKey) -> bytes:
    return ECKey.generate_key("P-256", {"kid": key.kid}).as_pem(private=True)


def test_a_workload_logs_in_by_the_file_that_its_platform_renews(
    home: Home, tmp_path: Path, provider: RealProvider
) -> None:
    file = tmp_path / "token"
    with fake_in_thread() as platform:
        workloads = f'workloads = ["ci={platform.issuer}"]'
        configured(home, provider.issuer, workloads, "ci:repository=acme/app")
        login = ("auth", "oidc", "login", "--workload", str(file), "--json")
        audience = json.loads(home.ww(*login, check=True).stdout)["audience"]
        assert json.loads(home.ww(*login, check=True).stdout)["audience"] == audience
        key = Key.generate()  # of the token's nonce, which is none here

        def platform_writes(**more: object) -> None:
            claims = platform.claims(key, "job", nonce=None, repository="acme/app", **more)
            file.write_text(signed(claims))

        with home.node(NODE, args=AUTH):
            assert "cannot read the workload's token" in home.ww("whoami").stderr
            platform_writes(aud=audience)
            who = json.loads(home.ww("whoami", "--json", check=True).stdout)["principal"]
            assert who == "oidc:ci:job"
            assert home.ww("auth", "oidc", "can", "job").returncode == 0
            platform_writes(aud="anybody")
            assert "is not shown to the node" in home.ww("whoami").stderr
            platform_writes(aud=audience, exp=time.time() - 100)
            assert re.search(r"it expired 1\d\d s ago", home.ww("whoami").stderr)


def test_a_node_says_what_is_missing(home: Home) -> None:
    (home.path / ".wetware/ww.toml").write_text("")
    node = home.start_node(NODE, args=AUTH)
    assert node.process.wait(60) == 78
    assert "issuer is not set" in node.log.read_text()
