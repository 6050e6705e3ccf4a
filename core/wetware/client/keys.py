"""The user's key, and what signs with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wetware.base import paths
from wetware.client.installed import SIGNER_GROUP, find
from wetware.errors import AuthError, InvalidArgument, KeyFileError
from wetware.identity import Challenge, Key, Signer


@dataclass(frozen=True, slots=True)
class KeyChoice:
    """Which key a signer shall use.

    Attributes:
        key: A key, a file, the name of a key in `keys_dir`, or None for WW_KEY or "default".
        keys_dir: Where named keys are; None: in the user's home.
        passphrase: Asked if the key is encrypted; None means WW_PASSPHRASE or an error.
    """

    key: Key | Path | str | None
    keys_dir: Path | None
    passphrase: Callable[[], str] | None

    @property
    def chosen(self) -> Key | Path | str:
        """`key`, else what WW_KEY names, else "default"; raises InvalidArgument if empty."""
        if self.key == "":
            raise InvalidArgument(
                "the name of the key is empty", hint="leave it out", code="invalid.empty"
            )
        return self.key if self.key is not None else paths.variable("WW_KEY") or "default"

    @property
    def path(self) -> Path:
        """The key's file; only where `key` is not a Key."""
        chosen = self.chosen
        if isinstance(chosen, Key):
            raise TypeError("the key was given as an object")
        if isinstance(chosen, str) and os.sep not in chosen:
            return (self.keys_dir or paths.keys_dir()) / chosen
        return paths.absolute(chosen, "the key")

    def load(self) -> Key:
        """The key; raises KeyFileError."""
        if isinstance(self.key, Key):
            return self.key
        given = paths.variable("WW_PASSPHRASE")
        passphrase = self.passphrase if given is None else (lambda: str(given))
        try:
            return Key.load(self.path, passphrase=passphrase)
        except KeyFileError as exc:
            if exc.code == "key.missing":
                exc.hint = f"make it with `{self.new_command}`"
            raise

    @property
    def new_command(self) -> str:
        """The command that makes the key; only where `key` is not a Key."""
        name = "" if self.chosen == "default" else f" {shlex.quote(str(self.chosen))}"
        return f"ww key new{name}"


def chooser(
    signer: Signer | None, choice: KeyChoice, *, unattended: bool = False
) -> Callable[[Challenge], Signer]:
    """What picks the signer for a challenge: this one, or one of the key for an offered scheme.

    If `unattended` it raises AuthError for a signer that may ask somebody, e.g. a wallet.
    """

    def choose(challenge: Challenge) -> Signer:
        made: Signer | None = None
        try:
            made = pick(challenge)
        except KeyFileError as exc:
            if not unattended or exc.code != "key.passphrase":
                raise
        if made is None or (unattended and not getattr(made, "unattended", False)):
            raise AuthError(
                "logging in here needs somebody, and nobody is asked unawares for a passphrase or "
                "a signature",
                hint="log in once more, or use a key that needs nobody: without a passphrase, or "
                "with WW_PASSPHRASE set",
                code="auth.attended",
            )
        return made

    def pick(challenge: Challenge) -> Signer:
        if signer is not None:
            return signer
        # A login that the user has made goes before a key that is there anyhow, and that before a
        # login that is still to be made.
        key: Signer | None = None
        failed: Exception | None = None
        not_ready: Signer | None = None
        for scheme in challenge.schemes:
            try:
                if (make := find(SIGNER_GROUP, scheme)) is None:
                    continue
                made: Signer = make(choice)
                ready = getattr(made, "ready", None)
                if ready is not None and ready(challenge):
                    return made
            except Exception as exc:  # a plugin that is broken is not in the way of other schemes
                failed = failed or exc
                continue
            if ready is None:
                key = key or made
            else:
                not_ready = not_ready or made
        # A key that cannot be used is told of before a login that nobody made.
        unusable = isinstance(failed, KeyFileError) and failed.code != "key.missing"
        if (best := key or (None if unusable else not_ready)) is not None:
            return best
        if failed is not None:
            raise failed
        raise AuthError(
            f"the node accepts {', '.join(challenge.schemes)}, and no signer for it is installed",
            hint="install the plugin of the node's auth backend, e.g. pip install 'wetware[evm]'",
            code="auth.no_signer",
        )

    return choose
