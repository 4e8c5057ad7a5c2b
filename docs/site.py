"""Hook of the documentation's site: the reference is made from the code, and scripts, notebooks and raw figures that a
page links to are part of the site."""

from __future__ import annotations

import json
import posixpath
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "sh"}
"""Suffix of a linked file that is shown on a page of its own → language of its colours."""
EXAMPLES = "examples"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with links to files of the repository leading to their places in the site."""
    if page.file.src_uri == "index.md":  # the landing page has the whole width, code has more of it
        page.meta["hide"] = ["navigation", "toc"]
    elif page.file.src_uri.startswith(f"{EXAMPLES}/"):
        page.meta["hide"] = ["toc"]

    def inside(match: re.Match[str]) -> str:
        place = site_place(target := target_of(page.file.src_uri, match[1]))
        folder = posixpath.dirname(page.file.src_uri) or "."
        return match[0] if place == target.removeprefix("docs/") else posixpath.relpath(place, folder)

    return _LINK.sub(inside, markdown)


def target_of(page: str, link: str) -> str:
    """The path in the repository to which a page, by its path in ``docs/``, links."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def site_place(target: str) -> str:
    """Place in the site of what has this path in the repository: a page for code, a list for a folder of figures."""
    path, place = ROOT / target, target.removeprefix("docs/")
    if path.is_dir():
        return f"{place}/index.md"
    return f"{place}.md" if path.suffix in {*LANGUAGES, ".ipynb"} else place


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """The site's files with the reference, and with everything that a page links to.

    Raises FileNotFoundError for a link to what is not in the repository.
    """
    from mkdocs.structure.files import File, InclusionLevel

    for path, text in {**reference(), **pages_of_links()}.items():
        files.append(File.generated(config, path, content=text))
    for target in linked():
        if (path := ROOT / target).is_file() and site_place(target).endswith(f"{path.suffix}.md"):
            source = {"abs_src_path": str(path), "inclusion": InclusionLevel.NOT_IN_NAV}
            files.append(File.generated(config, target.removeprefix("docs/"), **source))
    return files


@cache
def reference() -> dict[str, str]:
    """Path in the site → text of the pages that are made from the code."""
    sys.path[:0] = [str(DOCS), str(ROOT)]
    from reference_pages import pages

    return pages()


@cache
def linked() -> tuple[str, ...]:
    """The paths in the repository of all code and folders that pages link to, and of all examples.

    Raises FileNotFoundError for a link to what is not there, ValueError for one that the site cannot follow.
    """
    found: dict[str, None] = dict.fromkeys(
        f"{EXAMPLES}/{path.relative_to(ROOT / EXAMPLES).as_posix()}"
        for path in sorted((ROOT / EXAMPLES).rglob("*"))
        if path.suffix in {*LANGUAGES, ".ipynb"} and "plugin" not in path.parts
    )
    for page in sorted(DOCS.rglob("*.md")):
        name = page.relative_to(DOCS).as_posix()
        for link in _LINK.findall(page.read_text(encoding="utf-8")):
            target = target_of(name, link)
            if not (ROOT / target).exists() and target.removeprefix("docs/") not in reference():
                raise FileNotFoundError(f"docs/{name}: a link to {link}, which is not there")
            if site_place(target) != target.removeprefix("docs/"):
                found[target] = None
            elif not target.startswith("docs/"):
                raise ValueError(f"docs/{name}: a link to {link}, which is no page of the site")
    return tuple(found)


def pages_of_links() -> dict[str, str]:
    """Path in the site → text, for every script, notebook and folder that a page links to."""
    return {site_place(target): "\n".join(_page(ROOT / target)) for target in linked()}


def _page(path: Path) -> Iterator[str]:
    if path.is_dir():
        yield from ("# Raw figures", "", "What the pages' tables were made from, one file a run.", "")
        yield from (f"- [{each.name}]({each.name})" for each in sorted(path.iterdir()) if each.is_file())
        return
    link = f"[Download]({path.name}){{.download}} · `{path.relative_to(ROOT).as_posix()}` in the checkout"
    if path.suffix != ".ipynb":
        code = path.read_text(encoding="utf-8")
        yield from (f"# {path.name}", "", link, "", f"````{LANGUAGES[path.suffix]}", code, "````")
        return
    for place, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        yield from ([text] if cell["cell_type"] == "markdown" else ["````python", text, "````"])
        yield from ("", *([] if place else [link, ""]))
