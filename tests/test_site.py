"""The documentation's site: every page has its place, every word its entry, and nothing is fetched when it is read."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from extras import needs
from test_help import COMMANDS, names

from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, SHAPE
from cp_debug.detection.metrics import ERRORS
from cp_debug.reports.glossary import GLOSSARY, anchor, as_markdown

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WORDS = {word for words in GLOSSARY for word in (words, *words.split(", "))}
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*href=["']?(?:https?:)?//"""
)


def pages(nav: object) -> list[str]:
    """The pages in a part of the navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]  # type: ignore[attr-defined]


def test_every_page_has_a_place_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = pages(yaml.safe_load(config)["nav"])
    made = ["reference/cli.md", "reference/json.md", "reference/python.md"]
    kinds = (path for kind in ("*.py", "*.yaml", "notebooks/*.ipynb") for path in (ROOT / "examples").glob(kind))
    made += [f"{path.relative_to(ROOT).as_posix()}.md" for path in kinds]
    assert sorted(listed) == sorted([*made, *(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))])


def test_the_glossary_is_the_one_that_reports_show() -> None:
    assert (DOCS / "glossary.md").read_text(encoding="utf-8") == as_markdown(), (
        "write as_markdown() to docs/glossary.md"
    )
    assert len({anchor(words) for words in GLOSSARY}) == len(GLOSSARY)


def test_the_words_of_the_report_have_entries() -> None:
    template = (ROOT / "cp_debug" / "reports" / "html" / "report.html.j2").read_text(encoding="utf-8")
    [columns] = re.findall(r"for name, kind in \((.*?)\) %\}", template)
    said = set(re.findall(r'\("([^"]+)"', columns)) - {"#", "op", "verdict"}
    missing = {*said, OK, INHERITED, DIVERGENT, SHAPE, GUILTY} - WORDS
    assert not missing
    assert 'href="#words"' in template


PLAIN = {
    *(
        "#",
        "tensor",
        "part",
        "precision",
        "device",
        "settings",
        "versions",
        "setting",
        "mean ms",
        "memory MiB",
        "class",
    ),
    *("cache", "entries", "size", "last used", "what it keeps", "fault", "what is wrong", "in the field"),
    *(
        "package",
        "version",
        "model",
        "what it is",
        "seconds",
        "outcome",
        "file",
        "nodes",
        "inputs",
        "output",
    ),
    *("checked on", "SHA-256", "ONNX nodes", "operators", "latency", "error", "kind", "weights", "dB", "training loss"),
    *("object", "change", "score", "shift", "index", "bits", "axis", "worst on", "guilty", "tasks", "why", "first"),
    *("last", "in layers", "error in INT8", "boxes lost or gained", "final rel. L2", "boxes", "layers"),
}
"""Column headings that say themselves what they hold, beside a table's title."""
OTHER_SPELLINGS = {
    "introduces from … to": "from … to",
    "relative L2": "rel. L2",
    "input amax": "amax",
    "weights' amax": "amax",
    "quantizer": "fake quantizer",
    "engine layer": "engine",
    "rel. L2 alone": "optimizer",
    "rewrites": "optimizer",
    "of the limit": "limit",
    "{} without it": "without it",
    "held-out {}": "held-out loss",
    "Δ {} alone": "error alone",
    "Δ {} without": "error without",
    "Δ {} {}": "error without",
    "Δ {}": "Δ",
    "{} m": "AP",
    "{} {}": "BEV",
}
"""Headings with a figure's, a backend's or a class's name in them → word under which they are explained."""


def headings() -> set[str]:
    """Headings of all tables in the package, ``{}`` for what is filled in; those that are a name alone are left out."""
    said: set[str] = set()
    for path in (ROOT / "cp_debug").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name("Column"), args=[heading, *_]):
                    said |= texts(heading)
                case ast.Assign(targets=[ast.Name("headers" | "scores")], value=value) if path.name == "sweep.py":
                    said |= texts(value)
                case ast.Call(func=ast.Name("_sheet"), args=[_, ast.Tuple() as given, *_]):
                    said |= texts(given)
    return {part for text in said for part in text.removeprefix(">").split(": ")} - {"", "{}", "{}{}"}


def texts(node: ast.expr) -> set[str]:
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        return {"".join(map(str, parts))}
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, ast.BinOp):  # a backend's name with a remark
        return {"{}"}
    if isinstance(node, ast.ListComp):
        return texts(node.elt)
    return {text for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) for text in texts(child)}


@pytest.mark.slow
def test_the_columns_of_every_table_have_entries() -> None:
    said = headings()
    assert {"excess", "median", "worst", "robust z", "layers kept", "found", "Δ", "error without", "from … to"} <= said
    assert not {word for word in said if OTHER_SPELLINGS.get(word, word) not in WORDS | PLAIN}
    assert said >= PLAIN - {
        "final rel. L2",
        "error in INT8",
        "boxes lost or gained",
    }  # given to another table's heading
    assert {*ERRORS, "mAP", "NDS", "BEV", "3D"} <= WORDS


def test_every_word_of_the_glossary_has_a_place_of_its_own() -> None:
    places = [anchor(words) for words in GLOSSARY]
    assert len(set(places)) == len(places)
    assert all(places)
    assert anchor("max |Δ|") == "max-delta"


def test_links_into_the_glossary_lead_somewhere() -> None:
    known = {anchor(words) for words in GLOSSARY}
    for path in DOCS.rglob("*.md"):
        for target in re.findall(r"glossary\.md#([\w-]+)", path.read_text(encoding="utf-8")):
            assert target in known, f"{path.name}: glossary.md#{target}"


def check_commands(page: str) -> None:
    """Every command has a section in a group, and in it every option; names and choices are not escaped."""
    sections = dict(zip(*[iter(re.split(r'<h3 id="([^"]+)">', page)[1:])] * 2, strict=True))
    assert {" ".join(words) for words, _ in COMMANDS} == {name.replace("-", " ") for name in sections}
    for words, command in COMMANDS:
        assert not {name for name in names(command) if name not in sections["-".join(words)]}, words
    assert page.index('id="find-the-layer"') < page.index('id="bisect"') < page.index('id="results"')
    assert "&lt;auto|dynamo|torchscript&gt;" in sections["bisect"]


def check_links(folder: Path) -> None:
    """Every link of every page to the site itself leads to a file of it; no page sends a reader to a checkout."""
    for path in folder.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', path.read_text(encoding="utf-8")):
            if not re.match(r"\w+:|/", link):
                assert (path.parent / unquote(link)).resolve().exists(), f"{path.name}: {link}"


def check_landing(page: str) -> None:
    """README's picture, then a door for each situation."""
    doors = re.findall(r'<li>\s*<p><a href="([\w-]+\.html)">', page)
    assert doors[:3] == ["two-files.html", "python.html", "torch-tensorrt.html"]
    assert page.index("images/bisect.svg") < page.index('two-files.html">Two files')


def test_titles_are_short() -> None:
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        [title] = re.findall(r"^# (.+)", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S), re.M)
        assert len(title.split()) <= 4, f"{path.name}: {title}"


@pytest.mark.slow
@needs("mkdocs")
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = list(tmp_path.rglob("*.html"))
    assert len(built) > 15
    assert "assert_agree" in (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    check_commands((tmp_path / "reference" / "cli.html").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "reference" / "bisect.schema.json").read_text(encoding="utf-8"))["$defs"]["LayerRow"]
    check_links(tmp_path)
    check_landing((tmp_path / "index.html").read_text(encoding="utf-8"))
    for path in built:
        assert not FETCHED.search(path.read_text(encoding="utf-8")), path
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
