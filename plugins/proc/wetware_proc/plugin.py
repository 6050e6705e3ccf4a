"""The hooks of proc."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from wetware.hookspecs import PluginContext, Service, hookimpl

if TYPE_CHECKING:
    import typer

    from wetware_proc.driver import Driver

if importlib.util.find_spec("wasmtime") is None:  # looked for, not imported
    raise ModuleNotFoundError("No module named 'wasmtime'", name="wasmtime")


@hookimpl
def ww_register_config() -> type:
    """`[plugins.proc]`."""
    from wetware_proc.config import ProcConfig

    return ProcConfig


@hookimpl
def ww_register_services(ctx: PluginContext) -> Iterable[Service]:
    """The service `proc`, and `native` where the configuration has it."""
    from wetware_proc.python.driver import PythonDriver
    from wetware_proc.service import ProcService
    from wetware_proc.wasm.driver import wasm_driver

    @asynccontextmanager
    async def drivers() -> AsyncIterator[Mapping[str, Driver]]:
        async with (
            wasm_driver(ctx.data_dir) as wasm,
            aclosing(PythonDriver(ctx.data_dir, wasm)) as python,
        ):
            yield {"wasm": wasm, "python": python}

    proc = ProcService(ctx, drivers)
    if not ctx.config.native:
        return (proc,)
    from wetware_proc.native.service import NativeService

    return (proc, NativeService(proc))


@hookimpl
def ww_register_commands(app: typer.Typer) -> None:
    """`ww run`, `ww ps` and those of one process."""
    from wetware_proc.cli import mount

    mount(app)
