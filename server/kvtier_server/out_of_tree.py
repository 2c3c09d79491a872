"""Classes that somebody else wrote and the configuration names by their module: policies, tiers.

Owns loading one and saying why it cannot be used. What it is for is the caller's to add to the message.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TypeVar

T = TypeVar("T")


class NotUsable(ValueError):
    """There is no such class, or it is not what is wanted."""


def load_class(module_path: str, class_name: str, base: type[T]) -> type[T]:
    """Import a class that derives from `base` and implements all of it. Raises NotUsable."""
    try:
        module = import_module(module_path)
    except Exception as error:  # code that is not ours may raise anything
        raise NotUsable(
            f"importing {module_path!r} failed: {describe(error)}; "
            "is its package installed in the daemon's environment?"
        ) from error
    found: object = getattr(module, class_name, None)
    if found is None:
        raise NotUsable(f"{module_path!r} has no {class_name!r}")
    if not inspect.isclass(found) or not issubclass(found, base):
        raise NotUsable(
            f"{class_name!r} is not a {base.__name__}; "
            f"derive the class from {base.__module__}.{base.__name__}"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise NotUsable(f"{class_name!r} does not implement {', '.join(missing)}")
    return found


def describe(error: Exception) -> str:
    """Name an exception of code that is not ours."""
    return f"{type(error).__name__}: {error}"
