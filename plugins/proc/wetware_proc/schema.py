"""proc.capnp, loaded: shared by the service and the client."""

from __future__ import annotations

from pathlib import Path

from wetware import rpc

SCHEMA = rpc.load(Path(__file__).with_name("proc.capnp"))
