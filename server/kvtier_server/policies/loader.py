"""From the configured name of a policy to its class.

Owns the names of the built-in policies and the messages that explain why a name or an out-of-tree
class was refused. Owns no policy.
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module

from kvtier_server.policies.arc import ArcPolicy
from kvtier_server.policies.base import CachePolicy
from kvtier_server.policies.lru import LruPolicy

BUILTIN_POLICIES: dict[str, type[CachePolicy]] = {"arc": ArcPolicy, "lru": LruPolicy}


class PolicyLoadError(ValueError):
    """The configured policy cannot be used; the text says why and what could be written instead."""


def load_policy_class(name_or_path: str) -> type[CachePolicy]:
    """Find a policy: a built-in name, `package.module:ClassName` or `package.module.ClassName`."""
    if name_or_path in BUILTIN_POLICIES:
        return BUILTIN_POLICIES[name_or_path]
    separator = ":" if ":" in name_or_path else "."
    module_name, found, class_name = name_or_path.rpartition(separator)
    if not found:
        raise PolicyLoadError(
            f"no policy is called {name_or_path!r}{_did_you_mean(name_or_path)}; {_choices()}"
        )
    if not module_name or not class_name:
        raise PolicyLoadError(f"policy {name_or_path!r} is not a module path; {_choices()}")
    return _load_out_of_tree(name_or_path, module_name, class_name)


def make_policy(name_or_path: str, capacity: int) -> CachePolicy:
    """Make an empty policy for a size class of `capacity` slots."""
    policy_class = load_policy_class(name_or_path)
    try:
        return policy_class(capacity)
    except Exception as error:  # code that is not ours may raise anything
        raise PolicyLoadError(
            f"policy {name_or_path!r} could not be made with capacity={capacity}: {_describe(error)}"
        ) from error


def _load_out_of_tree(path: str, module_name: str, class_name: str) -> type[CachePolicy]:
    try:
        module = import_module(module_name)
    except Exception as error:  # code that is not ours may raise anything
        raise PolicyLoadError(
            f"policy {path!r}: importing {module_name!r} failed: {_describe(error)}; "
            f"is its package installed in the daemon's environment? {_choices()}"
        ) from error
    found: object = getattr(module, class_name, None)
    if found is None:
        raise PolicyLoadError(f"policy {path!r}: {module_name!r} has no {class_name!r}; {_choices()}")
    if not inspect.isclass(found) or not issubclass(found, CachePolicy):
        raise PolicyLoadError(
            f"policy {path!r}: {class_name!r} is not a CachePolicy; "
            f"derive the class from {CachePolicy.__module__}.CachePolicy"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise PolicyLoadError(f"policy {path!r}: {class_name!r} does not implement {', '.join(missing)}")
    return found


def _choices() -> str:
    return f"write {', '.join(sorted(BUILTIN_POLICIES))}, or package.module:ClassName for a class of your own"


def _did_you_mean(name: str) -> str:
    close = get_close_matches(name.lower(), BUILTIN_POLICIES, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
