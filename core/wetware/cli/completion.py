"""`ww completion`: scripts that let a shell complete commands, options and cheap values.

A script asks `ww` itself, with `_WW_COMPLETE` set, at each TAB; click's machinery, which typer
brings along, finds what fits. The scripts and the format of the answer are ours: typer's evaluate
the answer as shell code, let it be expanded as a pattern, and import rich for it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from typer._click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    split_arg_string,
)

from wetware.base import paths
from wetware.cli.app import note
from wetware.errors import WetwareError

COMPLETE_VAR: Final = "_WW_COMPLETE"
"""What the scripts set, to `complete_words`."""
VALUES_MAX: Final = 200
HELP_CHARS_MAX: Final = 80

_SAFE = re.compile(r"[A-Za-z0-9._@%+=:,/-]+\Z")
"""Values that mean the same in every shell, unquoted."""

SHELLS: Final = Path(__file__).with_name("shells")
"""A script for each; those for zsh and fish follow click's.

Source: https://github.com/pallets/click, shell_completion.py.
"""

_INSTALL: Final = {
    "bash": (
        "ww completion bash > ~/.local/share/bash-completion/completions/ww   (make the folder "
        "first; needs the package bash-completion), or in ~/.bashrc:",
        'eval "$(ww completion bash)"',
    ),
    "zsh": (
        "ww completion zsh > DIR/_ww   with a DIR of your $fpath, or in ~/.zshrc after compinit:",
        'eval "$(ww completion zsh)"',
    ),
    "fish": (
        "ww completion fish > ~/.config/fish/completions/ww.fish",
        "ww completion fish | source   in this shell only",
    ),
}


def completion_command(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Which shell.")],
) -> None:
    """Print the script that completes `ww` in a shell; stderr says how to install it."""
    sys.stdout.write((SHELLS / f"ww.{shell}").read_text())
    note("# to have it in every new shell:")
    for line in _INSTALL[shell]:
        note(f"#   {line}")


# --- what completes -------------------------------------------------------------------------------


def complete_keys(incomplete: str) -> list[str]:
    """Names of the user's keys."""
    try:
        names = sorted(entry.name for entry in os.scandir(paths.keys_dir()) if entry.is_file())
    except OSError:
        return []
    return [name for name in names if not name.startswith(".") and name.startswith(incomplete)]


def complete_contexts(incomplete: str) -> list[str]:
    """Names of the user's contexts."""
    from wetware.client import contexts

    try:
        names = (contexts.LOCAL, *contexts.load().named)
    except WetwareError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def one_of(*values: str) -> Callable[[str], list[str]]:
    """A completion from fixed values, for an option whose values the configuration judges."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


class _Complete(ShellComplete):
    """Words and the cursor's place from two variables; answers with lines `VALUE[TAB HELP]`."""

    name = "words"
    source_template = ""

    def source_vars(self) -> dict[str, Any]:
        return {}

    def get_completion_args(self) -> tuple[list[str], str]:
        words = split_arg_string(os.environ.get("COMP_WORDS", ""))
        try:
            place = int(os.environ.get("COMP_CWORD", ""))
        except ValueError:
            place = len(words)
        # bash makes three words of "--key=default".
        args = [word for word in words[1:place] if word != "="]
        return args, words[place] if place < len(words) else ""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """What may stand at the cursor; nothing that a shell could take for more than a word."""
        found = super().get_completions(args, incomplete)[:VALUES_MAX]
        return [item for item in found if item.type == "plain" and _SAFE.match(str(item.value))]

    def format_completion(self, item: CompletionItem) -> str:
        text = " ".join((item.help or "").split())
        text = "".join(char for char in text if char.isprintable())
        if len(text) > HELP_CHARS_MAX:
            text = text[: HELP_CHARS_MAX - 1] + "…"
        return f"{item.value}\t{text}" if text else str(item.value)


def enable() -> None:
    """Answer `_WW_COMPLETE`; called only where it is set, so that other commands pay nothing."""
    add_completion_class(_Complete, _Complete.name)
