"""Released state dicts in our names: every entry is taken, left out by name, or refused; nothing disappears.

A converter opens what it was given as :class:`Released`, takes entries out of it, and closes it:

    theirs = Released(state_dict, "the authors' Attention")
    out = theirs.renamed({r"qkv\\.(weight|bias)": r"qkv.\\1", r"out\\.(weight|bias)": r"proj.\\1"})
    theirs.leave(r"attn_bias", because="a setting here")
    return theirs.close(out)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import check_divides, check_int

Rule = str | Callable[[re.Match[str], Tensor], Mapping[str, Tensor]]

#: What wrappers put before every name: data parallel, ``torch.compile``, a model around its backbone.
WRAPPERS = ("module.", "_orig_mod.", "model.")

#: What tools write beside weights: counted operations (thop), of how many models one is the mean (``torch.optim``).
_COUNTS = re.compile(r"(.*\.)?(total_ops|total_params)|n_averaged")


def unwrapped(state_dict: Mapping[str, Any], more: Sequence[str] = ()) -> dict[str, Any]:
    """The same entries without the names of wrappers (and ``more`` of them) that stand before all of them.

    Counts that tools write beside weights (``total_ops``, ``n_averaged``) are no entries.

    >>> unwrapped({"module.q.weight": 1, "module.q.bias": 2})
    {'q.weight': 1, 'q.bias': 2}
    """
    entries = {key: value for key, value in state_dict.items() if not _COUNTS.fullmatch(str(key))}
    while entries:
        wrapper = next((w for w in (*WRAPPERS, *more) if all(str(key).startswith(w) for key in entries)), None)
        if wrapper is None:
            break
        entries = {key[len(wrapper) :]: value for key, value in entries.items()}
    return entries


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


class Released:
    """Entries of a released state dict that are still to be accounted for.

    Args:
        state_dict: theirs; wrappers' names before all entries are taken off.
        source: whose it is, for errors.
        wrappers: more names that may stand before all entries.

    Raises:
        TypeError: something that is no mapping, or an entry that is no tensor.
        ValueError: no entries.
    """

    def __init__(self, state_dict: Mapping[str, Tensor], source: str, wrappers: Sequence[str] = ()):
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping from names to tensors, got {type(state_dict).__name__}")
        if strange := [key for key in state_dict if not isinstance(key, str)]:
            raise TypeError(f"state_dict must have names as its keys, got {strange[:3]}")
        entries = unwrapped(state_dict, wrappers)
        wrong = {k: type(v).__name__ for k, v in entries.items() if not isinstance(v, Tensor)}
        if wrong:
            raise TypeError(
                f"state_dict holds entries that are no tensors: {wrong}; hand over the state dict inside it"
            )
        if not entries:
            raise ValueError(f"state_dict is empty; it must be that of {source}")
        self.source = source
        self._left: dict[str, Tensor] = entries

    def __contains__(self, name: object) -> bool:
        return name in self._left

    def __iter__(self) -> Any:
        return iter(list(self._left))

    def peek(self, name: str) -> Tensor:
        """One entry that is left where it is."""
        return self._left[name]

    def take(self, name: str) -> Tensor:
        """One entry, which must be there."""
        if name not in self._left:
            raise ValueError(f"state_dict has no {name!r}, which {self.source} has; it has {_some(self._left)}")
        return self._left.pop(name)

    def take_all(self, names: Iterable[str]) -> list[Tensor] | None:
        """These entries, or ``None`` where there is none of them; a part of them is refused."""
        names = list(names)
        return [self.take(name) for name in names] if any(name in self._left for name in names) else None

    def matching(self, pattern: str) -> list[tuple[re.Match[str], Tensor]]:
        """Take every entry whose whole name matches."""
        found = [(m, self._left[m.string]) for m in (re.fullmatch(pattern, name) for name in self._left) if m]
        for match, _ in found:
            del self._left[match.string]
        return found

    def renamed(self, rules: Mapping[str, Rule]) -> dict[str, Tensor]:
        """Take what matches a rule, the first that does.

        Args:
            rules: from a pattern of the whole name to ours (with ``\\1``), or to a function of match and tensor that
                gives our entries.

        Raises:
            ValueError: two entries of theirs become one of ours.
        """
        out: dict[str, Tensor] = {}
        for pattern, rule in rules.items():
            for match, value in self.matching(pattern):
                made = {match.expand(rule): value} if isinstance(rule, str) else self._by(rule, match, value)
                if twice := sorted(set(made) & set(out)):
                    raise ValueError(f"{match.string!r} and another entry both become {twice[0]!r}")
                out.update(made)
        return out

    def parts(
        self, pattern: str, to: str, convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Take the state dicts of parts that have a converter of their own.

        Args:
            pattern: of the whole name; its last group is the name within the part.
            to: our name of the part, with ``\\1`` for the other groups.
            convert: from a part's state dict to ours.
        """
        prefixes: dict[str, dict[str, Tensor]] = {}
        for match, value in self.matching(pattern):
            prefixes.setdefault(match.expand(to), {})[match.group(match.re.groups)] = value
        return {f"{p}.{key}": value for p, held in prefixes.items() for key, value in convert(held).items()}

    def _by(self, rule: Callable[..., Mapping[str, Tensor]], match: re.Match[str], value: Tensor) -> Any:
        try:
            return rule(match, value)
        except (RuntimeError, LookupError, ArithmeticError, ValueError) as error:
            if match.string in str(error) or "num_heads" in str(error):
                raise  # it says itself what is wrong
            raise ValueError(
                f"{match.string} of state_dict has shape {tuple(value.shape)}, which {self.source} cannot have: {error}"
            ) from error

    def leave(self, pattern: str, because: str) -> None:
        """Leave out what matches by name; ``because`` says, to who reads the converter, why nothing is lost."""
        assert because
        self.matching(pattern)

    def close(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict, when everything was accounted for.

        Raises:
            ValueError: entries are left that nobody knows, or nothing was converted.
        """
        if self._left:
            raise ValueError(f"state_dict has entries that {self.source} does not have: {_some(self._left)}")
        if not out:
            raise ValueError(f"nothing of state_dict is a weight of {self.source}")
        return out


def split_rule(*names: str) -> Rule:
    """A rule for fused projections: equal parts of the first axis become ``<name>.<first group>``."""

    def rule(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
        if value.shape[0] % len(names):
            raise ValueError(f"{match.string} has {value.shape[0]} rows, which do not split into {', '.join(names)}")
        return {f"{n}.{match[1]}": part for n, part in zip(names, value.chunk(len(names)), strict=True)}

    return rule


def stacked(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The parts of ``name`` along a new first axis; ``ValueError`` unless they are of one shape."""
    shapes = sorted({tuple(p.shape) for p in parts})
    if len(shapes) != 1:
        raise ValueError(f"the entries of state_dict that make up {name!r} must be of one shape, got {shapes}")
    return torch.stack(list(parts))


def packed(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The rows of the parts of ``name``, one after another; ``ValueError`` unless they are as wide as one another."""
    shapes = [tuple(p.shape) for p in parts]
    if len({shape[1:] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(f"the entries of state_dict that make up {name!r} must be equally wide, got {shapes}")
    return torch.cat(list(parts))


def join(
    theirs: Released, name: str, parts: Iterable[str], kinds: Iterable[str] = ("weight", "bias")
) -> dict[str, Tensor]:
    """Separate projections as one: rows of ``parts`` one after another; all of them, or none."""
    parts = list(parts)
    out = {}
    for kind in kinds:
        found = theirs.take_all(f"{part}.{kind}" for part in parts)
        if found is not None:
            out[f"{name}.{kind}"] = packed(f"{name}.{kind}", found)
    return out


def grouped_rule(num_heads: int | None, num_kv_heads: int | None) -> Rule:
    """A rule for a fused projection that holds for every group its queries, its key, its value, as lit-gpt does."""

    def rule(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
        if num_heads is None:
            raise ValueError("num_heads is needed to split the authors' interleaved projections")
        check_int("num_heads", num_heads, least=1)
        groups = num_heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, least=1)
        check_divides("num_kv_heads", groups, "num_heads", num_heads)
        per_group = num_heads // groups
        check_divides("num_heads + 2 num_kv_heads", num_heads + 2 * groups, f"rows of {match.string}", value.shape[0])
        parts = value.unflatten(0, (groups, per_group + 2, -1)).split((per_group, 1, 1), 1)
        return {f"{n}.{match[1]}": part.flatten(0, 2) for n, part in zip("qkv", parts, strict=True)}

    return rule


#: Plain attention: ``torch.nn.MultiheadAttention``, timm's ``Attention``, and the names of our own projections.
PLAIN: dict[str, Rule] = {
    r"(?:qkv\.|in_proj_)(weight|bias)": split_rule("q", "k", "v"),
    r"([qkv])_proj_weight": r"\1.weight",
    r"(?:out_proj|proj)\.(weight|bias)": r"proj.\1",
    r"([qkv]|[qkv]_norm)\.(weight|bias)": r"\1.\2",
}
