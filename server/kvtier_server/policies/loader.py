"""From the configured name of a policy to its class.

Owns the names of the built-in policies and the messages that explain why a name or an out-of-tree
class was refused. Owns no policy.
"""

from __future__ import annotations

from difflib import get_close_matches

from kvtier_server.out_of_tree import NotUsable, describe, load_class
from kvtier_server.policies.arc import ArcPolicy
from kvtier_server.policies.base import CachePolicy
from kvtier_server.policies.lru import LruPolicy

BUILTIN_POLICIES: dict[str, type[CachePolicy]] = {"arc": ArcPolicy, "lru": LruPolicy}


class PolicyLoadError(ValueError):
    """The configured policy cannot be used; the text says why and what could be written instead."""


def check_policy_name(name: str) -> None:
    """Raise PolicyLoadError unless a built-in policy has this name."""
    if name not in BUILTIN_POLICIES:
        raise PolicyLoadError(f"no policy is called {name!r}{_did_you_mean(name)}; {_choices()}")


def load_policy_class(name_or_path: str) -> type[CachePolicy]:
    """Find a policy: a built-in name, `package.module:ClassName` or `package.module.ClassName`."""
    if name_or_path in BUILTIN_POLICIES:
        return BUILTIN_POLICIES[name_or_path]
    separator = ":" if ":" in name_or_path else "."
    module_name, found, class_name = name_or_path.rpartition(separator)
    if not found:
        check_policy_name(name_or_path)
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
            f"policy {name_or_path!r} could not be made with capacity={capacity}: {describe(error)}"
        ) from error


def _load_out_of_tree(path: str, module_name: str, class_name: str) -> type[CachePolicy]:
    try:
        return load_class(module_name, class_name, CachePolicy)  # type: ignore[type-abstract]
    except NotUsable as error:
        raise PolicyLoadError(f"policy {path!r}: {error}; {_choices()}") from error


def _choices() -> str:
    return f"write {', '.join(sorted(BUILTIN_POLICIES))}, or package.module:ClassName for a class of your own"


def _did_you_mean(name: str) -> str:
    close = get_close_matches(name.lower(), BUILTIN_POLICIES, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
