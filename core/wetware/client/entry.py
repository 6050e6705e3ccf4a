"""`connect`: from an address, a reference, or nothing at all to a session."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.base import paths
from wetware.base.structs import from_struct
from wetware.broker.protocol import CORE
from wetware.broker.sturdy import SturdyRef, is_ref
from wetware.broker.told import GrantInfo
from wetware.client import contexts
from wetware.client.contexts import Context
from wetware.client.dial import (
    CONNECT_S,
    LocalNode,
    Place,
    is_address,
    local,
    peer_in,
    remote,
    within,
)
from wetware.client.granted import granted, is_granted
from wetware.client.keys import KeyChoice, chooser
from wetware.client.login import Login
from wetware.client.reconnect import Reconnecting
from wetware.client.session import CALL_S, Session, log_in, reached, redeemed, tunnelled
from wetware.errors import ConfigError, DialError, InvalidArgument, WetwareError

if TYPE_CHECKING:
    from wetware.identity import Challenge, Key, PeerId, Signer

ASKING_AFTER_S = 3.0
"""What dialling may take before a tunnel is tried for which somebody may be asked to sign."""


async def _issuer(
    stack: contextlib.AsyncExitStack,
    ref: SturdyRef,
    choose: Callable[[Challenge], Signer],
    data_dir: Path,
    timeout_s: float,
) -> Place:
    """The Gate of a reference's issuer: over the unix socket if it is on this machine.

    Else it is dialled, or reached through a tunnel of this machine's node, if one runs and lets in
    whom `choose` signs for.
    """
    tunnel = None
    with contextlib.suppress(WetwareError):
        if (here := LocalNode.find(data_dir)).peer_id == ref.peer:
            return await local(stack, here)
        tunnel = functools.partial(_tunnel, stack, choose, here, ref.peer)
    if not ref.addrs and tunnel is None:
        raise DialError(
            f"the reference says nothing of where its node {ref.peer} is",
            hint="use it on the machine of that node, or of another member",
        )
    return await reached(
        stack, map(str, ref.addrs), ref.peer, tunnel, timeout_s, tunnel_after_s=ASKING_AFTER_S
    )


async def _tunnel(
    stack: contextlib.AsyncExitStack,
    choose: Callable[[Challenge], Signer],
    node: LocalNode,
    peer: PeerId,
) -> Place:
    """The Gate of `peer`, through this machine's node."""
    session = await log_in(Login(choose, node.cluster), await local(stack, node))
    stack.push_async_callback(session.close)
    return await tunnelled(stack, session, peer)


async def describe(
    ref: str,
    *,
    key: Key | Path | str | None = None,
    data_dir: Path | None = None,
    timeout_s: float = CONNECT_S,
) -> GrantInfo:
    """What a sturdy reference would give, without spending a use; raises as `connect` does."""
    parsed = SturdyRef.parse(ref)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(rpc.runtime())
        async with within(timeout_s, f"the node {parsed.peer}"):
            alone = chooser(None, KeyChoice(key, None, None), unattended=True)
            where = data_dir or paths.data_dir()
            connection, _, _ = await _issuer(stack, parsed, alone, where, timeout_s)
            gate = connection.bootstrap(CORE.Gate)
            reply = await gate.call("describe", id=bytes.fromhex(parsed.id), secret=parsed.secret)
        return from_struct(GrantInfo, reply["grant"])


async def _enter(
    stack: contextlib.AsyncExitStack, choose: Callable[[Challenge], Signer], context: Context
) -> Session:
    """Log in at a context's node, or at this machine's if the context names another by a selector.

    The cluster is the one that is pinned, or is pinned now.
    """
    if is_address(context.node):
        peer = peer_in(context.node)
        pinned = context.cluster or contexts.load().clusters.get(peer, "")
        place = await remote(stack, context.node.split(","), peer)
        name = context.name or peer
    else:
        node = LocalNode.find(_data_dir(context))
        pinned, name = context.cluster or node.cluster, context.name
        place = await local(stack, node)
    session = await log_in(Login(choose, pinned, name), place)
    cluster = session.identity.cluster
    if name and not (context.cluster if context.name else pinned):
        what = f"in the context {name}" if context.name else f"at {name}"
        session.notice = f"first login {what}: from now on the cluster there has to be {cluster}"
        try:
            contexts.update(lambda known: known.pin(name, cluster))
        except ConfigError as exc:
            session.notice = f"the cluster {cluster} {what} is not remembered: {exc.message}"
    return session


