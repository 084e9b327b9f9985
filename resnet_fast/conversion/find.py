# SPDX-License-Identifier: Apache-2.0
"""What of a model can be fused: its owners, and what looks as if it could but is not understood.

An owner is a module whose forward, or a method that its forward calls, is known: a residual block,
a stem, a convolution with its norm. While one runs, owners among its parts have no say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from resnet_fast.conversion import recipes
from resnet_fast.conversion.forward import (
    BlockForward,
    FusedForward,
    ModelForward,
    SequenceForward,
    StemForward,
    TapsForward,
)
from resnet_fast.nn import blocks, fusion, parts
from resnet_fast.nn.parts import SEQUENCE, Recipe


class Owner(NamedTuple):
    """A module that runs convolutions by a known recipe.

    Args:
        name: its path; with "(stem)" where the recipe is that of a model's stem.
        module: itself.
        recipe: of its forward, or of its stem.
        installed: whether running it tries to fuse: its class does, or `optimize` was there.
        make: (backend) -> what `optimize` installs.
        convs: those of its convolutions that can be fused; perhaps none.
        opened: the sequences that are among its parts.
        inner: whether it is itself among the parts of another owner.
    """

    name: str
    module: nn.Module
    recipe: Recipe
    installed: bool
    make: Callable[[str], FusedForward]
    convs: list[nn.Module]
    opened: list[nn.Module]
    inner: bool


Found = tuple[Recipe, bool, Callable[[str], FusedForward]]


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
    kind = SequenceForward if recipe is SEQUENCE else BlockForward
    return recipe, parts.fusable(module) is not None, lambda on: kind(module, recipe, on)


def _stem_of(module: nn.Module) -> Found | None:
    """By what the beginning of a model is known."""
    free = "forward" not in module.__dict__
    fuses = blocks.fuses_stem(module)
    if fuses or (free and recipes.is_torchvision_resnet(module)):
        return parts.STEM, fuses, lambda on: ModelForward(module, None, on)
    method, taps = recipes.method_for(module), recipes.taps_for(module)
    known, kind = (method, StemForward) if method else (taps, TapsForward)
    there = known and module.__dict__.get(known.method)
    if known is None or not (there is None or isinstance(there, FusedForward)):
        return None
    return known.stem(module), there is not None, lambda on: kind(module, known, on)


def left_over(model: nn.Module, found: list[Owner]) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, reason) of what holds convolutions and norms but is no owner."""
    known = {m for owner in found for m in (owner.module, *owner.convs, *owner.opened)}
    for name, module in model.named_modules():
        children = [child for child in module._modules.values() if child is not None]
        convs = [c for c in children if isinstance(c, nn.Conv2d) and c not in known]
        if module not in known and convs and any(map(fusion.is_like_norm, children)):
            yield name, module, _why_left(module, children)


def _why_left(module: nn.Module, children: list[nn.Module]) -> str:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    norm, conv = (
        next(i for i, child in enumerate(children) if looks(child))
        for looks in (fusion.is_like_norm, lambda child: isinstance(child, nn.Conv2d))
    )
    if norm < conv:
        return "pre-activation: its norms come before its convolutions, with no way to fold them in"
    if parts.is_sequence(module):
        return fusion.unit_refusal(children[conv], next(iter(children[conv + 1 :]), None))
    return f"{kind.__module__}.{kind.__qualname__}.forward is not one that is known"
