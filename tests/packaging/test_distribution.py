"""What is shipped, and that it runs without the source tree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from tests.packaging.conftest import ROOT, Built
from tests.packaging.third_party import BROKEN, GOOD, install, install_broken
from tests.unit.test_imports import imported

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.timeout(400)


SUFFIXES = {".py", ".capnp", ".wit", ".json", ".txt", ".bash", ".fish", ".zsh"}
IN_GUESTS = "plugins/proc/wetware_proc/python/runner/"
"""What is there imports what guests have, on a Python of their own."""


def shipped() -> dict[str, str]:
    """Path in the wheel → path in the tree, of everything that must be in it."""
    found = {}
    for package in (ROOT / "core/wetware", *ROOT.glob("plugins/*/wetware_*")):
        for path in package.rglob("*"):
            wanted = path.suffix in SUFFIXES or path.name == "py.typed"
            if path.is_file() and wanted:
                found[str(path.relative_to(package.parent))] = str(path.relative_to(ROOT))
    return found


def test_the_wheel_has_every_module_schema_and_type_marker(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    expected = shipped()
    assert set(expected) - names == set()
    assert "wetware/schema/core.capnp" in names
    assert "wetware_pubsub/pubsub.capnp" in names
    for package in (
        "wetware",
        "wetware_audit",
        "wetware_auth_evm",
        "wetware_auth_local",
        "wetware_auth_oidc",
        "wetware_blob",
        "wetware_dht",
        "wetware_mdns",
        "wetware_proc",
        "wetware_pubsub",
        "wetware_sync",
    ):
        assert f"{package}/py.typed" in names
    stray = {n for n in names if n not in expected and ".dist-info/" not in n}
    assert stray == set(), "files of nobody's are shipped"


def test_the_wheel_names_the_plugins_and_the_command(built: Built) -> None:
    archive = zipfile.ZipFile(built.wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    text = archive.read(name).decode()
    for line in (
        "[wetware.v1]",
        "auth_local = wetware_auth_local.plugin",
        "auth_oidc = wetware_auth_oidc.plugin",
        "pubsub = wetware_pubsub.plugin",
        "ww = wetware.cli:main",
    ):
        assert line in text


def test_both_licences_are_shipped_and_named(built: Built) -> None:
    archive = zipfile.ZipFile(built.wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("dist-info/METADATA")]
    head = archive.read(name).decode().partition("\n\n")[0].splitlines()
    assert "License-Expression: MIT OR Apache-2.0" in head
    assert "Author: The wetware authors" in head
    assert "Classifier: Programming Language :: Python :: 3.13" in head
    assert {line.partition(", ")[0] for line in head if line.startswith("Project-URL: ")} == {
        f"Project-URL: {label}" for label in ("Homepage", "Documentation", "Issues", "Changelog")
    }
    with tarfile.open(built.sdist) as source:
        (top,) = {member.partition("/")[0] for member in source.getnames()}
        for licence, first in (
            ("LICENSE-MIT", "MIT License"),
            ("LICENSE-APACHE", "Apache License"),
        ):
            assert f"License-File: {licence}" in head
            text = (ROOT / licence).read_bytes()
            assert text.strip().startswith(first.encode())
            assert archive.read(name.replace("METADATA", f"licenses/{licence}")) == text
            shipped_file = source.extractfile(f"{top}/{licence}")
            assert shipped_file is not None
            assert shipped_file.read() == text


def test_every_module_that_is_imported_has_a_declared_distribution(built: Built) -> None:
    archive = zipfile.ZipFile(built.wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("dist-info/METADATA")]
    head = archive.read(name).decode().partition("\n\n")[0]
    declared = {
        canonical(re.split(r"[^A-Za-z0-9._-]", line.partition(": ")[2])[0])
        for line in head.splitlines()
        if line.startswith("Requires-Dist: ")
    }
    providers = metadata.packages_distributions()
    missing = {
        f"{path}: {module}"
        for path in (p for p in shipped().values() if p.endswith(".py") and IN_GUESTS not in p)
        for _, imported_name in imported(ROOT / path)
        if (module := imported_name.partition(".")[0]) not in sys.stdlib_module_names
        and not module.startswith("wetware")
        and not declared & {canonical(dist) for dist in providers.get(module, ())}
        and BROUGHT_BY.get(module) not in declared
    }
    assert missing == set()


# Module → the dependency that brings it, where that one must choose the version: the interfaces of
# libp2p take multiaddr's objects, and those of py-evm the types of the others.
BROUGHT_BY = {"multiaddr": "libp2p", "eth_typing": "py-evm", "eth_utils": "py-evm"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_sdist_has_what_a_build_and_the_tests_need(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(shipped().values()) - names == set()
    for name in ("pyproject.toml", "README.md", "conftest.py", "docs/reference/hooks.md"):
        assert name in names
    for name in ("CONTRIBUTING.md", "SECURITY.md", "deploy/Dockerfile"):
        assert name in names
    assert not [name for name in names if "node_modules" in name or "__pycache__" in name]


def test_the_installed_package_is_the_wheels(built: Built) -> None:
    run = built.run(
        "python",
        "-c",
        "import wetware, wetware_pubsub; print(wetware.__file__, wetware_pubsub.__file__)",
    )
    assert run.returncode == 0, run.stderr
    assert all(path.startswith(str(built.venv)) for path in run.stdout.split())


def test_help_names_the_commands_of_core_and_plugins(ww: Run) -> None:
    run = ww("--help")
    assert run.returncode == 0, run.stderr
    for command in ("node", "ls", "invite", "key", "plugin", "config", "user", "pub", "sub"):
        assert f"\n  {command} " in run.stdout


def test_the_bundled_plugins_load_from_the_wheel(ww: Run) -> None:
    run = ww("plugin", "list", "--json")
    assert run.returncode == 0, run.stderr
    found = {each["name"]: each for each in json.loads(run.stdout)}
    assert {name: each["state"] for name, each in found.items()} == {
        "audit": "loaded",
        "auth_evm": "loaded",
        "auth_local": "loaded",
        "auth_oidc": "loaded",
        "blob": "loaded",
        "dht": "loaded",
        "mdns": "loaded",
        "proc": "loaded",
        "pubsub": "loaded",
        "sync": "loaded",
    }
    assert found["pubsub"]["services"] == ["pubsub"]
    assert found["auth_local"]["auth_selected"]
    assert all(each["bundled"] and each["dist"] == "wetware" for each in found.values())


def test_without_its_extra_a_plugin_is_unavailable_and_says_what_to_install(
    ww: Run, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['coincurve'] = None\n")
    run = ww("plugin", "list", "--json", site=tmp_path)
    assert run.returncode == 0, run.stderr
    found = {each["name"]: each for each in json.loads(run.stdout)}
    assert found["auth_evm"]["state"] == "unavailable"
    assert found["auth_evm"]["remedy"] == "pip install 'wetware[evm]'"
    run = ww("node", "--auth", "evm", site=tmp_path)
    assert run.returncode == 78, run.stderr
    assert "pip install 'wetware[evm]'" in run.stderr


def test_a_third_party_distribution_is_found_and_configured(ww: Run, tmp_path: Path) -> None:
    install(tmp_path / "site", "greeter", GOOD)
    run = ww("greet", site=tmp_path / "site")
    assert (run.returncode, run.stdout) == (0, "hello from a third party\n")
    shown = ww("config", "show", "plugins.greeter", "--json", site=tmp_path / "site")
    assert json.loads(shown.stdout) == [
        {
            "key": "plugins.greeter.greeting",
            "value": "hello",
            "origin": "default",
            "where": "default",
        }
    ]


def test_every_broken_plugin_is_named_and_ww_works(ww: Run, tmp_path: Path) -> None:
    site = tmp_path / "site"
    slow = ("hangs", "spins", "hangs_in_register")
    install_broken(site, *(name for name in BROKEN if name not in slow))
    install(site, "greeter", GOOD)
    run = ww("plugin", "list", "--json", site=site)
    assert run.returncode == 0, run.stderr
    found = {each["dist"]: each for each in json.loads(run.stdout) if not each["bundled"]}
    for name, broken in BROKEN.items():
        if name in slow:
            continue
        each = found[f"ww-{name.replace('_', '-')}"]
        assert each["state"] == broken.state, each
        assert broken.reason in each["reason"], each
        assert broken.remedy in each["remedy"], each
    assert found["ww-greeter"]["state"] == "loaded"
    text = ww("plugin", "list", site=site)
    assert "needs is unavailable: needs 'acme_database_driver'" in text.stdout
    assert "try: pip install 'ww-needs[db]'" in text.stdout

    helped = ww("--help", site=site)
    assert helped.returncode == 0
    assert "\n  greet " in helped.stdout
    assert "\n  pub " in helped.stdout
    assert "\n  half " not in helped.stdout
    assert "Run a node" in ww("node", "--help", site=site).stdout
    assert ww("greet", site=site).stdout == "hello from a third party\n"


@pytest.mark.long
def test_plugins_that_hang_are_cut_off(ww: Run, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install_broken(site, "hangs", "spins")
    install(site, "greeter", GOOD)
    run = ww("greet", site=site, timeout_s=30)
    assert run.stdout == "hello from a third party\n"
    run = ww("plugin", "list", "--json", site=site, timeout_s=120)
    found = {each["name"]: each for each in json.loads(run.stdout)}
    for name in ("hangs", "spins"):
        assert found[name]["state"] == "failed"
        assert BROKEN[name].reason in found[name]["reason"]


def test_the_command_line_says_what_is_wrong_with_the_configuration(
    ww: Run, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert ww("config", "check").returncode == 0
    (home / "ww.toml").write_text('[node]\nlistn = []\n[plugins]\nenable = ["pubsbu"]\n')
    run = ww("config", "check")
    assert run.returncode == 78
    assert "node.listn" in run.stderr
    assert "did you mean listen?" in run.stderr
    (home / "ww.toml").write_text('[plugins]\nenable = ["pubsbu"]\n')
    run = ww("config", "check", "--json")
    assert run.returncode == 78
    assert [p["hint"] for p in json.loads(run.stdout)["problems"]] == ["did you mean pubsub?"]
    (home / "ww.toml").write_text("[")
    for args in (("config", "check"), ("pub", "x", "y")):
        run = ww(*args)
        assert run.returncode == 78, run.stderr
        assert "not valid TOML" in run.stderr
        assert "Traceback" not in run.stderr
    assert ww("config", "path").stdout == f"{home / 'ww.toml'}\n"
