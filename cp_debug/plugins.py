"""Parts that other distributions add: recipes, backends and readers of deploy files, found by entry point.

A distribution declares them in its ``pyproject.toml`` (``[project.entry-points."cpdebug.recipes"]``). Parts that
cpdebug brings itself stand in ``BUILT_IN``, so that a checkout that is not installed has them, too. Nothing is imported
before it is used, and exceptions of other people's code become one sentence that names their distribution.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import Any

from cp_debug.errors import CpdebugError, InputError, in_one_line

RECIPES, BACKENDS, CONFIGS = "cpdebug.recipes", "cpdebug.backends", "cpdebug.configs"
OWN = "cpdebug"
"""Name of this distribution."""
BUILT_IN: dict[str, dict[str, str]] = {
    RECIPES: {
        "centerpoint": "cp_debug.recipes.centerpoint.recipe:CenterPointModel",
        "mmdet3d": "cp_debug.recipes.mmdet3d.recipe:load_detector",
    },
    BACKENDS: {
        "torch": "cp_debug.backends.torch_backend:TorchBackend",
        "ort": "cp_debug.backends.ort_backend:OrtBackend",
        "openvino": "cp_debug.backends.openvino_backend:OpenVinoBackend",
        "emu": "cp_debug.backends.emulated:EmulatedBackend",
        "trt": "cp_debug.backends.tensorrt.backend:TensorRTBackend",
    },
    CONFIGS: {"awml": "cp_debug.deploy.awml:read_awml"},
}


@dataclass(frozen=True)
class Plugin:
    """One name in one group, and who declares it."""

    group: str
    name: str
    target: str
    """The object, as ``module:attribute``."""
    distribution: str = OWN
    """Name and version of the distribution that declares it."""
    summary: str = ""
    """The distribution's own summary, in a line."""
    rivals: Sequence[str] = ()
    """Other distributions that declare the same name: nobody may then use it."""

    @property
    def own(self) -> bool:
        """Whether cpdebug brings it."""
        return self.distribution == OWN

    def __str__(self) -> str:
        return f"plug-in {self.name!r} of {self.group} ({self.distribution})"

    @property
    def about(self) -> str:
        """A line for lists."""
        return f"{self.summary or 'a plug-in'} ({', '.join((self.distribution, *self.rivals))})"

    def check(self) -> None:
        """Raise InputError when the name is declared more than once."""
        if self.rivals:
            who = ", ".join((self.distribution, *self.rivals))
            raise InputError(f"{self.name!r} of {self.group} is declared by {who}; uninstall all but one of them")

    def load(self) -> Callable[..., Any]:
        """The object that the plug-in names. Raises InputError when it cannot be imported or called."""
        self.check()
        module, _, attribute = self.target.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (CpdebugError, KeyboardInterrupt):
            raise
        except BaseException as error:  # whatever other people's module raises while it is imported
            raise InputError(f"{self}: {self.target} cannot be imported ({in_one_line(_plain(error))})") from error
        if not callable(factory):
            raise InputError(f"{self}: {self.target} is {type(factory).__name__}; expected a callable")
        return factory

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tells what the plug-in raises. Raises InputError for everything but this project's errors and Ctrl-C."""
        try:
            yield
        except (CpdebugError, KeyboardInterrupt):
            raise
        except GeneratorExit:
            raise
        except BaseException as error:
            raise InputError(f"{self} raised {in_one_line(_plain(error))}") from error

    def require(self, value: Any, fields: Sequence[str], what: str) -> None:
        """Raise InputError when what the plug-in returned lacks a field of ``what``."""
        if missing := [name for name in fields if not hasattr(value, name)]:
            lacks = f"{type(value).__name__} without {', '.join(missing)}"
            raise InputError(f"{self} returned {lacks}; expected a {what}")


@lru_cache
def names(group: str) -> dict[str, Plugin]:
    """Name → plug-in of a group, cpdebug's own first."""
    declared: dict[str, list[Plugin]] = {}
    for name, target in BUILT_IN.get(group, {}).items():
        declared.setdefault(name, []).append(Plugin(group, name, target))
    for entry in sorted(_declared(group), key=lambda each: (each.name, _distribution(each))):
        summary = str(entry.dist.metadata["Summary"] or "").partition("\n")[0] if entry.dist else ""
        plugin = Plugin(group, entry.name, entry.value, _distribution(entry), summary)
        declared.setdefault(entry.name, []).append(plugin)
    return {
        name: Plugin(group, name, first.target, first.distribution, first.summary, [r.distribution for r in rivals])
        for name, (first, *rivals) in declared.items()
    }


def _declared(group: str) -> Iterator[EntryPoint]:
    """Entry points of all distributions but those whose own file of them cannot be read: theirs are nobody's."""
    try:
        yield from entry_points(group=group)
    except (TypeError, ValueError):  # Python reads all in one, and gives up
        seen: set[str] = set()
        for distribution in distributions():
            try:
                entries, name = distribution.entry_points, distribution.name
            except (TypeError, ValueError):
                continue
            if name not in seen:  # the first on the path, as when it is imported
                yield from entries.select(group=group)
            seen.add(name)


def told_by(error: BaseException) -> str | None:
    """The sentence for an error of a library that gave up reading entry points: the file that cannot be read, or None.

    torch and others read those of all distributions while they are imported.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") != "importlib.metadata":
        trace = trace.tb_next
    if trace is None:
        return None
    for distribution in distributions():
        try:
            _ = distribution.entry_points
        except (TypeError, ValueError):
            file = distribution.locate_file(f"{getattr(distribution, '_path', '')}/entry_points.txt")
            return f"{file}: damaged, so plug-ins cannot be listed; install its distribution again"
    return None


def find(group: str, name: str) -> Plugin | None:
    """The plug-in of a name. Raises InputError when it is declared more than once."""
    plugin = names(group).get(name)
    if plugin is not None:
        plugin.check()
    return plugin


def others(group: str) -> list[Plugin]:
    """The plug-ins of a group that other distributions declare."""
    return [plugin for plugin in names(group).values() if not plugin.own]


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a distribution without a name"


def _plain(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(f"it ended the program with {error}")
