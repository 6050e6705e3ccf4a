"""What is installed: the entry points of the groups `wetware.v…`.

Source: https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wetware.base.installed import distributions
from wetware.base.log import get_logger
from wetware.hookspecs import PROJECT

if TYPE_CHECKING:
    from importlib import metadata

    from packaging.requirements import Requirement

log = get_logger("plugins")

PLUGINS_MAX: Final = 256
"""Entry points of our groups in one environment."""
AUTH: Final = "auth_"
"""The name of an auth backend's plugin begins so, and people leave it out."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
"""Of a plugin, and of a service."""
_RESERVED: Final = frozenset({"enable", "disable"})  # settings of [plugins]
_VERSIONED = re.compile(r"wetware\.(v\d+)\Z")


@dataclass(frozen=True, slots=True)
class Offer:
    """An entry point of a group `wetware.v…`, and the distribution that has it.

    Attributes:
        value: `module` or `module:attribute`.
        requires: Its `Requires-Dist` lines.
    """

    group: str
    name: str
    value: str
    dist: str
    version: str
    extras: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    @property
    def bundled(self) -> bool:
        return canonical(self.dist) == PROJECT

    @property
    def package(self) -> str:
        return re.split(r"[.:]", self.value, maxsplit=1)[0].strip()

    @property
    def label(self) -> str:
        return f"{self.dist} {self.version}".strip()

    def requirements(self) -> Iterable[Requirement]:
        """`requires`, but for what pip would not install."""
        from packaging.requirements import (  # 30 ms: not in each `ww`
            InvalidRequirement,
            Requirement,
        )

        for line in self.requires:
            try:
                yield Requirement(line)
            except InvalidRequirement:
                continue


def is_plugin_name(name: str) -> bool:
    """Whether a plugin may have the name."""
    return bool(NAME.match(name)) and name not in _RESERVED


def canonical(name: str) -> str:
    """A distribution's or an extra's name, as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find(paths: Iterable[str] | None = None) -> tuple[Offer, ...]:
    """Every entry point of a group `wetware.v…`, bundled ones first, in an order that never varies.

    Unreadable metadata is skipped and logged. Of two distributions of one name the first on the
    path counts, as in an import.

    Args:
        paths: Folders; default `sys.path`.
    """
    found: list[Offer] = []
    seen: set[str] = set()
    for dist in distributions(paths):
        try:
            offers = _offers(dist)
            key = canonical(offers[0].dist) if offers else ""
        except Exception as exc:  # files of anybody's
            log.warning("plugin.metadata_unreadable", path=getattr(dist, "_path", dist), error=exc)
            continue
        if offers and key not in seen:
            seen.add(key)
            found += offers
    found.sort(key=lambda o: (not o.bundled, canonical(o.dist), o.name, o.group, o.value))
    if len(found) > PLUGINS_MAX:
        log.warning("plugin.too_many", found=len(found), limit=PLUGINS_MAX)
    return tuple(found[:PLUGINS_MAX])


def _offers(dist: metadata.Distribution) -> list[Offer]:
    points = [point for point in dist.entry_points if _VERSIONED.match(point.group)]
    if not points:
        return []
    about = dist.metadata  # parsed anew at each access, as its name and version are
    extras = tuple(about.get_all("Provides-Extra") or ())
    requires = tuple(about.get_all("Requires-Dist") or dist.requires or ())
    return [
        Offer(
            point.group,
            point.name,
            point.value.partition("[")[0].strip(),
            about["Name"],
            about["Version"],
            extras,
            requires,
        )
        for point in points
    ]
