# SPDX-License-Identifier: Apache-2.0
"""Residual blocks, stages and stems that fuse in their own forward.

    BasicBlock   relu(cb2(relu(cb1(x))) + s(x))                 cb = conv + BatchNorm
    Bottleneck   relu(cb3(relu(cb2(relu(cb1(x))))) + s(x))      s = identity, or the projection cb

A block runs as one op per convolution; its last op adds the shortcut. A block is fused as a whole
or not at all, by its `Recipe`: the names of its parts, as its class has them. ReLUs are fused per
call site, never replaced: a torchvision block uses one ReLU module two or three times.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.nn import fusion
from resnet_fast.nn.fusion import Record, Unit


@dataclass(frozen=True, slots=True)
class Recipe:
    """The names of a residual block's parts.

    Args:
        units: (convolution, norm) in the order they run; the last is followed by the addition.
        activations: the ReLU modules, shared or one for each place.
        absent: modules that must be missing, None or nn.Identity for the formula above to hold.
    """

    units: tuple[tuple[str, str], ...]
    activations: tuple[str, ...] = ("relu",)
    absent: tuple[str, ...] = ()


BASIC_BLOCK = Recipe((("conv1", "bn1"), ("conv2", "bn2")))
BOTTLENECK = Recipe((("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")))


_records: weakref.WeakKeyDictionary[nn.Module, Record] = weakref.WeakKeyDictionary()


def record_of(module: nn.Module) -> Record:
    """The record of a block or of a model's stem; a new one if it has not run."""
    record = _records.get(module)
    if record is None:
        record = _records[module] = Record()
    return record


def _note(module: nn.Module, outcome: Tensor | str) -> None:
    if torch.compiler.is_compiling():
        return
    record = record_of(module)
    if isinstance(outcome, str):
        record.plain += 1
        record.reason = outcome
    else:
        record.fused += 1
        record.reason = None


