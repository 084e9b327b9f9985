# SPDX-License-Identifier: Apache-2.0
"""Recipes: the names of a module's parts in the order in which its forward runs them.

    y = activation(main(x) + shortcut(x))   a `Recipe` with a shortcut: a residual block
    y = main(x)                             a `Recipe` without: a stem, a convolution with its norm
    y = head(stages(pool(stem(x))))         a `Family`: a network

A class that is known has a recipe; what an instance holds in these places is for `parts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.nn import reasons


@dataclass(frozen=True, slots=True)
class Recipe:
    """The names of a module's parts.

    Args:
        main: the parts in the order they run, "?" behind those that may be missing or None; or
            None for all children, whatever they are called.
        shortcut: what is done to x before it is added to main's result; "" where nothing is added.
        activation: what follows the addition; "" for nothing.
        always: whether x itself is added where the shortcut is None; else nothing is.
        fork: the part of main whose result the shortcut reads, as in a pre-activation block; "" for
            x. Where the shortcut is None, x itself is added all the same.
    """

    main: tuple[str, ...] | None
    shortcut: str = ""
    activation: str = ""
    always: bool = True
    fork: str = ""


def residual(
    *main: str, shortcut: str = "downsample", activation: str = "relu", fork: str = ""
) -> Recipe:
    """The recipe of a residual block."""
    return Recipe(main, shortcut, activation, fork=fork)


BASIC_BLOCK = residual("conv1", "bn1", "relu", "conv2", "bn2")
BOTTLENECK = residual("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")
STEM = Recipe(("conv1", "bn1", "relu"))
SEQUENCE = Recipe(None)


def _flatten(x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


@dataclass(frozen=True, slots=True)
class Family:
    """The names of a network's parts, in the order in which one of its methods runs them.

    Args:
        stem: the recipe of what runs first.
        pool: the module behind it; "" for none.
        stages: the modules that hold its blocks.
        head: modules and functions that run last.
    """

    stem: Recipe
    pool: str = ""
    stages: tuple[str, ...] = ()
    head: tuple[str | Callable[[Tensor], Tensor], ...] = ()


STAGES = ("layer1", "layer2", "layer3", "layer4")
RESNET = Family(STEM, "maxpool", STAGES, ("avgpool", _flatten, "fc"))


class Fusable(NamedTuple):
    """How calling a module tries to fuse."""

    recipe: Recipe
    backend: str
    plain: Callable[[nn.Module, Tensor], Tensor]  # (module, x) -> y, fusing nothing of it


def fusable(module: nn.Module) -> Fusable | None:
    """How calling `module` would try to fuse, or None if it would not.

    True of a class that has a `recipe` beside its forward; not of a subclass that overrides the
    forward, nor of an instance that has one of its own.
    """
    kind = type(module)
    recipe = getattr(kind, "recipe", None)
    if recipe is None or "forward" in module.__dict__:
        return None
    if "recipe" not in _owner(kind, "forward").__dict__:
        return None
    return Fusable(recipe, getattr(kind, "backend", "auto"), kind._forward_plain)


def _owner(kind: type, attribute: str) -> type:
    return next(k for k in kind.__mro__ if attribute in k.__dict__)


def recipe_of(module: nn.Module) -> Recipe | None:
    """The recipe that calling `module` follows, or None."""
    found = fusable(module)
    return found and found.recipe


def is_sequence(module: nn.Module) -> bool:
    """Whether calling it runs its children one after the other and nothing else."""
    kind = type(module)
    forward = getattr(kind, "forward", None)  # a scripted module's class has none
    if forward is not nn.Sequential.forward and not getattr(kind, "runs_chain", False):
        return False
    return "forward" not in module.__dict__ and not reasons.has_hooks(module)


def stem_of(recipe: Recipe, backend: str) -> Fusable:
    """How the beginning of a network tries to fuse."""
    return Fusable(recipe, backend, lambda owner, x: call_in_order(owner, recipe.main, x))


def call_in_order(owner: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Call the owner's modules of these names one after the other."""
    for name in names:
        x = getattr(owner, name)(x)
    return x
