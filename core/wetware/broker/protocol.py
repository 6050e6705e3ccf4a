"""core.capnp, loaded: what the broker serves, and the client calls."""

from __future__ import annotations

from pathlib import Path

from wetware import rpc

CORE = rpc.load(Path(__file__).parents[1] / "schema" / "core.capnp")

GATE_PROTOCOL = "/wetware/gate/2.0.0"
"""The libp2p protocol of a stream that carries RPC with a Gate as its bootstrap object."""
