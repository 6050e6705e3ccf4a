"""What is installed."""

from __future__ import annotations

from pathlib import Path

from tests.packaging.third_party import install

from wetware import loader
from wetware.hookspecs import GROUP
from wetware.loader import Offer


def test_find_reads_dist_info_and_puts_bundled_ones_first(site: Path) -> None:
    install(site, "zeta", "", requires=("a>=1",), extras=("x", "y"))
    install(site, "alpha", "")
    found = loader.find()
    assert [o.name for o in found if not o.bundled] == ["alpha", "zeta"]
    bundled = [o.bundled for o in found]
    assert bundled == sorted(bundled, reverse=True)
    assert bundled[0]
    assert found[-1] == Offer(
        "wetware.v1", "zeta", "ww_zeta.plugin", "ww-zeta", "1.2", ("x", "y"), ("a>=1",)
    )


def test_find_sees_what_importlib_metadata_sees() -> None:
    from importlib import metadata

    points = metadata.entry_points(group=GROUP)
    ours = {(o.name, o.value, o.dist, o.version) for o in loader.find() if o.group == GROUP}
    assert ours == {(p.name, p.value, p.dist.name, p.dist.version) for p in points if p.dist}


def test_find_survives_what_lies_about_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.dist-info").mkdir()
    (tmp_path / "b.dist-info").write_text("a file")
    (tmp_path / "c.dist-info").mkdir()
    (tmp_path / "c.dist-info" / "entry_points.txt").write_bytes(b"[wetware.v1]\n\xff\xfe\nx\n= y\n")
    (tmp_path / "d.dist-info").mkdir()
    (tmp_path / "d.dist-info" / "entry_points.txt").mkdir()
    (tmp_path / "e.zip").write_bytes(b"")
    found = loader.find([str(tmp_path), str(tmp_path / "none"), str(tmp_path / "e.zip")])
    assert found == ()


def test_of_two_distributions_of_one_name_the_first_on_the_path_counts(tmp_path: Path) -> None:
    for folder, version in (("one", "1"), ("two", "2")):
        install(tmp_path / folder, "x", "", version=version)
    (found,) = loader.find([str(tmp_path / "one"), str(tmp_path / "two")])
    assert found.version == "1"
