"""Joins the arguments of several calls of a denoiser along the batch dimension, and splits its answer again.

The rules look at the forward's signature and at the values, not at classes (families.joining has the exceptions):

- the first of MAIN_NAMES, or the first parameter, holds the samples, as a tensor or as a list with one item each;
- a tensor as long as that in its first dimension has one row for each sample: rows are concatenated;
- a number in a tensor (a timestep, a guidance scale) is one for each sample: repeated, then concatenated;
- any other tensor (ids of positions, rotary embeddings) belongs to all samples: it must be equal, and is passed once;
- a list of the samples' items (shapes, lengths, ragged captions) is concatenated; tuples, dicts and other lists are
  looked into;
- numbers, texts, flags and None must be equal;
- anything else, and caches, cannot be joined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from stages.diffusion.batching.shared import Digests
from stages.diffusion.families.joining import BATCH_AXES, PADDED, SHARED

MAIN_NAMES = ("hidden_states", "x", "sample", "latents")
LENGTHS = ("_lens", "_lengths")
"""How lists of numbers that belong to single samples are named."""
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


class Same(msgspec.Struct, frozen=True):
    """Equal in all calls."""

    token: Hashable


class Rows(msgspec.Struct, frozen=True):
    """A tensor with one row, or several, for each sample along `axis`."""

    axis: int
    kind: Kind
    """Its shape without that axis, its dtype and device."""


class Numbers(msgspec.Struct, frozen=True):
    """A tensor of one number, or of one for each sample."""

    dtype: torch.dtype
    device: torch.device


class Items(msgspec.Struct, frozen=True):
    """A list with one item for each sample."""

    kind: Hashable


class Parts(msgspec.Struct, frozen=True):
    """A tuple, list or dict of values with rules of their own."""

    type: type
    names: tuple[Hashable, ...]
    rules: tuple[Rule, ...]


Rule = Same | Rows | Numbers | Items | Parts


class Form(msgspec.Struct, frozen=True):
    """One call of a denoiser, ready to be joined with those that have the same `key`."""

    arguments: dict[str, Any]
    rules: tuple[tuple[str, Rule], ...]
    size: int
    """Samples."""
    num_values: int
    """Numbers in its samples."""

    @property
    def key(self) -> Hashable:
        """Calls with equal keys can be joined."""
        return self.rules

    @property
    def structure(self) -> Hashable:
        """The key without sizes and values: what kinds of arguments there are."""
        return tuple((name, _structure(rule)) for name, rule in self.rules)


class _CannotJoin(Exception):
    """A value that no rule covers."""


class Joiner:
    """The rules of one denoiser. Not safe for several threads."""

    def __init__(self, denoiser: nn.Module, forward: Callable[..., Any]) -> None:
        """`forward`: the denoiser's own, for its signature."""
        name = type(denoiser).__name__
        self._signature = inspect.signature(forward)
        names = list(self._signature.parameters)
        self._main = next((main for main in MAIN_NAMES if main in names), names[0] if names else "")
        self._axes, self._shared, self._padded = BATCH_AXES.get(name, {}), SHARED.get(name, ()), PADDED.get(name, {})
        self._digests = Digests()

    def form(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Form | None:
        """The call with these arguments; None when it must run by itself."""
        try:
            arguments = self._bind(args, kwargs)
            main = arguments.get(self._main)
            if not isinstance(main, (Tensor, list)) or (isinstance(main, Tensor) and not main.dim()):
                return None
            size = len(main)
            in_lists = isinstance(main, list)
            rules = tuple((name, self._rule(name, value, size, in_lists)) for name, value in arguments.items())
        except (_CannotJoin, TypeError):  # TypeError: the forward itself will complain
            return None
        return Form(arguments, rules, size, _num_values(main))

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= value
            elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise _CannotJoin(name)
            else:
                arguments[name] = value
        return dict(sorted(arguments.items()))

    def _rule(self, name: str, value: Any, size: int, in_lists: bool) -> Rule:
        if "cache" in name and value is not None:
            raise _CannotJoin(name)
        if isinstance(value, PLAIN):
            return Same((type(value), value))
        if isinstance(value, Tensor):
            return self._tensor_rule(name, value, size)
        if isinstance(value, list) and len(value) == size and _is_by_sample(name, value, in_lists):
            if name.endswith(LENGTHS):
                return Items(None)
            padded = self._padded[name](value) if name in self._padded else None
            return Items((padded, _kind_of_items(value, exact=name == self._main)))
        if isinstance(value, (list, tuple)):
            parts = tuple(self._rule(name, part, size, in_lists) for part in value)
            return Parts(type(value), (), parts)
        if isinstance(value, dict):
            names = tuple(value)
            return Parts(dict, names, tuple(self._rule(str(key), value[key], size, in_lists) for key in names))
        raise _CannotJoin(name)

    def _tensor_rule(self, name: str, value: Tensor, size: int) -> Rule:
        axis = self._axes.get(name, 0)
        if name not in self._shared:
            if not axis and value.dim() <= 1 and value.numel() in (1, size):
                return Numbers(value.dtype, value.device)
            if value.dim() > axis and value.shape[axis] == size:
                rest = (*value.shape[:axis], *value.shape[axis + 1 :])
                return Rows(axis, (rest, value.dtype, value.device))
        digest = self._digests.digest(value)
        if digest is None:
            raise _CannotJoin(name)
        return Same(digest)


def join(forms: Sequence[Form]) -> dict[str, Any]:
    """The arguments of one call that does what calls with equal keys do."""
    sizes = [form.size for form in forms]
    return {name: _join(rule, [form.arguments[name] for form in forms], sizes) for name, rule in forms[0].rules}


def split(answer: Any, sizes: Sequence[int]) -> list[Any]:
    """The answers of the calls with so many samples, out of the joined one. What has no samples goes to each."""
    total = sum(sizes)
    if isinstance(answer, Tensor):
        return list(answer.split(list(sizes))) if answer.dim() and len(answer) == total else [answer] * len(sizes)
    if isinstance(answer, list) and len(answer) == total:
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        return [answer[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    if isinstance(answer, dict):  # ModelOutput is one too
        columns = zip(*(split(value, sizes) for value in answer.values()), strict=True)
        made = [dict(zip(answer, column, strict=True)) for column in columns]
        return [type(answer)(**one) for one in made]
    if isinstance(answer, (list, tuple)):
        return [type(answer)(column) for column in zip(*(split(value, sizes) for value in answer), strict=True)]
    return [answer] * len(sizes)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in an answer."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, (list, tuple)) else []


def _join(rule: Rule, values: list[Any], sizes: list[int]) -> Any:
    match rule:
        case Same():
            return values[0]
        case Rows(axis=axis):
            return torch.cat(values, dim=axis)
        case Numbers():
            return torch.cat([value.reshape(-1).expand(size) for value, size in zip(values, sizes, strict=True)])
        case Items():
            return [item for value in values for item in value]
        case Parts(type=kind, names=names, rules=rules):
            if kind is dict:
                named = zip(names, rules, strict=True)
                return {name: _join(part, [value[name] for value in values], sizes) for name, part in named}
            return kind(_join(part, [v[number] for v in values], sizes) for number, part in enumerate(rules))


def _is_by_sample(name: str, value: list[Any], in_lists: bool) -> bool:
    """Whether a list as long as the batch has an item for each sample, and is not a container of one for all."""
    if in_lists:
        return True
    if name.endswith(LENGTHS):
        return all(isinstance(item, int) for item in value)
    return all(isinstance(item, (list, tuple)) for item in value) and not any(map(tensors_of, value))


def _kind_of_items(value: Any, *, exact: bool) -> Hashable:
    """What must be equal of the items of joined lists; the lengths of tensors need not, where they are not `exact`."""
    if isinstance(value, Tensor):
        return (tuple(value.shape) if exact else value.shape[1:], value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(dict.fromkeys(_kind_of_items(item, exact=exact) for item in value))
    if isinstance(value, PLAIN):
        return (type(value), value)
    raise _CannotJoin(type(value).__name__)


def _num_values(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else sum(map(_num_values, value)) if value is not None else 0


def _structure(rule: Rule) -> Hashable:
    match rule:
        case Parts(type=kind, names=names, rules=rules):
            return (kind, names, tuple(map(_structure, rules)))
        case Rows(axis=axis, kind=kind):
            return (Rows, axis, len(kind[0]))
        case _:
            return type(rule)
