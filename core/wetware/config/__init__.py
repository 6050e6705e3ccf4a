"""ww.toml, `WW_*` variables and flags → frozen dataclasses.

Precedence: flags > environment > file > defaults. A section is a frozen dataclass. Its fields that
`setting` made are settings; the others keep their defaults, or what a test gives. All about a
setting is read from its field: type, default, range and text. `[link]` and `[plugins.NAME]` are
therefore the dataclasses of the parts themselves, and cannot drift from them.

- `sections`: the core's sections, and what makes a class a section
- `convert`: a value of the file, a variable or a flag → a value of the field's type
- `file`: ww.toml with its lines;  `refusals`: what is said of a wrong setting, and where
- `resolve`: `Config`, which `load` makes;  `reference`: docs/reference/config.md
"""

from wetware.config.file import file_path
from wetware.config.reference import describe
from wetware.config.resolve import Config, defaults, load
from wetware.config.sections import (
    ENV_OTHER,
    NodeConfig,
    NoSettings,
    PluginsConfig,
    check_schema,
)

__all__ = [
    "ENV_OTHER",
    "Config",
    "NoSettings",
    "NodeConfig",
    "PluginsConfig",
    "check_schema",
    "defaults",
    "describe",
    "file_path",
    "load",
]
