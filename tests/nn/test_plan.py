# SPDX-License-Identifier: Apache-2.0
"""A plan: one guard a forward, no value kept longer than it is read, room for a new block."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.nn import plan as planning
from resnet_fast.nn import run, units
from resnet_fast.nn.guard import Guard
from resnet_fast.nn.plan import Step, fold

BLOCKS = [("BasicBlock", (2, 2)), ("Bottleneck", (2, 2))]


@pytest.fixture
def plan_for(pair, image):
    """plan_for(block, layers) -> a fused model that has run, and its only plan."""

    def make(block: str, layers: tuple[int, ...]):
        fused, _ = pair(block, layers)
        with torch.inference_mode():
            fused(image(2, 3, 40, 40))
        (plan,) = run.plans_of(fused)
        return fused, plan

    return make


@pytest.mark.parametrize(("block", "layers"), BLOCKS)
def test_a_network_is_one_plan_with_one_guard(block, layers, plan_for, image, monkeypatch):
    fused, plan = plan_for(block, layers)
    assert len(plan.pieces) == 1 + sum(layers) and plan.next == len(plan.pieces)
    asked = []
    holds = Guard.holds
    monkeypatch.setattr(
        Guard, "holds", lambda guard, root: asked.append(root) or holds(guard, root)
    )
    with torch.inference_mode():
        fused(image(2, 3, 40, 40))
    assert asked == [fused]


class Value:
    """Stands for a tensor."""


@pytest.mark.parametrize(("block", "layers"), BLOCKS)
def test_no_value_outlives_its_last_reader(block, layers, plan_for):
    """At each step all that is there is read by it or by a later one."""
    _, plan = plan_for(block, layers)
    alive: weakref.WeakSet[Value] = weakref.WeakSet()
    for piece in plan.pieces:
        needed = [needs(piece.steps[i:]) for i in range(len(piece.steps))]

        def follow(step: Step, x: Value, other: Value | None, needed=needed) -> Value:
            assert len(alive) == len(needed.pop(0)), step
            made = Value()
            alive.add(made)
            return made

        slots = [Value(), None, None]
        alive.add(slots[0])
        fold(piece.steps, slots, follow)
        assert slots[1:] == [None, None] and len(alive) == 1
        del slots


def needs(steps: tuple[Step, ...]) -> set[int]:
    """The slots whose values these steps read before they write to them."""
    read: set[int] = set()
    written: set[int] = set()
    for step in steps:
        read |= set(step.reads) - written
        written.add(step.writes)
    return read


@pytest.mark.parametrize(("block", "layers"), BLOCKS)
def test_a_residual_of_ones_own_is_written_over(block, layers, plan_for):
    _, plan = plan_for(block, layers)
    adding = [step for step in plan.steps if len(step.reads) == 2]
    assert len(adding) == sum(layers) and all(step.over for step in adding)


def test_the_input_of_a_block_is_not_written_over(pair, image):
    fused, _ = pair()
    x = image(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.inference_mode():
        for _ in range(3):
            fused.layer1[0](x)
    assert torch.equal(x, before)
    (plan,) = run.plans_of(fused.layer1[0])
    assert [step.over for step in plan.steps] == [False, False]


@torch.inference_mode()
def test_a_new_fused_block_is_one_kind_and_one_choice(pair, image, assert_agrees, monkeypatch):
    """The whole of an identity block as one op: nothing else has to know of it."""

    class Whole:
        name = "whole_block"

        def plan_of(self, call):
            first, second, _ = call

            def launch(x, _other, _over, _finite):
                units = (unit.conv for unit in (first, second))
                a, b = (nn.functional.conv2d(x, conv.weight, None, 1, 1) for conv in units)
                return x.relu() + 0 * (a + b)

            launch.fresh, launch.growth = lambda weight: True, None
            return SimpleNamespace(
                backend="toy", bind=lambda *_: launch, calls=0, is_one_kernel=True,
                why_fallback=lambda: "",
            )  # fmt: skip

    def whole(piece, parts, x, owned, backend):
        if not parts.is_whole or parts.shortcut or len(parts.main) != 2:
            return None
        both = tuple(part.unit for part in parts.main)
        return [Step("block", (0,), 0, units=both, activation="relu", backend=backend)]

    kind = units.Kind(Whole(), lambda units, activation, backend, x, other: (*units, x))
    monkeypatch.setitem(units.KINDS, "block", kind)
    monkeypatch.setattr(planning, "BLOCKS", (whole, *planning.BLOCKS))
    fused, _ = pair("BasicBlock", (2, 1))
    for _ in range(2):
        fused(image(1, 3, 32, 32))
    (plan,) = run.plans_of(fused)
    assert [step.kind for step in plan.steps] == ["conv", "pool", "block", "block", *["conv"] * 3]
    rows = {row.name: (row.backend, row.merged) for row in resnet_fast.report(fused)}
    assert rows["layer1.0"] == ("toy", "whole_block")
