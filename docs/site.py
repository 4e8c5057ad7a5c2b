"""Hook of the documentation's site: the reference is made from the code, and links to what is no page (code, raw
results) go to the repository."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/cpdebug/cpdebug/blob/main/"
_LINK = re.compile(r"\]\(((?:\.\./|data/)[^)\s]*|[^):\s]+\.py)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with every relative link out of ``docs/``, and to raw results, as an address."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def outside(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        is_page = target.startswith("docs/") and not match[1].startswith("data/") and not target.endswith(".py")
        return match[0] if is_page else f"]({REPOSITORY}{target})"

    return _LINK.sub(outside, markdown)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """The site's files with the reference."""
    from mkdocs.structure.files import File

    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent)]
    from reference_pages import pages

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