async def _reach(
    stack: contextlib.AsyncExitStack,
    choose: Callable[[Challenge], Signer],
    context: Context,
    goal: str,
    timeout_s: float,
) -> Session:
    """Log in at a context's node, and from there at the one that `goal` selects, if it does."""
    target = context.node if is_address(context.node) else "the local node"
    async with within(timeout_s, target):
        session = await _enter(stack, choose, context)
    if goal:
        entry = session
        session = await stack.enter_async_context(entry.node(goal, timeout_s=timeout_s))
        session.notice = entry.notice
    return session


def _data_dir(context: Context) -> Path:
    return Path(context.data_dir) if context.data_dir else paths.data_dir()


@contextlib.asynccontextmanager
async def connect(
    target: str | None = None,
    *,
    context: Context | str | None = None,
    key: Key | Path | str | None = None,
    signer: Signer | None = None,
    data_dir: Path | None = None,
    passphrase: Callable[[], str] | None = None,
    timeout_s: float = CONNECT_S,
    reconnect: bool | Callable[[str], None] = False,
) -> AsyncIterator[Session]:
    """Log in to a node.

    In a program that a node runs, `ww run -- PROGRAM`, and without any argument it is no login: the
    session has what the program was given (`wetware.client.granted`), once in a process.

    Args:
        target: A multiaddr with the node's peer ID (several, comma-separated, for one node), a
            sturdy reference `ww1…` (then no key is needed, unless its node cannot be dialled and
            is reached through a tunnel of this machine's node), or what `Session.node` takes, a
            name or "zone=cloud": then the login here leads to one there. None for WW_NODE, or else
            the context's node.
        context: Its name, or an object of one's own. None for WW_CONTEXT, or else the one that
            `ww context use` chose; without that, this machine's node.
        key: The user's key: an object, a file, or a name under `~/.wetware/keys`; default
            WW_KEY, the context's, or "default".
        signer: Answers the challenge instead of `key`.
        data_dir: Of this machine's node, instead of the context's node.
        passphrase: Called if the key is encrypted; default: WW_PASSPHRASE. It is called on the
            loop, during the login: where a person has to type, ask beforehand.
        timeout_s: For dialling and logging in together, at each node.
        reconnect: Log in again where the connection is lost, e.g. as the node stops, with back-off;
            a function is told of it in words. Calls that were under way raise Disconnected, and are
            not repeated: they may have run. Later ones wait, as their time allows; subscriptions go
            on, with a gap (`gap_s`). What was opened through the session is opened again, and what
            it has logged in to (`Session.node`), but for what the application holds itself: parts
            (`attenuate`), references. Only with a key that signs by itself: nobody is asked for a
            passphrase or at a wallet, and a sturdy reference is not redeemed again. Where it is
            refused, what waits raises why.

    Raises DialError, LoginRefused (with `.status`), AuthError from the signer, or where the cluster
    is not the pinned one, KeyFileError, NotFound for a context or a node of no such name,
    InvalidArgument for a bad address.
    """
    if is_granted() and (target, context, key, signer, data_dir) == (None,) * 5:
        async with granted() as given:
            yield given
        return
    if target == "":
        raise InvalidArgument(
            "the node's address is empty",
            hint="leave it out for this machine's node",
            code="invalid.empty",
        )
    if context is None:
        target = target or paths.variable("WW_NODE")
    chosen = context if isinstance(context, Context) else contexts.choose(context)
    if key is None:
        key = (chosen.key if context else "") or paths.variable("WW_KEY") or chosen.key or None
    if data_dir is not None:
        chosen = Context(data_dir=str(data_dir))
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(rpc.runtime())
        alone = chooser(signer, KeyChoice(key, None, None), unattended=True)
        if target is not None and is_ref(target):
            ref = SturdyRef.parse(target)
            async with within(timeout_s, f"the node {ref.peer}"):  # never the secret itself
                place = await _issuer(stack, ref, alone, _data_dir(chosen), timeout_s)
                session = await redeemed(place.connection, ref)
            session.timeout_s = CALL_S
        else:
            if target is not None and is_address(target):
                chosen, target = Context(node=target), None
            goal = target or ("" if is_address(chosen.node) else chosen.node)
            choose = chooser(signer, KeyChoice(key, None, passphrase))
            session = await _reach(stack, choose, chosen, goal, timeout_s)
            if reconnect:
                pinned = replace(chosen, cluster=session.identity.cluster)
                enter = functools.partial(
                    _reach, choose=alone, context=pinned, goal=goal, timeout_s=timeout_s
                )
                tell = reconnect if callable(reconnect) else lambda _: None
                session._unattended = (
                    alone,
                    lambda session, enter: Reconnecting(session, enter, tell).running(),
                )
                await stack.enter_async_context(Reconnecting(session, enter, tell).running())
        try:
            yield session
        finally:
            session._ref.close()
