"""Names of mechanisms. A file under ``attnlib/nn`` registers itself; nothing else has to know about it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ..checks import check_type, checked
from ..types import Traits
from .released import unwrapped

T = TypeVar("T", bound=type)

#: Acronyms that several papers share, and what each of them means. A slug of that name is still that mechanism.
ACRONYMS: Mapping[str, tuple[str, ...]] = {
    "cam": ("'danet-channel-attention'", "class activation maps"),
    "dit": ("'dit-dynamic-token-routing', the models dynamic_token_routing_vit_*", "the diffusion transformer"),
    "eva": ("'eva', masked representation learning at scale", "efficient attention via control variates"),
    "hat": ("'hat', the hybrid attention transformer that restores images", "hierarchical attention of FasterViT"),
    "pam": ("'danet-position-attention'", "the parallax attention of stereo images"),
    "psa": ("'polarized-self-attention'", "pyramid squeeze attention"),
    "sam": (
        "'ulsam', subspace attention", "'smt-scale-aware-modulation'", "the Segment Anything model",
        "sharpness-aware minimization",
    ),
    "vsa": ("'vsa-varied-size-window', varied-size window attention", "video sparse attention"),
}  # fmt: skip

_ENTRIES: dict[str, dict[str, type]] = {"mechanism": {}, "fusion": {}, "pool": {}}
_ALIASES: dict[str, list[str]] = {}
_discovered = False


def register(slug: str, *aliases: str, kind: str = "mechanism") -> Callable[[T], T]:
    """Class decorator: make the class known as ``slug`` (its card's name) and under ``aliases``."""
    if kind not in _ENTRIES:
        raise ValueError(f"kind={kind!r} is not possible; choose one of {list(_ENTRIES)}")

    def add(cls: T) -> T:
        known = _ENTRIES[kind].get(slug)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"{slug!r} is registered already, by {known.__module__}.{known.__qualname__}")
        _ENTRIES[kind][slug] = cls
        cls.slug = slug  # type: ignore[attr-defined]
        for alias in aliases:
            owners = _ALIASES.setdefault(alias.lower(), [])
            if slug not in owners:
                owners.append(slug)
        return cls

    return add


def discover() -> None:
    """Import every module under ``attnlib.nn`` once, so that all registrations have run."""
    global _discovered
    if _discovered:
        return
    package = importlib.import_module("attnlib.nn")
    for module in pkgutil.walk_packages(package.__path__, prefix="attnlib.nn."):
        importlib.import_module(module.name)
    _discovered = True


def list_mechanisms(kind: str = "mechanism") -> list[str]:
    """All registered names of one kind, sorted."""
    discover()
    return sorted(_ENTRIES[kind])


def shared_acronym(name: str, what: str = "") -> None:
    """Raise ``ValueError`` with the candidates where ``name`` is one of :data:`ACRONYMS`."""
    if meanings := ACRONYMS.get(name.lower()):
        raise ValueError(f"{what}{name!r} is ambiguous; it may mean {', or '.join(meanings)}")


def find(name: str) -> type:
    """The class registered under a slug or an unambiguous alias.

    Raises:
        ValueError: unknown name (the nearest are suggested) or ambiguous alias (its candidates are listed).
    """
    discover()
    check_type("name", name, str, "the name of a mechanism")
    key = name.lower()
    for entries in _ENTRIES.values():
        if key in entries:
            return entries[key]
    owners = _ALIASES.get(key, [])
    shared_acronym(name)
    if len(owners) > 1:
        raise ValueError(f"{name!r} is ambiguous; it may mean one of {sorted(owners)}")
    if owners:
        return find(owners[0])
    known = [*(name for kind in _ENTRIES for name in list_mechanisms(kind)), *_ALIASES]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else "`attnlib list` shows all"
    raise ValueError(f"unknown mechanism {name!r}; {hint}")


def default_traits(name: str) -> Traits:
    """What an instance with default settings claims; its class claims the most that any setting can do.

    Where a class needs more than ``dim`` to be built, what the class claims.

    >>> default_traits("lolcats").work["N"]
    1
    """
    cls: Any = find(name)
    with torch.random.fork_rng(devices=[]):
        try:
            return cls(dim=64).traits
        except (TypeError, ValueError):
            return cls.class_traits


def create(name: str, **config: Any) -> Any:
    """Build a mechanism by name.

    >>> sorted(create("softmax-attention", dim=32, num_heads=4).traits.patterns)
    ['noncausal-cross', 'noncausal-self']
    """
    cls = find(name)
    try:
        return cls(**config)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(f"{error}; {name!r} takes {inspect.signature(cls)}") from None


def convert_state_dict(name: str, state_dict: Any, *, prefix: str = "", **options: Any) -> dict[str, Any]:
    """The authors' state dict in the names and layouts of our module, ready to be loaded strictly.

    Every entry is used, left out by a name that the converter knows, or refused. Names of wrappers before all entries
    (``module.``, ``model.``) do not matter.

    Args:
        name: of the mechanism.
        state_dict: theirs.
        prefix: convert only the entries below it, for one layer out of a whole model: ``"blocks.0.attn."``.
        options: of the mechanism's converter.

    Raises:
        ValueError: when the mechanism has no released counterpart; nothing to convert, or entries that are unknown.
        TypeError: no state dict, or an option that the converter does not take.
    """
    convert = getattr(find(name), "convert_state_dict", None)
    if convert is None:
        raise ValueError(f"{name!r} has no released state dict to convert")
    several = isinstance(state_dict, (list, tuple))  # of checkpoints, where the converter merges them
    for one in state_dict if several else [state_dict]:
        check_type("state_dict", one, Mapping, "a dictionary of tensors by name")
        for key in one:
            check_type("a key of state_dict", key, str)
    check_type("prefix", prefix, str)
    if prefix:
        entries = unwrapped(state_dict)
        prefix = prefix if prefix.endswith(".") else prefix + "."
        state_dict = {key[len(prefix) :]: value for key, value in entries.items() if key.startswith(prefix)}
        if not state_dict:
            near = difflib.get_close_matches(prefix, {key.rpartition(".")[0] + "." for key in entries}, n=3, cutoff=0.3)
            raise ValueError(f"state_dict has no entries below prefix={prefix!r}; it has entries below {near}")
    try:
        return checked(convert)(state_dict, **options)
    except (RuntimeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"the entries of state_dict do not fit together as {name!r} has them: {error}") from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(f"{error}; the converter of {name!r} takes {inspect.signature(convert)}") from None
