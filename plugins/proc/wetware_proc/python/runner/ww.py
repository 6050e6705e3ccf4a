"""In a Python guest: the capabilities that it was given.

    import ww
    out = ww.grant("out")
    out.publish(data=b"hello")

An object of its own is served under a name:

    ww.export("counter", Counter())
    ww.serve()

What they take and give is plain: None, bool, int, float, str, bytes, list, dict, capabilities.
"""

import inspect
import io
import os
import struct
import sys
import traceback

from componentize_py_types import Err
from wit_world.imports import host

_TAG = 39


class Error(Exception):
    """What a call of a capability fails with.

    Attributes:
        code: Of the error, as everywhere in wetware; e.g. "revoked".
    """

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Capability:
    """Something that can be called: each method is an attribute, its parameters are keywords."""

    def __init__(self, handle):
        self._handle = handle

    def __getattr__(self, method):
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda **params: self._call(method, params)

    def __repr__(self):
        return f"<capability {self._handle}>"

    def __del__(self):
        host.drop(self._handle)

    def _call(self, method, params):
        message = encode([method, params]).decode("latin-1")
        results = decode(_done(host.call, self._handle, message).encode("latin-1"))
        if isinstance(results, dict) and len(results) == 1:
            return next(iter(results.values()))
        return results


def _done(function, *args):
    try:
        return function(*args)
    except Err as exc:
        code, _, message = exc.value.encode("latin-1").decode(errors="replace").partition("\n")
        raise Error(code, message) from None


def grant(name):
    """The capability of a name. Raises Error "not_found.grant"."""
    return Capability(_done(host.cap, name.encode().decode("latin-1")))


def offer(name, capability):
    """Let the spawner have a capability by a name, while the program runs and after its end."""
    _done(host.offer, name.encode().decode("latin-1"), capability._handle)


def attempt():
    """Which try this is of the same call, from 1: others may have done a part of it before."""
    return int(os.environ.get("WW_ATTEMPT", "1"))


_exported = {}  # handle → object


def export(name, thing):
    """Let the spawner have an object by a name: its methods without a `_` in front can be called.

    Returns its capability, which can be given to others. Calls wait until `serve`.
    """
    handle = _done(host.serve, name.encode().decode("latin-1"))
    _exported[handle] = thing
    return Capability(handle)


def serve():
    """Answer calls of what was exported, one after the other, until the program is ended.

    What a method returns is plain, or a capability; what it raises its caller gets as a line.
    """
    while True:
        message = decode(_done(host.accept).encode("latin-1"))
        try:
            _done(host.reply, message[0], _answer(*message[1:]).decode("latin-1"))
        except Error as exc:  # its caller has gone, or was told
            if exc.code != "not_found.call":
                sys.stderr.write(told(exc))


def _answer(handle, method, params):
    try:
        return encode([True, _method(_exported[handle], method)(**params)])
    except Exception as exc:
        sys.stderr.write(told(exc))
        return encode([False, "".join(traceback.format_exception_only(exc)).strip()])


def _method(thing, name):
    if name.startswith("_") or not inspect.isroutine(getattr(type(thing), name, None)):
        raise AttributeError(f"there is no method {name!r}")
    return getattr(thing, name)


def _serve(function):
    """Call a function with what is on stdin, and write what it returns to stdout."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    # Nothing follows, and to see its end is a call of the host more.
    args = _decode(sys.stdin.buffer, lambda place: grant(f"argument {place}"))
    offered = {}

    def returned(capability):
        if capability._handle not in offered:
            offer(f"result {capability._handle}", capability)
            offered[capability._handle] = capability

    try:
        reply = encode([True, function(*args)], returned)
    except Exception as exc:
        reply = encode([False, told(exc)])
    stdout.buffer.write(reply)
    stdout.flush()


def told(exc):
    """A traceback without the frames of the runner."""
    frame = exc.__traceback__
    while frame is not None and frame.tb_frame.f_globals.get("__name__") in ("app", "ww"):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(exc), exc, frame or exc.__traceback__))


# --- CBOR (RFC 8949), of plain values ------------------------------------------------------------


def encode(value, tell=lambda capability: None):
    """`tell` is called with each capability in it."""
    out = bytearray()
    _encode(value, out, tell)
    return bytes(out)


def _head(major, number, out):
    if number < 24:
        out.append(major << 5 | number)
        return
    for form, size in enumerate((1, 2, 4, 8), 24):
        if number >> 8 * size == 0:
            out.append(major << 5 | form)
            out += number.to_bytes(size)
            return
    raise ValueError("an integer of more than 64 bits")


def _encode(value, out, tell):
    if value is None or value is True or value is False:
        out.append({None: 0xF6, True: 0xF5, False: 0xF4}[value])
    elif isinstance(value, int):
        _head(0 if value >= 0 else 1, value if value >= 0 else -1 - value, out)
    elif isinstance(value, float):
        out += struct.pack(">Bd", 0xFB, value)
    elif isinstance(value, str):
        data = value.encode()
        _head(3, len(data), out)
        out += data
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _head(2, len(value), out)
        out += value
    elif isinstance(value, (list, tuple)):
        _head(4, len(value), out)
        for each in value:
            _encode(each, out, tell)
    elif isinstance(value, dict):
        _head(5, len(value), out)
        for key, each in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is text, and not {type(key).__name__}")
            _encode(key, out, tell)
            _encode(each, out, tell)
    elif isinstance(value, Capability):
        tell(value)
        _head(6, _TAG, out)
        _head(0, value._handle, out)
    else:
        raise TypeError(
            f"{type(value).__name__} is none of None, bool, int, float, str, bytes, list, dict "
            "and capabilities"
        )


def decode(data, capability=Capability):
    source = io.BytesIO(data)
    value = _decode(source, capability)
    if source.read(1):
        raise ValueError("bytes after the end")
    return value


def _decode(source, capability):
    (first,) = source.read(1)
    major, number = first >> 5, first & 31
    if major == 7:
        if number in (25, 26, 27):
            form = ">" + " efd"[number - 24]
            return struct.unpack(form, source.read(struct.calcsize(form)))[0]
        return {20: False, 21: True, 22: None, 23: None}[number]
    if number >= 24:
        number = int.from_bytes(source.read(1 << number - 24))
    if major < 2:
        return -1 - number if major else number
    if major < 4:
        piece = source.read(number)
        return piece.decode() if major == 3 else piece
    if major == 4:
        return [_decode(source, capability) for _ in range(number)]
    if major == 5:
        return {_decode(source, capability): _decode(source, capability) for _ in range(number)}
    return capability(_decode(source, capability))
