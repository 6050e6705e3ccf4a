"""What goes wrong with a provider, and with a token."""

from __future__ import annotations

from wetware.errors import AuthError, WetwareError


class ProviderError(WetwareError):
    """The OpenID provider could not be asked, or its answer is none."""

    code = "oidc.provider"


class BadToken(AuthError):
    """A token is not what it has to be.

    Attributes:
        late: It was good once, or will be: what differs is the time.
    """

    code = "auth.token"

    def __init__(self, why: str, *, late: bool = False, hint: str = "") -> None:
        super().__init__(why, hint=hint)
        self.late = late
