"""How a node starts its recorder, auth backend and services, and what their ends mean to it."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import anyio

from wetware.base.log import get_logger
from wetware.errors import Busy, PluginError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from anyio.abc import TaskGroup, TaskStatus

    from wetware.broker.records import Records
    from wetware.hookspecs import AuthBackend, Service

log = get_logger("node")

START_S_MAX = 60.0
"""For the auth backend and each service to be started, on a slow machine under load too."""
STILL_S = 10.0
"""After that the log says which of them is waited for."""


async def _start(
    tasks: TaskGroup, kind: str, name: str, run: Callable[..., Coroutine[Any, Any, None]]
) -> None:
    """Start `run` in `tasks`, and wait until it is started.

    Raises Busy after START_S_MAX, PluginError where it returns before, and what it raises.
    """
    returned = False

    async def noted(*, task_status: TaskStatus[None]) -> None:
        nonlocal returned
        await run(task_status=task_status)
        returned = True

    what = f"{kind} {name}"
    said = asyncio.get_running_loop().call_later(
        STILL_S, lambda: log.info("node.still_waiting", what=what, at_most_s=START_S_MAX)
    )
    try:
        with anyio.fail_after(START_S_MAX):
            await tasks.start(noted, name=what)
    except TimeoutError:
        raise Busy(
            f"the {kind} {name!r} was not ready within {START_S_MAX:g} s",
            hint="its log lines above say what it is waiting for",
            code=f"config.busy.{kind.split()[0]}",
        ) from None
    except RuntimeError:
        if not returned:
            raise
        raise PluginError(
            f"the {kind} {name!r} returned before it had started",
            hint="`run` calls task_status.started() once it is ready; tell its authors",
        ) from None
    finally:
        said.cancel()


async def start_backend(backend: AuthBackend, tasks: TaskGroup) -> None:
    """Wait until the backend can decide; raises Busy or PluginError where it cannot.

    Its failure is that of `tasks`, and so is its end: nobody decides in its place.
    """
    started = False

    async def run(*, task_status: TaskStatus[None]) -> None:
        why = "it returned"
        try:
            await backend.run(task_status=task_status)
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -inf:
                raise
            why = "it cancelled itself"
        if started:
            raise PluginError(
                f"the auth backend {backend.name!r} has ended: {why}",
                hint="start the node again, and tell its authors",
            )

    await _start(tasks, "auth backend", backend.name, run)
    started = True


@contextlib.asynccontextmanager
async def recording(records: Records) -> AsyncIterator[None]:
    """The recorder runs: from before anything is decided until nothing is any more.

    Raises what its start raises, Busy and PluginError as well. Its end is not the node's: nothing
    is given any more then, and everything can be ended.
    """
    if (recorder := records.recorder) is None:
        log.warning("audit.none", hint='decisions are not recorded: [node] audit = "none"')
        yield
        return
    started = False

    async def run(*, task_status: TaskStatus[None]) -> None:
        try:
            await recorder.run(task_status=task_status)
            records.failed = "it returned"
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -inf:
                raise
            records.failed = "it cancelled itself"
        except Exception as exc:
            if not started:
                raise
            records.failed = f"{type(exc).__name__}: {exc}"
            log.exception("recorder.ended", recorder=recorder.name)
        else:
            log.error("recorder.ended", recorder=recorder.name, why=records.failed)

    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        try:
            await _start(tasks, "recorder", recorder.name, run)
            started = True
            yield
        except BaseException as exc:  # raised as it is, and not in a group
            failure = exc
        finally:
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def start_services(
    services: dict[str, Service],
    tasks: TaskGroup,
    failed: Callable[[str, Exception], None],
) -> None:
    """Start all of them at once, and wait until each serves or has failed.

    A service that ends, fails or is not started within START_S_MAX is taken out of `services`; the
    others go on.

    Args:
        services: By name; what is offered.
        tasks: Where they run.
        failed: Called with the name of a service and what it raised.
    """

    async def start(service: Service) -> None:
        try:
            with contextlib.suppress(PluginError):  # it ended, and the log says why
                await _start(tasks, "service", service.name, partial(run, service))
        except Busy:
            log.warning("service.not_ready", service=service.name, after_s=START_S_MAX)

    async def run(service: Service, *, task_status: TaskStatus[None]) -> None:
        try:
            await service.run(task_status=task_status)
            log.warning("service.ended", service=service.name)
        except asyncio.CancelledError:
            # Not raised again: anyio would end all of them with one that cancels itself.
            if anyio.current_effective_deadline() > -inf:
                log.error("service.cancelled_itself", service=service.name, exc_info=True)
        except Exception as exc:
            log.exception("service.failed", service=service.name)
            failed(service.name, exc)
        finally:
            services.pop(service.name, None)

    async with anyio.create_task_group() as starting:
        for service in tuple(services.values()):
            starting.start_soon(start, service)
