# SPDX-License-Identifier: Apache-2.0
"""Residual blocks, stages and stems that fuse in their own forward.

    BasicBlock   relu(cb2(relu(cb1(x))) + s(x))                 cb = conv + BatchNorm
    Bottleneck   relu(cb3(relu(cb2(relu(cb1(x))))) + s(x))      s = identity, or the projection cb

A block runs as one op per convolution; its last op adds the shortcut, or makes a projection itself
where one kernel can (`ops.conv_bn_join`: then the shortcut is no tensor). A block is fused as a
whole or not at all, by its `Recipe`: the names of its parts, as its class has them. ReLUs are fused
per call site, never replaced: a torchvision block uses one ReLU module two or three times.

Two ways lead to the kernels: through torch's dispatcher where something there listens (compilation,
export, autocast, profilers, modes), and past it, by programs that are kept (`program.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import fusion
from resnet_fast.nn.fusion import Record, Unit
from resnet_fast.nn.program import (
    Bound,
    JoinStep,
    Program,
    Step,
    follow,
    key_of,
    may_keep,
    recall,
    remember,
)
from resnet_fast.nn.stem import PooledProgram, PooledStep, stem_call
from resnet_fast.spec import conv_output_size


@dataclass(frozen=True, slots=True)
class Recipe:
    """The names of a residual block's parts.

    Args:
        units: (convolution, norm) in the order they run; the last is followed by the addition.
        activations: the ReLU modules, shared or one for each place.
        absent: modules that must be missing, None or the identity for the formula above to hold.
    """

    units: tuple[tuple[str, str], ...]
    activations: tuple[str, ...] = ("relu",)
    absent: tuple[str, ...] = ()


BASIC_BLOCK = Recipe((("conv1", "bn1"), ("conv2", "bn2")))
BOTTLENECK = Recipe((("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")))


class Fusable(NamedTuple):
    """How calling a block tries to fuse."""

    recipe: Recipe
    backend: str
    plain: Callable[[nn.Module, Tensor], Tensor]  # the class's: (block, x) -> y


class Parts(NamedTuple):
    """A block's units, found fit to run fused, each with its norm module, and its projection."""

    units: list[tuple[Unit, nn.Module]]
    projection: tuple[Unit, nn.Module] | None
    joins: bool  # whether the last unit adds the shortcut


_records: weakref.WeakKeyDictionary[nn.Module, Record] = weakref.WeakKeyDictionary()


def record_of(module: nn.Module) -> Record:
    """How a block, or a model's stem, has run so far; a new record if it has not."""
    record = _records.get(module)
    return _records.setdefault(module, Record()) if record is None else record


def forget_programs(model: nn.Module) -> None:
    """Drop what is kept between calls for the model's blocks and stems."""
    for module in model.modules():
        if module in _records:
            _records[module].programs.clear()


def fusable(block: nn.Module) -> Fusable | None:
    """How calling `block` would try to fuse, or None if it would not.

    True of a class that has a `recipe` beside its forward; not of a subclass that overrides the
    forward, nor of an instance that has one of its own.
    """
    kind = type(block)
    recipe = getattr(kind, "recipe", None)
    if recipe is None or "forward" in block.__dict__:
        return None
    if "recipe" not in _owner(kind, "forward").__dict__:
        return None
    return Fusable(recipe, getattr(kind, "backend", "auto"), kind._forward_plain)


def _owner(kind: type, attribute: str) -> type:
    return next(k for k in kind.__mro__ if attribute in k.__dict__)


def fuses_stem(model: nn.Module) -> bool:
    """Whether calling `model` runs `resnet_forward`."""
    return "forward" not in model.__dict__ and getattr(type(model), "fuses_stem", False)


# ---- forwards


