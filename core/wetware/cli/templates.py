"""What `ww plugin new` writes: the plugins of the tutorial and the how-to, under another name."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

_PROJECT: Final = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "ww-counter"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["wetware>=0.1,<0.2"]

[project.entry-points."wetware.v1"]
counter = "ww_counter.plugin"
"""

SERVICE: Final = {
    "pyproject.toml": f"""{_PROJECT}
[project.entry-points."wetware.client.v1"]
counter = "ww_counter.plugin:SCHEMA.Counter"
""",
    "ww_counter/__init__.py": "",
    "ww_counter/counter.capnp": """\
@0xc0ffee0123456789;

interface Counter {
  add @0 (by :Int64) -> (value :Int64);
  # Not idempotent.

  read @1 () -> (value :Int64);
}
""",
    "ww_counter/plugin.py": """\
from pathlib import Path

from wetware import rpc
from wetware.hookspecs import Service, hookimpl

SCHEMA = rpc.load(Path(__file__).with_name("counter.capnp"))


class CounterService(Service):
    name, interface, value = "counter", SCHEMA.Counter, 0
    roles = {"reader": frozenset({"Counter.read"}), "member": frozenset({"Counter.*"})}

    def bootstrap(self, principal):
        return CounterServant(self)


class CounterServant(rpc.Servant, interface=SCHEMA.Counter):
    def __init__(self, service):
        self.service = service

    async def add(self, by):
        self.service.value += by
        return {"value": self.service.value}

    async def read(self):
        return {"value": self.service.value}


@hookimpl
def ww_register_services(ctx):
    return [CounterService()]
""",
    "tests/test_counter.py": """\
from wetware.testing import ServiceConformance
from ww_counter.plugin import CounterService


class TestCounter(ServiceConformance):
    def make(self, ctx):
        return CounterService()
""",
}

