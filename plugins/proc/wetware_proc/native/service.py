"""The service `native`: who may run programs of the machine itself, which is a bigger promise."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.hookspecs import Finding, Service
from wetware_proc.native.driver import KIND, NativeImage, probe
from wetware_proc.schema import SCHEMA
from wetware_proc.service import ImageServant, ProcService, owner_of

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.identity import Principal
    from wetware_proc.process import Process

PROGRAM_CHARS_MAX: Final = 512  # of a command, and of the names of its grants, in the record


class NativeService(Service):
    """See `hookspecs.Service`. Its processes are among those of `proc`, which runs them."""

    name = "native"
    interface = SCHEMA.Native
    roles = MappingProxyType(
        {"reader": frozenset(), "member": frozenset(), "admin": frozenset({"*"})}
    )

    def __init__(self, proc: ProcService) -> None:
        self._proc = proc
        self._found: list[Finding] = []
        proc.table.programs[KIND] = NativeImage

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        self._found = await probe()
        task_status.started()
        await anyio.sleep_forever()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return NativeServant(self._proc, str(principal))

    def findings(self) -> Iterable[Finding]:
        return self._found


class NativeServant(rpc.Servant, interface=SCHEMA.Native):
    """See proc.capnp."""

    def __init__(self, proc: ProcService, principal: str) -> None:
        self._proc, self._principal = proc, principal

    async def program(self) -> dict[str, Any]:
        owner = owner_of(self._principal)
        return {"image": NativeImageServant(self._proc, owner, NativeImage())}

    async def detach(
        self, spec: dict[str, Any], policy: str, session: rpc.Ref | None
    ) -> dict[str, Any]:
        owner, image = owner_of(self._principal), NativeImage()
        detach = self._proc.supervisor.detach
        return {"id": await detach(owner, image, None, spec, policy, session)}


class NativeImageServant(ImageServant, interface=SCHEMA.Image):
    """Records what is run before it begins: the sandbox is the machine's own kernel."""

    async def _start(self, spec: dict[str, Any], *read: Any) -> Process:
        program = " ".join(spec["args"])[:PROGRAM_CHARS_MAX]
        named = ",".join(sorted(each["name"] for each in spec["grants"]))[:PROGRAM_CHARS_MAX]
        guard = rpc.current_guard()
        await self._service.ctx.admit(guard, "native.spawned", program=program, grants=named)
        return await super()._start(spec, *read)
