"""Put the libraries' files where the pages find them: `make vendor`, after a version in package.json was changed.

npm checks what it installs against package-lock.json; the files are copied as they are.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
STATIC: Final = HERE.parent / "static" / "vendor"

FILES: Final = {
    "@highlightjs/cdn-assets/es/highlight.min.js": "highlight.js",
    "@highlightjs/cdn-assets/LICENSE": "highlight.LICENSE",
    "dompurify/dist/purify.es.mjs": "purify.js",
    "dompurify/LICENSE": "purify.LICENSE",
    "eventsource-parser/dist/parse.js": "eventsource-parser/parse.js",
    "eventsource-parser/dist/errors.js": "eventsource-parser/errors.js",
    "eventsource-parser/LICENSE": "eventsource-parser/LICENSE",
    "marked/lib/marked.esm.js": "marked.js",
    "marked/LICENSE": "marked.LICENSE",
    "uplot/dist/uPlot.esm.js": "uplot.js",
    "uplot/dist/uPlot.min.css": "uplot.css",
    "uplot/LICENSE": "uplot.LICENSE",
}


def copy_vendored(target: Path = STATIC) -> None:
    """Install the locked versions beside nothing of ours, and copy `FILES` and a list of them to `target`."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("package.json", "package-lock.json", ".npmrc"):
            shutil.copy(HERE / name, directory)
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=directory, check=True
        )
        modules = Path(directory) / "node_modules"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for source, name in FILES.items():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(modules / source, target / name)
        (target / "README.md").write_text(_listed(modules), encoding="utf-8")


def _listed(modules: Path) -> str:
    rows = [_manifest(modules, package) for package in sorted({_package(source) for source in FILES})]
    lines = [f"| {one['name']} | {one['version']} | {one['license']} | {one['homepage']} |" for one in rows]
    head = "Files of others, unchanged; `make vendor` writes this directory.\n\n"
    return head + "\n".join(["| package | version | licence | from |", "| --- | --- | --- | --- |", *lines, ""])


def _package(source: str) -> str:
    parts = source.split("/")
    return "/".join(parts[: 2 if source.startswith("@") else 1])


def _manifest(modules: Path, package: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((modules / package / "package.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    copy_vendored()