AUTH: Final = {
    "pyproject.toml": _PROJECT.replace("counter", "auth_acme").replace("ww-auth_", "ww-auth-")
    + """
[project.entry-points."wetware.signer.v1"]
acme-key = "ww_auth_acme.signer:AcmeSigner.of"
""",
    "ww_auth_acme/__init__.py": "",
    "ww_auth_acme/plugin.py": """\
import json
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from wetware import hookspecs
from wetware.errors import ConfigError
from wetware.identity import LoginStatus, PeerId, Principal, verify

ALL = frozenset({"*"})
MAY = {"member": {"pubsub": ALL, "node": frozenset({"Node.status"})}, "admin": {"*": ALL}}


@dataclass(frozen=True, slots=True)
class AcmeConfig:
    people: Path = field(default=Path(), metadata={"help": "JSON: a key's ID to its roles."})
    domain: str = field(default="acme.example", metadata={"help": "What names the cluster."})


class AcmeBackend:
    name, schemes, epoch, services = "acme", ("acme-key",), 1, ()

    def __init__(self, ctx):
        self.file, self.run_sync, self.watchers = ctx.config.people, ctx.run_sync, []
        self.founding = ctx.config.domain.encode()
        try:
            self.people = self.read()
        except (OSError, ValueError) as exc:
            hint = "[plugins.auth_acme] people names a JSON file"
            raise ConfigError(f"cannot read {self.file}: {exc}", hint=hint) from exc

    def read(self):
        people = json.loads(self.file.read_bytes())
        return {PeerId.parse(key): frozenset(map(str, roles)) for key, roles in people.items()}

    async def run(self, *, task_status):
        task_status.started()
        suspended = False
        while True:
            await anyio.sleep(0.2)
            try:
                people = await self.run_sync(self.read)
            except Exception as exc:  # nobody is allowed anything until it can be read again
                if not suspended:
                    self.tell(hookspecs.Suspended(f"cannot read {self.file}: {exc}"))
                suspended = True
                continue
            before, self.people = self.people, people
            for key, roles in before.items():
                if lost := roles - people.get(key, frozenset()):
                    self.tell(hookspecs.Withdrawn(Principal(self.name, key), lost))
            if suspended:
                self.tell(hookspecs.Resumed())
            suspended = False

    def tell(self, change):
        for callback in tuple(self.watchers):
            callback(change)

    def watch(self, callback):
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)

    async def authenticate(self, challenge, proof):
        if proof.scheme not in self.schemes:
            return hookspecs.NotMine()
        public, signature = proof.payload[:32], proof.payload[32:]
        if not verify(public, signature, challenge.signed_bytes()):
            return hookspecs.Reject(LoginStatus.BAD_SIGNATURE, "the signature is wrong")
        principal = Principal(self.name, PeerId.from_public_key(public))
        if not (roles := self.roles(principal)):
            return hookspecs.Reject(LoginStatus.UNKNOWN_PRINCIPAL, f"{principal} is not at acme")
        return hookspecs.Accept(principal, roles)

    def roles(self, principal):
        mine = principal.backend == self.name
        return self.people.get(principal.subject, frozenset()) if mine else frozenset()

    def profile(self, role):
        return hookspecs.RoleProfile(MAY.get(role, {}))

    async def join_document(self):
        return b""

    async def admit_node(self, peer):
        return True

    def findings(self):
        return ()


@hookspecs.hookimpl
def ww_register_config():
    return AcmeConfig


@hookspecs.hookimpl
def ww_register_auth(ctx):
    return AcmeBackend(ctx)
""",
    "ww_auth_acme/signer.py": """\
from wetware.identity import Proof


class AcmeSigner:
    unattended = True  # nobody is asked, so a client may log in again by itself

    def __init__(self, key):
        self.key = key

    @classmethod
    def of(cls, choice):
        return cls(choice.load())

    async def sign(self, challenge):
        statement = challenge.signed_bytes()
        return Proof("acme-key", self.key.public + self.key.sign(statement), statement)
""",
    "tests/test_auth_acme.py": """\
import json

import anyio
import pytest

from wetware.identity import Key
from wetware.testing import AuthConformance
from ww_auth_acme.plugin import AcmeBackend, AcmeConfig
from ww_auth_acme.signer import AcmeSigner

ADA, EVE = Key.generate(), Key.generate()


class TestAcme(AuthConformance):
    @pytest.fixture(autouse=True)
    def people(self, tmp_path):
        self.config = AcmeConfig(tmp_path / "people.json")
        self.config.people.write_text(json.dumps({ADA.peer_id: ["member"]}))

    def make(self, ctx):
        return AcmeBackend(ctx)

    async def member(self, backend):
        return AcmeSigner(ADA)

    def stranger(self):
        return AcmeSigner(EVE)

    async def withdraw(self, backend):
        self.config.people.write_text("{}")
        while backend.people:
            await anyio.sleep(0.01)
""",
}


def write(directory: Path, name: str, *, auth: bool) -> list[Path]:
    """Write a plugin as `directory`; returns the files. Raises OSError, e.g. where it exists."""
    example, template = ("acme", AUTH) if auth else ("counter", SERVICE)
    title = "".join(part.title() for part in name.split("_"))
    written = []
    directory.mkdir(parents=True)
    for path, text in template.items():
        file = directory / _named(path, example, name, title)
        file.parent.mkdir(parents=True, exist_ok=True)
        # An interface's ID is that of its own in all schemas that a program loads.
        text = text.replace("0xc0ffee0123456789", f"0x{secrets.randbits(63) | 1 << 63:x}")
        file.write_text(_named(text, example, name, title))
        written.append(file)
    return written


def _named(text: str, example: str, name: str, title: str) -> str:
    dashed = name.replace("_", "-")
    text = re.sub(rf"(ww-(?:auth-)?){example}|{example}(?=-key)", rf"\g<1>{dashed}", text)
    return text.replace(example, name).replace(example.title(), title)
