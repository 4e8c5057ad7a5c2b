"""Arguments by the names that AWML gives them, beside this project's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from cp_debug.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


def also_named(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function takes ``their_name=`` for the argument that it calls ``our_name``.

    ``names``: their name → ours. A call that gives one argument by both names raises InputError; what is wrong with
    one is said of the name that it was given by.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            given = {ours: theirs for theirs, ours in names.items() if theirs in kwargs}
            for ours, theirs in given.items():
                if ours in kwargs:
                    raise InputError(f"{ours} and {theirs} mean the same; expected one of them")
                kwargs[ours] = kwargs.pop(theirs)
            try:
                return function(*args, **kwargs)
            except InputError as error:
                name, colon, why = str(error).partition(": ")
                if name in given:
                    raise InputError(f"{given[name]}{colon}{why}") from error
                raise

        return called

    return decorate