def block_forward(
    block: nn.Module, recipe: Recipe, plain: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """A block's forward: fused where nothing speaks against it, else `plain(x)`.

    Args:
        block: the module that has the parts that `recipe` names.
        recipe: the names.
        plain: the block's own forward, unfused.
        x: [N, C, H, W]; converted to channels_last here if it is not.
    """
    outcome = try_block(block, recipe, x)
    return plain(x) if isinstance(outcome, str) else outcome


def try_block(
    block: nn.Module, recipe: Recipe, x: Tensor, owned: bool = False, backend: str = "auto"
) -> Tensor | str:
    """The fused block's result, or why it must run plain.

    Args:
        owned: nobody but the caller holds x, so that it may be overwritten.
    """
    parts = parts_of(block, recipe, x)
    outcome = parts if isinstance(parts, str) else _run_block(block, parts, x, owned, backend)
    _note(block, outcome)
    return outcome


class Parts(NamedTuple):
    """A block's units, ready to run, and its projection if it has one."""

    units: list[Unit]
    projection: Unit | None


def parts_of(block: nn.Module, recipe: Recipe, x: Tensor) -> Parts | str:
    """The block's parts, or why it may not run fused on a tensor like `x`."""
    reason = fusion.context_refusal(x)
    if reason is not None:
        return reason
    modules = block._modules
    for name in recipe.absent:
        module = modules.get(name)
        if module is not None and not _is_identity(module):
            return f"{name} is a {type(module).__name__}"
    for name in recipe.activations:
        reason = fusion.activation_refusal(modules.get(name))
        if reason is not None:
            return f"{name}: {reason}"
    units = []
    for conv, norm in recipe.units:
        unit = fusion.unit_of(modules.get(conv), modules.get(norm), x)
        if isinstance(unit, str):
            return f"{conv}: {unit}"
        units.append(unit)
    downsample = modules.get("downsample")
    projection = None if downsample is None else _projection(downsample, x)
    return f"downsample: {projection}" if isinstance(projection, str) else Parts(units, projection)


def _is_identity(module: nn.Module) -> bool:
    """Whether the module returns its input and nothing watches it: Identity, or a drop in eval."""
    kind = type(module)
    drops = kind.__name__ in ("DropPath", "DropBlock2d") and not module.training
    return (kind is nn.Identity or drops) and not fusion.has_hooks(module)


def _projection(downsample: nn.Module, x: Tensor) -> Unit | str:
    if type(downsample) is not nn.Sequential or len(downsample) != 2:
        return f"it is not Sequential(conv, norm) but {type(downsample).__name__}"
    if fusion.has_hooks(downsample):
        return "a hook is registered on it"
    return fusion.unit_of(*downsample._modules.values(), x)


def _run_block(block: nn.Module, parts: Parts, x: Tensor, owned: bool, backend: str) -> Tensor:
    record = None if torch.compiler.is_compiling() else record_of(block)
    way = fusion.way_of(x, backend, record)
    y = fusion.to_channels_last(x)
    shortcut, owned = y, owned or y is not x
    if parts.projection is not None:
        shortcut, owned = fusion.run_unit(parts.projection, y, "none", way), True
    for unit in parts.units[:-1]:
        y = fusion.run_unit(unit, y, "relu", way, inner=True)
    return fusion.run_unit(parts.units[-1], y, "relu", way, residual=shortcut, overwrite=owned)


class Fusable(NamedTuple):
    """How calling a block tries to fuse."""

    recipe: Recipe
    backend: str
    plain: Callable[[Tensor], Tensor]


def fusable(block: nn.Module) -> Fusable | None:
    """How calling `block` would try to fuse, or None if it would not.

    True of a class that has a `recipe` beside its forward, and of an instance whose forward was
    replaced by `optimize`; not of a subclass that overrides the forward.
    """
    forward = block.__dict__.get("forward")
    if forward is not None:
        recipe = getattr(forward, "recipe", None)
        return recipe and Fusable(recipe, forward.backend, forward.__wrapped__)
    kind = type(block)
    recipe = getattr(kind, "recipe", None)
    if recipe is None or "recipe" not in _owner(kind, "forward").__dict__:
        return None
    return Fusable(recipe, "auto", block._forward_plain)


def _owner(kind: type, attribute: str) -> type:
    return next(k for k in kind.__mro__ if attribute in k.__dict__)


def is_symbolic(x) -> bool:
    """Whether x stands for a tensor in a torch.fx trace, which must see the plain modules."""
    return not isinstance(x, Tensor)


def run_stage(stage: nn.Sequential, x: Tensor) -> Tensor:
    """A stage's blocks, each writing over its predecessor's output.

    That is invisible: the tensor was made here, by a block that was run without calling a hook.
    Whatever is not a fusing block, or has hooks, is called as always.
    """
    owned = False
    for block in stage._modules.values():
        found = None if fusion.has_hooks(block) else fusable(block)
        if found is None:
            x, owned = block(x), False
            continue
        outcome = try_block(block, found.recipe, x, owned, found.backend)
        owned = not isinstance(outcome, str)
        x = outcome if owned else found.plain(x)
    return x


def resnet_forward(model: nn.Module, x: Tensor, backend: str = "auto") -> Tensor:
    """The forward of a ResNet with torchvision's children: stem, pool, four stages, head.

    Args:
        model: has conv1, bn1, relu, maxpool, layer1 to layer4, avgpool and fc, in whatever form a
            user gave them; those that are not what they were are simply called.
        x: [N, 3, H, W].
        backend: for the stem; the blocks have their own.

    Returns:
        [N, num_classes].
    """
    x = model.maxpool(stem_forward(model, x, backend))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        plain = type(stage) is not nn.Sequential or fusion.has_hooks(stage)
        x = stage(x) if plain else run_stage(stage, x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def stem_forward(model: nn.Module, x: Tensor, backend: str = "auto") -> Tensor:
    """conv1, bn1 and relu of a ResNet as one op where nothing speaks against it."""
    unit = stem_of(model, x)
    if isinstance(unit, str):
        _note(model, unit)
        return model.relu(model.bn1(model.conv1(x)))
    record = None if torch.compiler.is_compiling() else record_of(model)
    way = fusion.way_of(x, backend, record)
    y = fusion.run_unit(unit, fusion.to_channels_last(x), "relu", way)
    _note(model, y)
    return y


def stem_of(model: nn.Module, x: Tensor) -> Unit | str:
    """The stem's unit, or why it may not run fused on a tensor like x."""
    modules = model._modules
    reason = fusion.context_refusal(x) or fusion.activation_refusal(modules.get("relu"))
    return reason or fusion.unit_of(modules.get("conv1"), modules.get("bn1"), x)


def fuses_stem(model: nn.Module) -> bool:
    """Whether calling `model` runs `resnet_forward`."""
    forward = model.__dict__.get("forward")
    if forward is not None:
        return getattr(forward, "fuses_stem", False)
    return getattr(type(model), "fuses_stem", False)
