"""Cap'n Proto RPC between asyncio programs: plain values, plain classes, references.

```capnp
interface Topic {
  publish @0 (message :Data $Ww.constrained) -> ();
  subscribe @1 (sink :Ww.Sink) -> (subscription :Ww.Subscription);
}
```

```python
schema = rpc.load(Path(__file__).with_name("chat.capnp"))

class TopicServant(rpc.Servant, interface=schema.Topic):
    async def publish(self, message: bytes) -> None: ...
    async def subscribe(self, sink: rpc.Ref | None) -> dict:  # see `Pump`
        return {"subscription": pump}  # a Ref at the caller

async with rpc.serve_unix(path, lambda peer: TopicServant()):
    ...

async with await rpc.connect_unix(path) as connection:
    topic = connection.bootstrap(schema.Topic)
    await topic.publish(message=b"hello")  # a dict of results, None if the method has none
```

A struct is a dict with snake_case keys, a union holds its set member only, an enum is a str, a list
a list, Data bytes, a capability a Ref; where a capability is wanted, give a Servant,
`guarded(servant, guard)` or a Ref. Errors are `wetware.errors` on both sides: code, message and
hint travel, nothing else does; a value of a wrong type is a TypeError of the program that gives it.
A servant's methods run concurrently, each call in a task; cancelling a call cancels its task, and
so does the end of its time (`time_limit`). `RpcLimits` names what a connection may hold.

This package is the only one that knows pycapnp, and no pycapnp object leaves it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.rpc import packed
from wetware.rpc.compiler import known, load
from wetware.rpc.connection import connect, serve
from wetware.rpc.dispatch import (
    Guarded,
    ServedConnection,
    current_connection,
    current_guard,
    guarded,
)
from wetware.rpc.kjloop import loop_gc, runtime
from wetware.rpc.limits import RpcLimits
from wetware.rpc.pipes import SocketPipe
from wetware.rpc.push import Pump, Slow, Subscription, regained
from wetware.rpc.refs import Ref, RpcConnection, time_limit
from wetware.rpc.schema import WW, Interface, Method, Schema
from wetware.rpc.servant import Guard, Servant
from wetware.rpc.unix import (
    CONNECTIONS_MAX,
    REFUSALS_MAX,
    UnixPeer,
    connect_unix,
    loopback,
    serve_unix,
)

if TYPE_CHECKING:
    from wetware.rpc.bytestream import ByteStream

__all__ = [
    "CONNECTIONS_MAX",
    "REFUSALS_MAX",
    "WW",
    "ByteStream",
    "Guard",
    "Guarded",
    "Interface",
    "Method",
    "Pump",
    "Ref",
    "RpcConnection",
    "RpcLimits",
    "Schema",
    "Servant",
    "ServedConnection",
    "Slow",
    "SocketPipe",
    "Subscription",
    "UnixPeer",
    "connect",
    "connect_unix",
    "current_connection",
    "current_guard",
    "guarded",
    "known",
    "load",
    "loop_gc",
    "loopback",
    "packed",
    "regained",
    "runtime",
    "serve",
    "serve_unix",
    "time_limit",
]


def __getattr__(name: str) -> object:
    if name == "ByteStream":  # anyio.abc takes a command 20 ms and more to import
        from wetware.rpc.bytestream import ByteStream

        return ByteStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
