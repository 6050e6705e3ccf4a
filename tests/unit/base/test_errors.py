"""The error tree survives the wire."""

from __future__ import annotations

import pytest

from wetware import client, errors


def _tree(cls: type[errors.WetwareError]) -> list[type[errors.WetwareError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _tree(child))]


def test_every_class_comes_back_as_itself() -> None:
    core = [c for c in _tree(errors.WetwareError) if c.__module__ == "wetware.errors"]
    assert len(core) > 20
    for cls in core:
        back = errors.from_wire(cls.code, "what and why", "next step")
        assert type(back) is cls
        assert (back.message, back.hint, back.code) == ("what and why", "next step", cls.code)


def test_codes_are_unique() -> None:
    core = [c for c in _tree(errors.WetwareError) if c.__module__ == "wetware.errors"]
    assert len({c.code for c in core}) == len(core)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("capability.revoked.by.admin", errors.Revoked),
        ("capability.something_new", errors.CapabilityError),
        ("node.stopping", errors.Disconnected),
        ("auth.refused.no_role", errors.AuthError),  # LoginRefused is what a client makes itself
        ("nonsense", errors.WetwareError),
        ("", errors.WetwareError),
    ],
)
def test_an_unknown_code_is_its_nearest_known_kind(
    code: str, expected: type[errors.WetwareError]
) -> None:
    assert client.LoginRefused.code == errors.AuthError.code
    assert type(errors.from_wire(code, "m")) is expected


def test_exit_codes() -> None:
    assert errors.from_wire("capability.denied", "").exit_code == 77
    assert errors.from_wire("overlay.dial", "").exit_code == 69
    assert errors.from_wire("config.listen", "").exit_code == 78
    assert errors.from_wire("config.busy.port", "").exit_code == 75
    assert errors.from_wire("invalid.multiaddr", "").exit_code == 2
