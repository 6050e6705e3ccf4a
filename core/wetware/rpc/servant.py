"""Servants: plain classes whose methods a schema names, and the guards that stand before them."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import asyncio

    from wetware.errors import WetwareError
    from wetware.rpc.schema import Interface, Method


class Guard(Protocol):
    """Decides whether a call on a guarded servant may run. Asked for each: about a microsecond."""

    @property
    def ended(self) -> WetwareError | None:
        """Why nothing may be called any more, or None while the guard lives."""
        ...

    @property
    def blocked(self) -> WetwareError | None:
        """Why nothing may pass now, for good (`ended`) or for a time; asked for calls outwards."""
        ...

    @property
    def payer(self) -> str | None:
        """The principal who answers for what is used under it: of a share, whoever gave it.

        None where no principal does.
        """
        ...

    @property
    def metered(self) -> bool:
        """Whether `charge` has to be asked."""
        ...

    def enter(
        self,
        method: Method,
        args: dict[str, object],
        task: asyncio.Task[Any],
        passed: bool = False,
    ) -> Awaitable[None] | None:
        """A call starts. Raises WetwareError to refuse it.

        Of packed values it may cut `args` to those that may pass, the first ones.
        It is `passed` where it goes on to somebody else's object, whose own guard judges it there.
        What is returned is awaited before the method runs, and may raise likewise; the call has
        entered by then, and leaves in any case. When the guard ends it cancels the tasks that
        entered and did not leave; their callers then get `ended`.
        """
        ...

    def charge(self, method: Method, nbytes: int) -> Awaitable[None] | None:
        """So many bytes of a method's results, or of a call on a callback, are to be sent.

        Raises WetwareError to refuse; what is returned is awaited before, and may raise.
        """
        ...

    def onward(self, method: Method, args: Mapping[str, object], passed: bool = False) -> Guard:
        """The guard of what a call that entered returns: this one, or a narrower one."""
        ...

    def leave(self, task: asyncio.Task[Any]) -> None:
        """A call that entered is over, however it ended."""
        ...

    def on_end(self, callback: Callable[[WetwareError], None]) -> Callable[[], None]:
        """Call back once, when the guard ends; returns a remover. At once if it has ended."""
        ...

    def exported(self) -> None:
        """A peer holds one more object under it."""
        ...

    def unexported(self) -> bool:
        """One fewer; returns whether `let_go` has to be called, in a turn of its own."""
        ...

    def let_go(self) -> None:
        """Perhaps nobody holds an object under it any more."""
        ...


class Servant:
    """Base of objects that peers can call: `class TopicServant(Servant, interface=schema.Topic)`.

    One async method per schema method (superclasses' included), in snake_case, with the parameters
    in snake_case as keywords. Returns a dict of results, or None if there are none. The class is
    checked against the schema when it is defined: TypeError says what is missing.

    Values are plain: see `wetware.rpc`. Raise `wetware.errors` to tell the caller why; any other
    exception is logged here and reaches the caller as InternalError.
    """

    __ww_interface__: ClassVar[Interface | None] = None
    # Live exports of this object over all connections, kept by the connections.
    __ww_exports__: int = 0

    def __init_subclass__(cls, *, interface: Interface | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if interface is not None:
            cls.__ww_interface__ = interface
        if cls.__ww_interface__ is not None:
            _check_binding(cls, cls.__ww_interface__)

    def released(self) -> Any:
        """The last remote reference is gone: dropped, or its connection ended.

        Called as well if the object was returned and never reached the peer: the answer failed, or
        the call was cancelled meanwhile. May be a coroutine function. Called again if the object is
        exported again and released again.
        """


def _check_binding(cls: type[Servant], interface: Interface) -> None:
    for method in interface.methods.values():
        where = f"{cls.__name__}.{method.name}"
        function = getattr(cls, method.name, None)
        if not callable(function) or function is getattr(Servant, method.name, None):
            raise TypeError(
                f"{where} is missing: define `async def {method.name}("
                f"{', '.join(('self', *method.params))})` for {interface.name}"
            )
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{where} must be `async def`")
        _check_signature(where, function, method)


def _check_signature(where: str, function: Callable[..., Any], method: Method) -> None:
    params = list(inspect.signature(function).parameters.values())[1:]  # without self
    if any(p.kind is p.VAR_KEYWORD for p in params):
        return
    keywords = {p.name for p in params if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if missing := [name for name in method.params if name not in keywords]:
        raise TypeError(
            f"{where} lacks the parameter{'s' * (len(missing) > 1)} {', '.join(missing)} of "
            f"{method.interface.name}.{method.name}({', '.join(method.params)})"
        )
    extra = [
        p.name
        for p in params
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in method.params
    ]
    if extra:
        raise TypeError(
            f"{where} wants {', '.join(extra)}, which {method.interface.name}.{method.name} has not"
        )
