"""Garbage in: a clear error out, and the node goes on."""

from __future__ import annotations

import os
import random
import socket

import pytest

from wetware.testing import Home, NodeProcess


def _start(home: Home, toml: str) -> tuple[int, str]:
    (home.path / ".wetware").mkdir(exist_ok=True)
    (home.path / ".wetware" / "ww.toml").write_text(toml)
    node = home.start_node()
    return node.process.wait(60), node.log.read_text()


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[node]\nlissten = []", "listen"),
        ("[nod]\n", "node"),
        ("[plugins.pubsub]\nmessage_bytes_mx = 5", "message_bytes_max"),
        ("[node]\npeers = 7", "peers"),
        ("[node]\npeers = ['nonsense']", "nonsense"),
        ("[login]\ndeadline_s = -1", "deadline_s"),
        ("[node\n", "ww.toml"),
        ("[plugins]\nenable = ['pubsbu']", "pubsub"),
    ],
)
def test_a_bad_configuration_stops_the_start_and_names_the_place(
    home: Home, toml: str, says: str
) -> None:
    code, said = _start(home, toml)
    assert code == 78, said
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize("content", [b"", b"\xff" * 300, b"not a key\n"])
def test_a_garbage_node_key_stops_the_start(home: Home, content: bytes) -> None:
    (home.path / "n").mkdir()
    file = home.path / "n" / "node.key"
    file.write_bytes(content)
    file.chmod(0o600)
    node = home.start_node("n")
    assert node.process.wait(60) == 78
    said = node.log.read_text()
    assert "node.key" in said
    assert "Traceback" not in said
    assert file.read_bytes() == content, "a key file is never overwritten"


def test_a_damaged_policy_stops_the_start(home: Home) -> None:
    with home.node("n") as node:
        policy = node.data_dir / "plugins/auth_local/policy.json"
    policy.write_bytes(policy.read_bytes().replace(b"admin", b"nimda"))
    node = home.start_node("n")
    assert node.process.wait(60) == 78
    assert "damaged" in node.log.read_text()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--node", "/ip4/nonsense", "whoami"], 2, "bad address"),
        (["--node", "nonsense", "whoami"], 1, "no living member"),
        (["--node", "/ip4/127.0.0.1/tcp/1", "whoami"], 2, "which node is expected"),
        (
            [
                "--node",
                "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB",
                "whoami",
            ],
            69,
            "127.0.0.1",
        ),
        (["--key", "nobody", "whoami"], 78, " key new"),
        (["pub", "bad topic\n", "x"], 2, "topic"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_arguments(node: NodeProcess, args: list[str], code: int, says: str) -> None:
    done = node.ww(*args)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_garbage_on_the_wire_and_the_socket(node: NodeProcess) -> None:
    rng = random.Random(7)
    host, port = node.addr.split("/")[2], int(node.addr.split("/")[4])
    junk = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff" * 70_000,
        b"\xff" * 10_000,
        *(rng.randbytes(rng.randrange(1, 5000)) for _ in range(40)),
    ]
    for data in junk:
        for family, address in (
            (socket.AF_INET, (host, port)),
            (socket.AF_UNIX, str(node.data_dir / "ww.sock")),
        ):
            with socket.socket(family, socket.SOCK_STREAM) as peer:
                peer.settimeout(10)
                peer.connect(address)
                try:
                    peer.sendall(data)
                    peer.shutdown(socket.SHUT_WR)
                    while peer.recv(65536):
                        pass
                except (ConnectionError, TimeoutError):
                    pass
    assert node.ww("whoami").returncode == 0
    assert node.process.poll() is None
    assert len(os.listdir(f"/proc/{node.process.pid}/fd")) < 100
