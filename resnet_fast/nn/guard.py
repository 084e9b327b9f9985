# SPDX-License-Identifier: Apache-2.0
"""The facts that what is kept between two calls rests on, and the check that they still hold.

To look at every module anew takes longer than a small convolution. So what was found once is kept
together with all that it depends on: types, attributes, hooks, identities, addresses. Each kind of
fact is one list over all modules, compared in C, before the first launch of a forward: between two
launches the caches forget the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter

from torch import Tensor, nn

from resnet_fast.nn import reasons

# Read from a module's __dict__, where these live: a third of what attribute access costs.
# Backward hooks cannot fire: nothing is kept for calls that need a gradient.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CONV = itemgetter("stride", "padding", "dilation", "groups", "padding_mode", *_HOOKS)
_NORM = itemgetter("training", "eps", *_HOOKS)
_OTHER = itemgetter("training", *_HOOKS)
_POOL = attrgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_DIVISOR = attrgetter("divisor_override")


def _owner(attributes: dict) -> tuple:
    """Of a module whose forward is bypassed, but whose plain attributes are its user's."""
    return len(attributes), _OTHER(attributes), "forward" in attributes


_LOOKS: dict[str, Callable] = {
    "kind": type,
    "size": len,  # of __dict__: it grows by a forward of one's own, a compiled call, ...
    "conv": _CONV,
    "norm": _NORM,
    "other": _OTHER,
    "owner": _owner,
    "max_pool": _POOL,
    "average_pool": _DIVISOR,
    "address": Tensor.data_ptr,
    "contents": len,  # of the dictionaries of children, parameters and buffers
}


class Guard:
    """Facts of a root module and of modules under it.

    It keeps the modules under the root alive, never the root itself: it is kept for the root.
    """

    __slots__ = ("_facts", "_hooks", "_missing", "_root", "_storage", "_stored")

    def __init__(self, root: nn.Module) -> None:
        self._root = type(root)
        self._facts = {kind: ([], []) for kind in _LOOKS}
        self._hooks: list[dict] = []
        self._storage: list[dict] = []
        self._stored: list[object] = []
        self._missing: list[tuple[dict, str]] = []
        self._watch_attributes(root)

    def watch_owner(self, owner: nn.Module) -> None:
        """Look at a module under the root whose parts are watched each by itself."""
        self._add("kind", [owner])
        self._watch_attributes(owner)

    def _watch_attributes(self, owner: nn.Module) -> None:
        attributes = vars(owner)
        self._add("owner", [attributes])
        # A missing part is a plain attribute, None, which may become anything callable.
        self._missing += [(attributes, name) for name, value in attributes.items() if value is None]
        self._add_contents([owner])

    def watch(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
        """Look at modules of any kind, and at where tensors lie."""
        modules = list(modules)
        attributes = list(map(vars, modules))
        self._add("kind", modules)
        self._add("size", attributes)
        for module, own in zip(modules, attributes, strict=True):
            is_conv, is_norm = isinstance(module, nn.Conv2d), "eps" in own
            self._add("conv" if is_conv else "norm" if is_norm else "other", [own])
            if isinstance(module, nn.MaxPool2d):
                self._add("max_pool", [module])
            elif isinstance(module, nn.AvgPool2d):
                self._add("average_pool", [module])
        self._add("address", tensors)
        self._add_contents(modules)

    def holds(self, root: nn.Module) -> bool:
        """Whether every fact is still as it was."""
        if type(root) is not self._root or any(self._hooks):
            return False
        if not all(map(is_, _contents(self._storage), self._stored)):
            return False
        if any(attributes.get(name, name) is not None for attributes, name in self._missing):
            return False
        for kind, (things, before) in self._facts.items():
            if list(map(_LOOKS[kind], things)) != before:
                return False
        return True

    def _add(self, kind: str, things: Iterable) -> None:
        watched, before = self._facts[kind]
        things = list(things)
        before += map(_LOOKS[kind], things)
        watched += things

    def _add_contents(self, modules: list[nn.Module]) -> None:
        """Hooks, and children, parameters and buffers by identity: a tensor's == is another."""
        # Equal facts mean the same dictionaries of hooks; they must be empty as well.
        self._hooks += [getattr(m, name) for m in modules for name in _HOOKS]
        storage = [
            store
            for m in modules
            for store in (m._modules, m._parameters, m._buffers)
            if store or not reasons.is_torchs_own(m)  # which do not look for what they never had
        ]
        self._add("contents", storage)
        self._stored += _contents(storage)
        self._storage += storage


def _contents(storage: list[dict]) -> Iterator[object]:
    return chain.from_iterable(map(dict.values, storage))
