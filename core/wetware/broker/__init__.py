"""The capability broker: who gets which capability, and when it ends."""

from wetware.broker.gate import Broker, GateServant
from wetware.broker.grants import Grant
from wetware.broker.limits import LoginLimits

__all__ = ["Broker", "GateServant", "Grant", "LoginLimits"]
