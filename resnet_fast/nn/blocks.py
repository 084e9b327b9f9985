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

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import fusion
from resnet_fast.nn.fusion import Record, Unit
from resnet_fast.nn.mixed import MixedProgram, call_ops
from resnet_fast.nn.parts import (
    STEM,
    Fusable,
    Parts,
    fusable,
    is_sequence,
    parts_of,
    shape_after,
)
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
        return _run(block, found, x, owned=False, tag=None)[0]
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
        chain += stage._modules.values() if is_sequence(stage) else [stage]
    x = _run_chain(chain, x, magnitude, owned)
    return model.fc(torch.flatten(model.avgpool(x), 1))


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
    parts = parts_of(model, STEM, x)
    if isinstance(parts, str) or not parts.is_whole or len(parts.main) > 1:
        return None
    unit, norm, activation = parts.main[0]
    if activation != "relu" or not _is_resnet_stem(unit):
        return None
    if fusion.listened_to(x):
        _note(model, None)
        return ops.stem_pool_op(*stem_call(unit, fusion.to_channels_last(x), backend))
    step = PooledStep(unit, norm, "relu", backend, record_of(model))
    converts = not step.reads(x)
    given = fusion.to_channels_last(x) if converts else x
    bypassed = [*parts.bypassed, model.maxpool]
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
    return _first_of(model, x, Fusable(STEM, backend, _plain_stem))


def stem_of_forward(owner: nn.Module, x: Tensor, found: Fusable) -> Tensor:
    """What an owner's forward does first, or one of its methods; fused as a block is.

    Args:
        owner: a model.
        x: [N, C, H, W].
        found: the recipe of its stem, and what runs it plain.
    """
    return _first_of(owner, x, found)[0]


def _first_of(owner: nn.Module, x: Tensor, found: Fusable) -> tuple[Tensor, float | None]:
    # A key of its own: who calls the owner in a chain must not take its stem for all of it.
    if fusion.context_refusal(x) is None and may_keep(x):
        given = fusion.to_channels_last(x)
        kept = recall(_records.get(owner), ("stem", *key_of(given)), owner)
        if kept is not None:
            program, launches = kept
            finite, magnitude = follow(program, launches, given, None)
            return program.run(launches, given, False, finite), magnitude
    return _run(owner, found, x, False, ("stem",))[0], None


def _plain_stem(model: nn.Module, x: Tensor) -> Tensor:
    return model.relu(model.bn1(model.conv1(x)))


def _is_plain_pool(pool: nn.Module) -> bool:
    """Whether the module is the max-pool of ResNet's stem and nothing watches it."""
    if type(pool) is not nn.MaxPool2d or fusion.call_refusal(pool) or pool.return_indices:
        return False
    shape = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return shape == (3, 2, 1, 1, False)


# ---- running


def _run_chain(
    chain: list[nn.Module], x: Tensor, magnitude: float | None = None, owned: bool = False
) -> Tensor:
    while chain:
        kept = _run_kept(chain, x, magnitude, owned)
        if kept is not None:
            done, x, owned, magnitude = kept
        else:
            found = None if fusion.has_hooks(chain[0]) else fusable(chain[0])
            x, owned = (chain[0](x), False) if found is None else _run(chain[0], found, x, owned)
            done, magnitude = 1, None
        chain = chain[done:]
    return x


def _run_kept(
    chain: list[nn.Module], x: Tensor, magnitude: float | None = None, owned: bool = False
) -> tuple[int, Tensor, bool, float | None] | None:
    """Run the first blocks by their kept programs.

    All facts are compared before the first launch; see `program.py`.

    Returns:
        How many, the result, whether it is ours, and how large it can be if that is known.
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
        if kept[0].calls_modules:  # which may change the blocks behind
            break
    owned = owned or y is not x
    for program, launches in bound:
        finite, magnitude = follow(program, launches, y, magnitude)
        y, owned = program.run(launches, y, owned, finite), program.owns
    return (len(bound), y, owned, magnitude) if bound else None


def _run(
    block: nn.Module, found: Fusable, x: Tensor, owned: bool, tag: tuple[str, ...] | None = ()
) -> tuple[Tensor, bool]:
    """Run one block, fused if the guards allow; the result, and whether we may overwrite it.

    Args:
        tag: before the key under which the program is kept; None to keep none.
    """
    parts = parts_of(block, found.recipe, x)
    if isinstance(parts, str):
        _note(block, parts)
        return found.plain(block, x), False
    y = fusion.to_channels_last(x)
    if fusion.listened_to(x):
        _note(block, None, parts.left)
        return _call_ops(parts, y, found.backend), True
    program = _program(block, parts, y, found.backend)
    key = key_of(y)
    y = program.run([step.bind() for step in program.sequence], y, owned or y is not x)
    if tag is not None:  # only now that each step has its plan: another thread might meet it before
        remember(record_of(block), (*tag, *key), program)
    _note(block, None, parts.left)
    return y, program.owns


def _program(owner: nn.Module, parts: Parts, x: Tensor, backend: str) -> Program:
    record = record_of(owner)
    if not parts.is_whole:
        record.merged = ""
        return MixedProgram(owner, parts, backend, record)
    steps, projections = (
        [Step(part.unit, part.norm, part.activation, backend, record) for part in those]
        for those in (parts.main, parts.shortcut)
    )
    projection = projections[0] if projections else None
    join = _join_step(parts, steps, projection, x, backend)
    return Program(owner, steps, projection, parts.joins, parts.bypassed, join)


def _join_step(
    parts: Parts, steps: list[Step], projection: Step | None, x: Tensor, backend: str
) -> JoinStep | None:
    """The block's end as one op, where one kernel would run it; else None."""
    if not _may_join(parts, x, backend):
        return None
    shape = x.shape
    for part in parts.main[:-1]:
        shape = shape_after(part.unit, shape)
    h = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    main, other = parts.main[-1].unit, parts.shortcut[0].unit
    try:
        plan = ops.plan_of_join(fusion.join_call(main, other, h, x, backend))
    except ValueError:  # maps that do not fit, or a backend that cannot: each unit's op says it
        return None
    if not plan.is_one_kernel:
        return None
    record = projection.record
    steps[-1].record = projection.record = None  # see `Step`
    return JoinStep(steps[-1], projection, plan, record)


def _may_join(parts: Parts, x: Tensor, backend: str) -> bool:
    """Whether the block ends in what `ops.conv_bn_join` takes, where device and backend may."""
    if not parts.shortcut or not ops.may_join_in_one_kernel(x.device.type, backend):
        return False
    main, projection = parts.main[-1], parts.shortcut[0]
    plain = main.activation == "relu" and projection.activation == "none"
    return plain and fusion.join_refusal(main.unit, projection.unit) is None


def _call_ops(parts: Parts, x: Tensor, backend: str) -> Tensor:
    """The block through torch's dispatcher, without writing over anything."""
    if not parts.is_whole or not _may_join(parts, x, backend):
        return call_ops(parts, x, backend)
    h = x
    for part in parts.main[:-1]:
        h = ops.conv_bn_act_op(*fusion.call_of(part.unit, h, None, part.activation, backend))
    main, projection = parts.main[-1].unit, parts.shortcut[0].unit
    return ops.conv_bn_join_op(*fusion.join_call(main, projection, h, x, backend))


def _note(module: nn.Module, reason: str | None, left: str = "") -> None:
    """Count a call for `report`: plain for a reason, or fused but for what is left."""
    if torch.compiler.is_compiling():
        return
    record = record_of(module)
    record.left = left
    if reason is None:
        record.count_fused()
    else:
        record.plain += 1
        record.reason = reason
