"""Hook of the documentation's site: links to what is no page (code, raw results) go to the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any

REPOSITORY = "https://github.com/cpdebug/cpdebug/blob/main/"
_LINK = re.compile(r"\]\(((?:\.\./|data/)[^)\s]*)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with every relative link out of ``docs/``, and to raw results, as an address."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def outside(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        is_page = target.startswith("docs/") and not match[1].startswith("data/")
        return match[0] if is_page else f"]({REPOSITORY}{target})"

    return _LINK.sub(outside, markdown)
