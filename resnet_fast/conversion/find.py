# SPDX-License-Identifier: Apache-2.0
"""What of a model can be fused: its owners, and what looks as if it could but is not understood.

An owner is a module whose forward, or a method that its forward calls, is known: a residual block,
a stem, a convolution with its norm. While one runs, owners among its parts have no say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from resnet_fast.conversion import recipes
from resnet_fast.conversion.forward import Method, Role, is_converted
from resnet_fast.nn import parts, reasons
from resnet_fast.nn.recipes import SEQUENCE, Recipe, fusable, is_sequence


class Owner(NamedTuple):
    """A module that runs convolutions by a known recipe.

    Args:
        name: its path; with "(stem)" where the recipe is that of a model's stem.
        module: itself.
        recipe: of its forward, or of its stem.
        installed: whether running it tries to fuse: its class does, or `optimize` was there.
        role: what `optimize` makes it, but for the backend.
        convs: those of its convolutions that can be fused; perhaps none.
        opened: the sequences that are among its parts.
        inner: whether it is itself among the parts of another owner.
    """

    name: str
    module: nn.Module
    recipe: Recipe
    installed: bool
    role: Role
    convs: list[nn.Module]
    opened: list[nn.Module]
    inner: bool


Found = tuple[Recipe, bool, Role]


def owners(model: nn.Module) -> list[Owner]:
    """The owners in a model: outer ones first, a model's stem before its blocks."""
    found: list[Owner] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        stem, whole = _stem_of(module), _whole_of(module)
        for suffix, known in (("(stem)", stem), ("", whole)):
            if known is None:
                continue
            opened: list[nn.Module] = []
            convs = parts.candidates(module, known[0], recipes.recipe_for, opened)
            if convs or known[0] is not SEQUENCE:
                path = ".".join(part for part in (name, suffix) if part)
                found.append(Owner(path, module, *known, convs, opened, module in inside))
                inside.update(opened)
    return found


def _whole_of(module: nn.Module) -> Found | None:
    """By what all that a module does is known."""
    recipe = recipes.recipe_for(module)
    if recipe is None:
        return None
    kind = "sequence" if recipe is SEQUENCE else "block"
    return recipe, fusable(module) is not None, Role(kind, recipe)


def _stem_of(module: nn.Module) -> Found | None:
    """By what the beginning of a model is known."""
    family = getattr(type(module), "family", None)
    if family is not None and "forward" not in module.__dict__:
        return family.stem, True, Role("network", known=Method("forward", family))
    method, taps = recipes.method_for(module), recipes.taps_for(module)
    known = method or taps
    if known is None or known.method in module.__dict__:
        return None
    role = Role("network" if method else "taps", known=known)
    return known.stem(module), is_converted(module), role


def left_over(model: nn.Module, found: list[Owner]) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, reason) of what holds convolutions and norms but is no owner."""
    known = {m for owner in found for m in (owner.module, *owner.convs, *owner.opened)}
    for name, module in model.named_modules():
        children = list(module.children())
        convs = [child for child in children if _is_conv(child) and child not in known]
        if module not in known and convs and any(map(_is_norm, children)):
            yield name, module, _why_left(module, children)


def kind_of(module: nn.Module) -> str:
    """The name of a module's class; of a scripted one, of the class that it was made of."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return module.original_name if scripted else type(module).__name__


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) or kind_of(module) == "Conv2d"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in kind_of(module).lower()


def _why_left(module: nn.Module, children: list[nn.Module]) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced: TorchScript runs its own copy of the plain forward"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    norm, conv = (
        next(i for i, child in enumerate(children) if looks(child))
        for looks in (_is_norm, _is_conv)
    )
    if norm < conv:
        return "pre-activation: its norms come before its convolutions, with no way to fold them in"
    if is_sequence(module):
        return reasons.unit_refusal(children[conv], next(iter(children[conv + 1 :]), None))
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}.forward is not one that is known"
