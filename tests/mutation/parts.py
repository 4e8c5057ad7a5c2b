"""What a process holds of cp_debug, and how it gets what a changed file has in its place."""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import inspect
import sys
import types
from abc import ABCMeta
from collections import defaultdict
from collections.abc import Iterator
from typing import Any


class Parts:
    """The functions of cp_debug in this process, by file, and what remembers results."""

    def __init__(self) -> None:
        self._functions: dict[str, list[types.FunctionType]] = defaultdict(list)
        self._caches = []
        for found in gc.get_objects():
            if type(found) is functools._lru_cache_wrapper and str(found.__module__).startswith("cp_debug"):
                self._caches.append(found)
            elif type(found) is types.FunctionType and "/cp_debug/" in found.__code__.co_filename:
                self._functions[found.__code__.co_filename].append(found)

    def renew(self, path: str, changed: str) -> None:
        """Give every function of the file ``path`` its code from the source ``changed``, and empty what they remember.

        Functions that ``changed`` has under the same name at the same line are renewed, those that stand in others when
        the others run again. What ran when the module was imported is as it was.
        """
        new = {(c.co_name, c.co_firstlineno): c for c in _codes(compile(changed, path, "exec"))}
        for cache in self._caches:
            cache.cache_clear()
        for function in self._functions[path]:
            code = new.get((function.__code__.co_name, function.__code__.co_firstlineno))
            if code is not None and code.co_freevars == function.__code__.co_freevars:
                function.__code__ = code

    def execute(self, path: str, source: str, changed: str) -> None:
        """Put what the changed statement of the file ``path`` makes at import in the place of what it made.

        A constant is replaced where it was imported, too; functions and classes stay the same objects. What was made of
        them elsewhere since stays as it was, so that a test that fails is to be tried with a module imported anew.
        Raises ValueError for a statement that is none of these.
        """
        before = [ast.dump(statement) for statement in ast.parse(source).body]
        module = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == path)
        statements = ast.parse(changed).body
        (statement,) = [new for old, new in zip(before, statements, strict=True) if old != ast.dump(new)]
        names = dict(vars(module))
        exec(compile(ast.Module([statement], []), path, "exec"), names)
        for name, new in names.items():
            old = vars(module).get(name)
            if new is old or name == "__builtins__":
                continue
            if isinstance(old, type) and isinstance(new, type):
                self._refit(path, old, new)
            elif isinstance(statement, ast.FunctionDef):
                self._set_defaults(path, new)
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                _replace(name, old, new)
            else:
                raise ValueError(f"{path}: {name}")
        for cache in self._caches:
            cache.cache_clear()

    def _refit(self, path: str, old: type, new: type) -> None:
        """Give a class the defaults, the fields and the constants of another."""
        if type(old) not in (type, ABCMeta):
            raise ValueError(f"{path}: {old.__name__} is of a kind of its own")
        for name, value in list(vars(new).items()):
            if name in ("__dict__", "__weakref__", "__doc__", "__module__", "__slots__", "_abc_impl"):
                continue
            function = _function(value)
            if function is not None and function.__code__.co_filename == path:
                self._set_defaults(path, function)
            elif name == "__dataclass_fields__":
                _refit_fields(old, value)
            elif not isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
                setattr(old, name, value)

    def _set_defaults(self, path: str, new: Any) -> None:
        """Give the function of the same name at the same line the defaults of ``new``."""
        function = _function(new)
        if function is None:
            raise ValueError(f"{path}: {new}")
        at = function.__code__.co_name, function.__code__.co_firstlineno
        for own in self._functions[path]:
            if (own.__code__.co_name, own.__code__.co_firstlineno) == at:
                own.__defaults__, own.__kwdefaults__ = function.__defaults__, function.__kwdefaults__


def _function(value: Any) -> types.FunctionType | None:
    """The function within a property, a method of the class, or what wraps one; None for something else."""
    for name in ("fget", "__func__", "func"):
        value = getattr(value, name, value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, types.FunctionType) else None


def _refit_fields(old: type, fields: dict[str, dataclasses.Field[Any]]) -> None:
    """Give the fields of a dataclass, which those derived from it share, what other fields of the same names say."""
    for name, field in vars(old)["__dataclass_fields__"].items():
        for slot in dataclasses.Field.__slots__:
            if slot not in ("name", "type", "_field_type"):
                setattr(field, slot, getattr(fields[name], slot))


def _replace(name: str, old: Any, new: Any) -> None:
    """Replace a constant in every module that has it under its name."""
    for module in list(sys.modules.values()):
        own = getattr(module, "__dict__", {})
        if own.get(name) is old and name in own:
            own[name] = new


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)
