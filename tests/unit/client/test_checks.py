"""What the client compares by itself, before it signs and when it is given a session."""

from __future__ import annotations

import types
from typing import Any

import pytest

from wetware.client import is_address
from wetware.client.login import Login, SignerServant
from wetware.client.session import opened
from wetware.errors import AuthError
from wetware.identity import Challenge, Channel, Key

NODE, OTHER = (Key.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
ONE, TWO = "1" * 40, "2" * 40
CHANNEL = Channel("noise", bytes(32))


def never(challenge: Challenge) -> Any:
    raise AssertionError("nothing is signed for this challenge")


def challenge(cluster: str) -> bytes:
    made = Challenge(bytes(32), NODE, cluster, CHANNEL, ("local-ed25519",), 0, 0)
    return made.signed_bytes()


def reference(node: str, cluster: str) -> Any:
    async def call(method: str) -> dict[str, Any]:
        assert method == "whoami"
        return {"principal": "p", "roles": [], "node": node, "cluster": cluster, "grant": "g"}

    return types.SimpleNamespace(call=call)


@pytest.mark.anyio
@pytest.mark.parametrize("cluster", [TWO, "", "x", "$(id)", "1" * 41])
@pytest.mark.parametrize("pinned", [ONE, ""])
async def test_nothing_is_signed_for_another_cluster(cluster: str, pinned: str) -> None:
    if not pinned and cluster == TWO:
        return  # the first login takes any
    signing = SignerServant(Login(never, pinned, "home"), NODE, CHANNEL)
    with pytest.raises(AuthError, match="the signer refused"):
        await signing.sign(challenge(cluster))
    assert signing.failure is not None
    assert signing.failure.code == "auth.wrong_cluster"
    assert ("ww context accept home" in signing.failure.hint) == (cluster == TWO)
    assert "$" not in signing.failure.hint


@pytest.mark.anyio
@pytest.mark.parametrize(("node", "cluster"), [(OTHER, ONE), ("", ONE), (NODE, TWO), (NODE, "")])
async def test_a_session_is_of_the_node_and_cluster_that_were_meant(
    node: str, cluster: str
) -> None:
    login = Login(never, ONE)
    assert (await opened(reference(NODE, ONE), login, NODE)).identity.node == NODE
    with pytest.raises(AuthError) as caught:
        await opened(reference(node, cluster), login, NODE)
    assert caught.value.code in ("auth.wrong_node", "auth.wrong_cluster")


def test_what_is_an_address() -> None:
    for text in ("/ip4/10.0.0.1/tcp/4001", "10.0.0.1:4001", "db.example.com:4001", "/x"):
        assert is_address(text)
    for text in ("", "42", "db1", "zone=cloud", "name=a:b", "12D3KooW1234", "ww1abc"):
        assert not is_address(text)
