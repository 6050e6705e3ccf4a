"""The distributions of this environment that have entry points of wetware's groups.

Source: https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import metadata

from wetware.base.log import get_logger

log = get_logger("plugins")


def distributions(paths: Iterable[str] | None = None) -> Iterator[metadata.Distribution]:
    """Each that names a group `wetware.…`, in the order of the path.

    Most of what is installed has nothing to do with us, and to parse the entry points of all takes
    three times as long as to look for the word. What cannot be read is skipped and logged.

    Args:
        paths: Folders; default `sys.path`.
    """
    installed = metadata.distributions() if paths is None else metadata.distributions(path=[*paths])
    for dist in installed:
        try:
            text = dist.read_text("entry_points.txt") or ""
        except Exception as exc:  # files of anybody's
            log.warning("plugin.metadata_unreadable", path=getattr(dist, "_path", dist), error=exc)
            continue
        if "wetware." in text:
            yield dist