def block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A block's forward: fused where nothing speaks against it, else its plain forward.

    Args:
        block: one whose class has a `recipe` and a `_forward_plain`, or that `optimize` changed.
        x: [N, C, H, W]; converted to channels_last here if it is not.
    """
    kept = _run_kept([block], x)
    if kept:
        return kept[1]
    found = fusable(block)
    if found is None:
        # A subclass overrides forward and came here through super(). Nothing is kept: a stage
        # would take it for all that calling the block does.
        found = Fusable(type(block).recipe, "auto", type(block)._forward_plain)
        return _run(block, found, x, owned=False, keep=False)[0]
    return _run(block, found, x, owned=False)[0]


def stage_forward(stage: nn.Sequential, x: Tensor) -> Tensor:
    """A stage's blocks, each writing over its predecessor's output.

    That is invisible: the tensor was made here, by a block that was run without calling a hook.
    Whatever is not a fusable block, or has hooks, is called as always.
    """
    return _run_chain(list(stage._modules.values()), x)


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
    x, magnitude, owned = _stem_and_pool(model, x, backend)
    chain: list[nn.Module] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        chain += stage._modules.values() if _is_chain(stage) else [stage]
    x = _run_chain(chain, x, magnitude, owned)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def _is_chain(stage: nn.Module) -> bool:
    """Whether calling `stage` runs its children one after the other and nothing else."""
    kind = type(stage)
    if not (kind is nn.Sequential or getattr(kind, "runs_chain", False)):
        return False
    return "forward" not in stage.__dict__ and not fusion.has_hooks(stage)


def _stem_and_pool(model: nn.Module, x: Tensor, backend: str) -> tuple[Tensor, float | None, bool]:
    """conv1, bn1, relu and maxpool: the result, how large it can be, whether it is ours alone."""
    if isinstance(x, Tensor) and _pools(x):
        pooled = stem_pool_forward(model, x, backend)
        if pooled is not None:
            return pooled, None, True
    x, magnitude = stem_forward(model, x, backend)
    if magnitude is not None and _is_plain_pool(model.maxpool):
        return ops.max_pool_3x3_2(x), magnitude, True
    return model.maxpool(x), None, False


def _pools(x: Tensor) -> bool:
    """Whether x's device has kernels that pool; a compiler may not ask for the interpreter's."""
    return x.is_cuda or (not torch.compiler.is_compiling() and ops.has_stem_kernels(x.device.type))


def stem_pool_forward(model: nn.Module, x: Tensor, backend: str = "auto") -> Tensor | None:
    """conv1, bn1, relu and maxpool of a ResNet as one op, or None if something speaks against it.

    x goes in as it is where the backend reads any layout; else it is converted here, once.
    """
    keeps = fusion.context_refusal(x) is None and may_keep(x)
    key = keeps and ("pooled", x.stride(), key_of(x))
    if keeps:
        kept = recall(_records.get(model), key, model)
        if kept is not None:
            program, launches = kept
            given = fusion.to_channels_last(x) if program.converts else x
            return program.run(launches, given, False)
    if backend not in ops.STEM_BACKENDS or not _is_plain_pool(model.maxpool):
        return None
    parts = stem_of(model, x)
    if isinstance(parts, str) or not _is_resnet_stem(parts.units[0][0]):
        return None
    ((unit, norm),) = parts.units
    if fusion.listened_to(x):
        _note(model, None)
        return ops.stem_pool_op(*stem_call(unit, fusion.to_channels_last(x), backend))
    step = PooledStep(unit, norm, "relu", backend, record_of(model))
    converts = not step.reads(x)
    given = fusion.to_channels_last(x) if converts else x
    bypassed = [model._modules[name] for name in ("conv1", "bn1", "relu", "maxpool")]
    program = PooledProgram(model, step, bypassed, converts)
    y = program.run([step.bind()], given, False)
    if keeps:
        remember(record_of(model), key, program)
    _note(model, None)
    return y


def _is_resnet_stem(unit: Unit) -> bool:
    """Whether it is the 7x7/2 convolution of three channels that `stem_pool` is made for."""
    conv = unit.conv
    shape = (*unit.weight.shape[1:], conv.stride, conv.padding, conv.dilation, conv.groups)
    return shape == (3, 7, 7, (2, 2), (3, 3), (1, 1), 1)


def stem_forward(model: nn.Module, x: Tensor, backend: str = "auto") -> tuple[Tensor, float | None]:
    """conv1, bn1 and relu of a ResNet as one op where nothing speaks against it.

    Returns:
        The result, and how large it can be if that is known.
    """
    if fusion.context_refusal(x) is None and may_keep(x):
        given = fusion.to_channels_last(x)
        kept = recall(_records.get(model), key_of(given), model)
        if kept is not None:
            program, launches = kept
            finite, magnitude = follow(program, launches, given, None)
            return program.run(launches, given, False, finite), magnitude
    parts = stem_of(model, x)
    if isinstance(parts, str):
        _note(model, parts)
        return model.relu(model.bn1(model.conv1(x))), None
    bypassed = [model._modules[name] for name in ("conv1", "bn1", "relu")]
    return _run_parts(model, parts, bypassed, x, False, backend), None


def _is_plain_pool(pool: nn.Module) -> bool:
    """Whether the module is the max-pool of ResNet's stem and nothing watches it."""
    if type(pool) is not nn.MaxPool2d or fusion.call_refusal(pool) or pool.return_indices:
        return False
    shape = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return shape == (3, 2, 1, 1, False)


