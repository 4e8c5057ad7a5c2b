"""Prints the commands of the README's section "Two commands", a line each: what .ci/run runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def commands(page: str) -> Iterator[str]:
    """The shell blocks of the section. Raises ValueError where it has not two of one line each."""
    sections = {text.partition("\n")[0]: text for text in re.split(r"^## ", page, flags=re.MULTILINE)}
    blocks = re.findall(r"^```sh\n(.*?)^```$", sections.get("Two commands", ""), flags=re.MULTILINE | re.DOTALL)
    if len(blocks) != 2 or any(len(block.splitlines()) != 1 for block in blocks):
        raise ValueError(f'{README}: "Two commands" has {len(blocks)} blocks; expected two, of one line each')
    return (block.strip() for block in blocks)


if __name__ == "__main__":
    print("\n".join(commands(README.read_text(encoding="utf-8"))))
