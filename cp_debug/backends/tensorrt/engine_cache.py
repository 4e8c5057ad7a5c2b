"""Built engines kept on disk under a hash of all that they depend on, so that the same engine is built once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cp_debug.backends.tensorrt.answers import Built
from cp_debug.errors import InputError
from cp_debug.files import complete_path, key_of
from cp_debug.reading import check_file, read_json, typed
from cp_debug.store import Store, fill

LARGEST = 20 << 30
"""Bytes of engines that are kept; beyond it the least recently used are removed."""
LARGEST_FACTS = 256 << 20
"""Largest size of the JSON file beside an engine, in bytes."""
ENGINE, FACTS = "engine", "facts.json"


@dataclass(frozen=True)
class EngineCache:
    """A folder of engines, each with what its build told, and of timing caches ``<key>.timings``.

    A key covers the graph's content, every setting of the build, the runner, TensorRT's version and the GPU: engines of
    another GPU may lie in the same folder and are not found.
    """

    folder: Path
    store: Store = field(compare=False, repr=False)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        asked: bool,
        on_say: Callable[[str], None] = lambda text: None,
        behind: Store | None = None,
    ) -> EngineCache | None:
        """The cache in ``folder``, which is made; None where it cannot be written.

        ``on_say`` is told of entries that cannot be used; ``behind``: see ``Store``. Raises InputError in place of None
        when a person ``asked`` for that folder.
        """

        def say(text: str) -> None:
            on_say(f"engine cache: {text}")

        try:
            return cls(folder, Store.open(folder, "--cache", most=LARGEST, behind=behind, on_say=say))
        except InputError:
            if asked:
                raise
            return None

    def timing_cache(self, parts: Mapping[str, Any]) -> Path:
        """File of the kernels' timings of one graph on one machine."""
        return self.folder / f"{key_of(parts)}.timings"

    def make_once(
        self, key: str, engine: Path, timings: Path | None, build: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The facts of the build of the file ``engine``, which ``build`` writes where no entry has it.

        ``timings``: the file of kernel timings that a build reads and writes. It goes with the engine, so that whoever
        takes the engine builds others of the graph with the same kernels. Facts of what was not built have ``cached``.
        """

        def make(entry: Path) -> dict[str, Any]:
            facts = build()
            kept_timings = {timings.name: timings} if timings is not None and timings.is_file() else {}
            fill(entry, {ENGINE: engine, FACTS: json.dumps(facts), **kept_timings})
            return facts

        def use(entry: Path) -> dict[str, Any]:
            check_file(entry / ENGINE, "engine")
            document = read_json(entry / FACTS, what="entry of the engine cache", most=LARGEST_FACTS)
            facts: Built = typed(Built, document, FACTS)
            (entry / ENGINE).replace(engine)
            if timings is not None and (entry / timings.name).is_file() and not timings.exists():
                with suppress(InputError), complete_path(timings) as partial:
                    shutil.copyfile(entry / timings.name, partial)
            return {**facts, "cached": True}

        return self.store.take(key, make, use, engine.parent)
