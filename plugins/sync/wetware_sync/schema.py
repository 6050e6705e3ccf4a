"""sync.capnp, loaded: shared by the services and the clients."""

from __future__ import annotations

from pathlib import Path

from wetware import rpc

SCHEMA = rpc.load(Path(__file__).with_name("sync.capnp"))
