"""Run one program by the driver of native programs as another user: `python as_user.py UID < JSON`.

The interpreter may be where only root can go: so all that is needed is imported before.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio._backends._asyncio  # noqa: F401

from wetware import rpc
from wetware.errors import WetwareError
from wetware_proc.driver import Limits, Spec
from wetware_proc.native import sandbox
from wetware_proc.native.driver import NativeImage


async def main(asked: dict[str, Any]) -> dict[str, Any]:
    out, err = bytearray(), bytearray()
    limits = Limits(**{"memory_bytes": 0, "cpu_s": 0, **asked["limits"]})
    dirs = {path: (Path(source), False) for path, source in asked["dirs"].items()}
    spec = Spec(
        args=("it", *asked["command"]),
        limits=limits,
        dirs=dirs,
        stdout=out.extend,
        stderr=err.extend,
    )
    async with rpc.runtime():
        try:
            end = await NativeImage().run(spec)
        except WetwareError as exc:
            return {"code": exc.code, "message": exc.message}
    return {"exit": asdict(end), "out": out.decode(), "err": err.decode()}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    sandbox.bwrap = lambda: request["bwrap"]  # type: ignore[assignment]
    if uid := int(sys.argv[1]):
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    json.dump(asyncio.run(main(request)), sys.stdout)