# ---- guards


def parts_of(block: nn.Module, recipe: Recipe, x: Tensor) -> Parts | str:
    """The block's parts, or why it may not run fused on a tensor like `x`."""
    reason = fusion.context_refusal(x)
    if reason is not None:
        return reason
    modules = block._modules
    for name in recipe.absent:
        module = getattr(block, name, None)  # not always a module, as `downsample` below
        if module is not None and not _is_identity(module):
            return f"{name} is a {type(module).__name__}"
    for name in recipe.activations:
        reason = fusion.activation_refusal(modules.get(name))
        if reason is not None:
            return f"{name}: {reason}"
    units: list[tuple[Unit, nn.Module]] = []
    for conv, norm in recipe.units:
        unit = fusion.unit_of(modules.get(conv), modules.get(norm), x)
        if isinstance(unit, str):
            return f"{conv}: {unit}"
        units.append((unit, modules[norm]))
    if units[0][0].channels != x.shape[1]:  # torch's own error is the one that is expected
        return f"x has {x.shape[1]} channels, conv1 takes {units[0][0].channels}"
    projection = _projection(getattr(block, "downsample", None), x)
    if isinstance(projection, str):
        return projection
    parts = Parts(units, projection, joins=True)
    return _misfit(parts, x) or parts


def _misfit(parts: Parts, x: Tensor) -> str | None:
    """Why the block's maps do not fit each other, which torch's own error will say; else None."""
    shape = x.shape
    for unit, _ in parts.units:
        if unit.channels != shape[1]:
            return f"a convolution takes {unit.channels} channels, it is given {shape[1]}"
        shape = _shape_after(unit, shape)
    shortcut = x.shape
    if parts.projection is not None:
        shortcut = _shape_after(parts.projection[0], shortcut)
    if shape != shortcut:
        return f"the convolutions end in {list(shape)}, the shortcut in {list(shortcut)}"
    return None


def stem_of(model: nn.Module, x: Tensor) -> Parts | str:
    """The stem's unit, or why it may not run fused on a tensor like x."""
    modules = model._modules
    reason = fusion.context_refusal(x) or fusion.activation_refusal(modules.get("relu"))
    unit = reason or fusion.unit_of(modules.get("conv1"), modules.get("bn1"), x)
    if isinstance(unit, str):
        return unit
    if unit.channels != x.shape[1]:
        return f"x has {x.shape[1]} channels, conv1 takes {unit.channels}"
    return Parts([(unit, modules["bn1"])], None, joins=False)


def _is_identity(module: object) -> bool:
    """Whether it returns its input and nothing watches it: Identity, or a drop in evaluation."""
    kind = type(module)
    drops = kind.__name__ in ("DropPath", "DropBlock2d") and not module.training
    return (kind is nn.Identity or drops) and fusion.call_refusal(module) is None


def _projection(downsample: nn.Module | None, x: Tensor) -> tuple[Unit, nn.Module] | str | None:
    if downsample is None:
        return None
    if type(downsample) is not nn.Sequential or len(downsample) != 2:
        return f"downsample: {type(downsample).__name__} is not Sequential(conv, norm)"
    reason = fusion.call_refusal(downsample)
    if reason is not None:
        return f"downsample: {reason}"
    conv, norm = downsample._modules.values()
    unit = fusion.unit_of(conv, norm, x)
    return f"downsample: {unit}" if isinstance(unit, str) else (unit, norm)


# ---- running


def _run_chain(
    chain: list[nn.Module], x: Tensor, magnitude: float | None = None, owned: bool = False
) -> Tensor:
    done, x, owned = _run_kept(chain, x, magnitude, owned) or (0, x, owned)
    for block in chain[done:]:
        found = None if fusion.has_hooks(block) else fusable(block)
        x, owned = (block(x), False) if found is None else _run(block, found, x, owned)
    return x


def _run_kept(
    chain: list[nn.Module], x: Tensor, magnitude: float | None = None, owned: bool = False
) -> tuple[int, Tensor, bool] | None:
    """Run the first blocks by their kept programs: how many, the result, and whether it is ours.

    All facts are compared before the first launch; see `program.py`.
    """
    if not chain or fusion.context_refusal(x) is not None or not may_keep(x):
        return None
    y = fusion.to_channels_last(x)
    bound: list[Bound] = []
    key = key_of(y)
    for block in chain:
        kept = recall(_records.get(block), key, block)
        if kept is None:
            break
        bound.append(kept)
        key = kept[0].next_key
    owned = owned or y is not x
    for program, launches in bound:
        finite, magnitude = follow(program, launches, y, magnitude)
        y, owned = program.run(launches, y, owned, finite), True
    return (len(bound), y, owned) if bound else None


