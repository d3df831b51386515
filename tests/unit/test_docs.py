"""The documents and the code say the same: settings, error codes, Redis keys; and no link leads nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from webapp import errors
from webapp.config import Settings
from webapp.errors import SluicegateError
from webapp.streams import keys

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")])


def rows(document: str, first: str) -> dict[str, str]:
    """Of the tables' rows whose first cell is code that matches `first`: that code, and the second cell."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return dict(re.findall(rf"^\| `({first})` \| ([^|]*) \|", text, re.MULTILINE))


def shown(default: Any) -> str:
    """A default as `docs/configuration.md` shows it."""
    if default == "":
        return "empty"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def error_classes(base: type[SluicegateError] = SluicegateError) -> Iterator[type[SluicegateError]]:
    """The classes of `webapp.errors`, which other modules may add to."""
    if base.__module__ == errors.__name__:
        yield base
    for derived in base.__subclasses__():
        yield from error_classes(derived)


def test_every_setting_is_documented_with_its_default_and_no_other() -> None:
    expected = {Settings.variable_of(name): shown(field.default) for name, field in Settings.model_fields.items()}
    assert rows("docs/configuration.md", "[A-Z_]+") == expected


def test_every_error_code_is_documented_with_its_status_and_no_other() -> None:
    expected = {one.code: str(one.status) for one in error_classes()}
    text = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", text, re.MULTILINE)) == expected


def test_every_redis_key_is_documented_with_its_type_and_no_other() -> None:
    documented = rows("docs/architecture.md", "sg:[^`]+")
    in_the_code = dict(re.findall(r"^\| `(sg:[^`]+)` \| (\w[\w ]*)", keys.__doc__ or "", re.MULTILINE))
    assert documented.keys() == in_the_code.keys()
    assert [key for key, kind in in_the_code.items() if not documented[key].startswith(kind.split()[0])] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    broken = [link for link in relative_links(document) if not leads_somewhere(document, link)]
    assert broken == []


def relative_links(document: Path) -> list[str]:
    """The targets of links and images, without those in blocks of code."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", prose)
    return [link for link in found if not re.match(r"[a-z][a-z+.-]*:", link)]


def leads_somewhere(document: Path, link: str) -> bool:
    """Whether the file is there and, where the link names a heading of a document, the heading too."""
    path, _, anchor = link.partition("#")
    target = (document.parent / path).resolve() if path else document
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in anchors(target)


def anchors(document: Path) -> set[str]:
    """The headings as links name them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_requirement_names_tests_and_code_that_are_there() -> None:
    text = (ROOT / "docs/requirements.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|webapp|workers|bench|migrations)/[^`]*)`", text)
    assert [name for name in named if not is_there(name)] == []
    requirements, _, steps = text.partition("## The ten steps")
    without = [part.split(":")[0] for part in requirements.split("### ")[1:] if "::test_" not in part]
    assert without == []
    assert len(requirements.split("### REQ-")) == 11
    assert len(re.findall(r"^\| (?!step|---)[^|]+ \| [^|]*`[^|]* \| [^|]*`tests/", steps, re.MULTILINE)) == 10


def is_there(name: str) -> bool:
    """Whether a file, or a test in it as pytest names it, is there."""
    path, *parts = name.split("::")
    file = ROOT / path
    if not parts:
        return file.exists()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for part in parts:
        found = re.search(rf"^ *(?:class|def) {part}\b", text, re.MULTILINE)
        if found is None:
            return False
        text = text[found.end() :]
    return True
