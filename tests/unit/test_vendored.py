"""The pages' files: those of others are what npm has, and none of ours loads anything from elsewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.services import ROOT
from webapp.pages.vendor.copy import FILES, STATIC, copy_vendored

PAGES = ROOT / "webapp" / "pages"
OURS = sorted(path for path in PAGES.glob("static/*") if path.suffix in (".js", ".css"))
IMPORTED = re.compile(r'(?:^import .*?|^\} |^import )(?:from )?"([^"]+)";', re.MULTILINE)
ADDRESS = re.compile(r"""(?:src|href|action|url)\s*[=(]\s*["']?(?:https?:)?//|@import|\bfetch\(["'`]http""")


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm to compare the vendored files with")
def test_what_is_vendored_is_what_npm_has(tmp_path: Path) -> None:
    """npm compares what it installs with the hashes in package-lock.json."""
    copy_vendored(tmp_path)
    fresh = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert fresh == {str(path.relative_to(STATIC)): path.read_bytes() for path in STATIC.rglob("*") if path.is_file()}
    assert set(FILES.values()) < set(fresh)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path: Path) -> None:
    imported = IMPORTED.findall(path.read_text(encoding="utf-8"))
    assert [name for name in imported if not (path.parent / name).is_file()] == []


def test_imports_are_found_at_all() -> None:
    assert "./vendor/marked.js" in IMPORTED.findall((PAGES / "static" / "markdown.js").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*OURS, *sorted(PAGES.rglob("*.html"))], ids=lambda path: path.name)
def test_nothing_is_loaded_from_elsewhere(path: Path) -> None:
    assert ADDRESS.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted(PAGES.rglob("*.html")), ids=lambda path: path.name)
def test_markup_has_no_script_and_no_style_of_its_own(path: Path) -> None:
    """The page's policy would refuse them."""
    markup = path.read_text(encoding="utf-8")
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", markup) == []