def _run(
    block: nn.Module, found: Fusable, x: Tensor, owned: bool, keep: bool = True
) -> tuple[Tensor, bool]:
    """Run one block, fused if the guards allow; the result, and whether we may overwrite it."""
    parts = parts_of(block, found.recipe, x)
    if isinstance(parts, str):
        _note(block, parts)
        return found.plain(block, x), False
    bypassed = list(block.modules())[1:]
    return _run_parts(block, parts, bypassed, x, owned, found.backend, keep), True


def _run_parts(
    owner: nn.Module,
    parts: Parts,
    bypassed: list[nn.Module],
    x: Tensor,
    owned: bool,
    backend: str,
    keep: bool = True,
) -> Tensor:
    y = fusion.to_channels_last(x)
    if fusion.listened_to(x):
        _note(owner, None)
        return _call_ops(parts, y, backend)
    record = record_of(owner)
    steps = [Step(unit, norm, "relu", backend, record) for unit, norm in parts.units]
    projection = parts.projection and Step(*parts.projection, "none", backend, record)
    join = _join_step(parts, steps, projection, y, backend)
    program = Program(owner, steps, projection, parts.joins, bypassed, join)
    key = key_of(y)
    y = program.run([step.bind() for step in program.sequence], y, owned or y is not x)
    if keep:  # only now that each step has its plan: another thread might meet it before
        remember(record, key, program)
    _note(owner, None)
    return y


def _join_step(
    parts: Parts, steps: list[Step], projection: Step | None, x: Tensor, backend: str
) -> JoinStep | None:
    """The block's end as one op, where one kernel would run it; else None."""
    if not _may_join(parts, x, backend):
        return None
    shape = x.shape
    for unit, _ in parts.units[:-1]:
        shape = _shape_after(unit, shape)
    h = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    call = fusion.join_call(parts.units[-1][0], parts.projection[0], h, x, backend)
    try:
        plan = ops.plan_of_join(call)
    except ValueError:  # maps that do not fit, or a backend that cannot: each unit's op says it
        return None
    if not plan.is_one_kernel:
        return None
    record = projection.record
    steps[-1].record = projection.record = None  # see `Step`
    return JoinStep(steps[-1], projection, plan, record)


def _shape_after(unit: Unit, shape: torch.Size) -> torch.Size:
    """The shape of what the unit's op returns for a tensor of this one; 0 where nothing is left."""
    conv, (n, _, *sizes) = unit.conv, shape
    each = zip(
        *(sizes, unit.weight.shape[2:], conv.stride, conv.padding, conv.dilation), strict=True
    )
    return torch.Size((n, unit.weight.shape[0], *(max(conv_output_size(*of), 0) for of in each)))


def _may_join(parts: Parts, x: Tensor, backend: str) -> bool:
    """Whether the block ends in what `ops.conv_bn_join` takes, where device and backend may."""
    if parts.projection is None or not ops.may_join_in_one_kernel(x.device.type, backend):
        return False
    return fusion.join_refusal(parts.units[-1][0], parts.projection[0]) is None


def _call_ops(parts: Parts, x: Tensor, backend: str) -> Tensor:
    """The block through torch's dispatcher, without writing over anything."""
    joins = _may_join(parts, x, backend)
    shortcut = x if parts.joins else None
    if parts.projection is not None and not joins:
        unit = parts.projection[0]
        shortcut = ops.conv_bn_act_op(*fusion.call_of(unit, x, None, "none", backend))
    y = x
    for unit, _ in parts.units[:-1]:
        y = ops.conv_bn_act_op(*fusion.call_of(unit, y, None, "relu", backend))
    unit = parts.units[-1][0]
    if joins:
        return ops.conv_bn_join_op(*fusion.join_call(unit, parts.projection[0], y, x, backend))
    return ops.conv_bn_act_op(*fusion.call_of(unit, y, shortcut, "relu", backend))


def _note(module: nn.Module, reason: str | None) -> None:
    """Count a call for `report`: plain for a reason, or fused."""
    if torch.compiler.is_compiling():
        return
    record = record_of(module)
    if reason is None:
        record.count_fused()
    else:
        record.plain += 1
        record.reason = reason
