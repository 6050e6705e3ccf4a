"""What goes wrong between this plugin and a chain."""

from __future__ import annotations

from wetware.errors import EXIT_UNREACHABLE, ConfigError, WetwareError


class BadSettings(ConfigError):
    """What is configured, or kept, does not say which chain and contract to use."""

    code = "config.auth_evm"


class ChainError(WetwareError):
    """An endpoint, or the chain behind it, did not do what is expected of it."""

    code = "evm"


class BadLog(ChainError):
    """A log that the contract does not emit, or that does not follow the one before it."""

    code = "evm.log"


class EndpointFailed(ChainError):
    """One endpoint did not answer a request, or answered with an error."""

    code = "evm.endpoint"


class EndpointUnavailable(EndpointFailed):
    """One endpoint could not be reached, or is not to be asked for now."""

    code = "evm.endpoint.unavailable"


class Unreachable(EndpointUnavailable):
    """No endpoint of the chain answers."""

    exit_code = EXIT_UNREACHABLE


class NoQuorum(ChainError):
    """Too few endpoints answered, or they do not agree."""

    code = "evm.quorum"


class WrongChain(ChainError):
    """The endpoints serve another chain or contract than the configured one."""

    code = "evm.wrong_chain"


class ChainRegressed(ChainError):
    """What was final is no longer part of the chain: nobody is admitted until an operator acts."""

    code = "evm.regressed"
