# SPDX-License-Identifier: Apache-2.0
"""A projection block that ends in a join: the same answers, guards and freshness.

On a CPU no backend joins in one kernel. Here the two calls of the "cpu" backend stand in for one,
so that blocks take the way they take on a GPU, and once Triton's interpreter runs the real kernel.
"""

from __future__ import annotations

import copy
import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch
import torchvision.models.resnet as reference
from torch import nn

import resnet_fast
from resnet_fast import ops
from resnet_fast.dispatch import table
from resnet_fast.nn import run
from tests.nn import test_guards as guards
from tests.nn import test_staleness as staleness
from tests.support import interpreted

JOIN = ops.CONV_BN_JOIN.name


@pytest.fixture
def kind():
    """One of the two: both run their blocks by the same function."""
    return "optimized"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The "cpu" backend counts as one kernel, for plans that are made from now on."""
    join = table.row_of(JOIN, "cpu")
    rows = (replace(row, fuses=True) if row is join else row for row in table.ROWS)
    monkeypatch.setattr(table, "ROWS", tuple(rows))
    monkeypatch.setattr(ops.CONV_BN_JOIN, "_plans", {})
    with torch.no_grad():
        yield


def merged(model: nn.Module) -> dict[str, str]:
    """The op that ends each block, by the block's name, where it has merged some."""
    return {row.name: row.merged for row in resnet_fast.report(model) if row.merged}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_projection_blocks_join(block, dtype, pair, image, assert_agrees, needs_cpu_backend):
    needs_cpu_backend(dtype)
    fused, plain = (m.to(dtype) for m in pair(block, (2, 2)))
    expected = {"layer2.0": JOIN}
    if block == "Bottleneck":
        expected["layer1.0"] = JOIN
    for size in ((40, 40), (33, 47), (40, 40)):
        x = image(2, 3, *size).to(dtype)
        y = assert_agrees(fused, plain, x)
        assert torch.equal(fused(x), y), "what was kept gives another answer"
        assert merged(fused) == expected
    text = str(resnet_fast.report(fused))
    assert text.count(f"cpu ({JOIN})") == len(expected)


def test_without_a_kernel_a_block_runs_as_two_ops(pair, image, monkeypatch):
    monkeypatch.undo()
    fused, _ = pair()
    fused(image(2, 3, 40, 40))
    assert merged(fused) == {}
    (plan,) = run.plans_of(fused)
    assert {step.kind for step in plan.steps} == {"conv", "pool"}


def test_a_join_is_kept_as_one_step(pair, image):
    fused, _ = pair()
    fused(image(2, 3, 40, 40))
    (plan,) = run.plans_of(fused)
    blocks = [[step.kind for step in piece.steps] for piece in plan.pieces]
    assert blocks == [["conv", "pool"], *[["conv", "conv"]] * 2, ["conv", "join"]]
    join = plan.pieces[-1].runs[-1].plan
    assert join.is_one_kernel
    calls = join.calls
    fused(image(2, 3, 40, 40))
    assert join.calls == calls + 1


CHANGES = [
    change
    for change in guards.CHANGES
    if change[1] == "layer2.0" or change[0].__name__ in ("norm_eps", "downsample_added", "dilated")
]


def test_the_changes_reach_the_projection():
    names = {change[0].__name__ for change in CHANGES}
    assert {"hook_on_downsample", "norm_in_training_in_downsample", "strides_moved"} <= names


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("change", "where", "reason"), [pytest.param(*c, id=c[0].__name__) for c in CHANGES]
)
def test_a_change_has_its_effect(change, where, reason, warm, pair, image, assert_agrees, row):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    before = plain(x)
    if warm:
        fused(x), fused(x)
        assert merged(fused) == {"layer2.0": JOIN}
    for model in (fused, plain):
        change(model)
    for _ in range(2):
        y = assert_agrees(fused, plain, x)
    assert y.shape != before.shape or (y - before).abs().max() > 1e-3 * before.abs().max()
    found = row(fused, where)
    assert found.fused == (reason is guards.FUSED or isinstance(reason, guards.in_parts)), found
    if reason is not guards.FUSED:
        assert re.search(reason, found.reason), found.reason
        assert not found.merged


def write_projection_weight(m):
    m.layer2[0].downsample[0].weight[5, 6, 0, 0] += 5.0


def write_projection_statistics_by_data(m):
    m.layer2[0].downsample[1].running_mean.data[3] += 9.0


def replace_last_norm_weight(m):
    bn = m.layer2[0].bn2
    bn.weight = nn.Parameter(bn.weight * -1.0)


def change_projection_eps(m):
    m.layer2[0].downsample[1].eps = 0.5


WRITES = [
    write_projection_weight,
    write_projection_statistics_by_data,
    replace_last_norm_weight,
    change_projection_eps,
    staleness.train_a_step,
    staleness.load,
    staleness.load_by_assignment,
    staleness.average_by_data,
    staleness.average_by_new_data,
    staleness.write_statistics_by_data,
    staleness.change_eps,
    staleness.change_layout_and_dtype_and_back,
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_noticed(write, pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    before = [fused(x) for _ in range(2)][-1]
    for model in (fused, plain):
        write(model)
    y = assert_agrees(fused, plain, x)
    assert (y - before).abs().max() > 1e-4 * before.abs().max()
    assert merged(fused) == {"layer2.0": JOIN}


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1.0])
@pytest.mark.parametrize("norm", ["bn2", "downsample.1"])
def test_scales(norm, scale, pair, image, assert_agrees):
    fused, plain = pair()
    for model in (fused, plain):
        model.layer2[0].get_submodule(norm).weight.fill_(scale)
    assert_agrees(fused, plain, image(2, 3, 40, 40))


def mismatched(m):
    m.layer2[0].conv1.stride = (1, 1)  # and the projection's stride is still two


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_maps_that_do_not_fit_are_an_error(warm, pair, image):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    if warm:
        fused(x)
    for model in (fused, plain):
        mismatched(model)
        with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
            model(x)


@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_a_backend_that_is_asked_for_is_taken(backend, pair, image):
    _, plain = pair()
    fused = resnet_fast.optimize(plain, backend=backend)
    fused(image(2, 3, 40, 40))
    assert merged(fused) == ({"layer2.0": JOIN} if backend == "cpu" else {})
    assert {row.backend for row in resnet_fast.report(fused)} == {backend}


def called_ops(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The package's ops that a profiler sees in one call."""
    with torch.profiler.profile() as profile:
        model(x)
    return [event.name for event in profile.events() if event.name.startswith("resnet_fast::")]


def test_a_backend_without_a_join_runs_two_ops(pair, image, monkeypatch):
    """By either way; cuDNN, which is asked for here, has convolutions alone."""
    fused, _ = pair()
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cudnn")
    x = image(2, 3, 56, 40)
    assert f"resnet_fast::{JOIN}" not in called_ops(fused, x)
    fused(x)
    assert merged(fused) == {}


def test_autocast_and_profilers_see_the_op(pair, image):
    fused, plain = pair()
    x = image(2, 3, 48, 48)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = fused(x), plain(x)
    assert resnet_fast.agreement.compare(mine, theirs, exact).agrees
    assert called_ops(fused, x).count(f"resnet_fast::{JOIN}") == 1


def test_a_model_that_has_run_can_be_freed(pair, image):
    fused, plain = pair()
    del plain
    fused(image(1, 3, 32, 32))
    block = fused.layer2[0]
    watched = [weakref.ref(m) for m in (fused, block, block.downsample[0].weight)]
    del fused, block
    for _ in range(3):
        gc.collect()
    assert [w() for w in watched] == [None, None, None]


# ---- Triton's kernel, interpreted


def run_interpreted(kind: str) -> list[str]:
    """A projection block against torchvision's, before and after a write; faults as lines."""
    from tests.support.tolerance import assert_within

    torch.manual_seed(0)
    block = getattr(reference, kind)
    k = 32 * block.expansion
    conv = nn.Conv2d(48, k, 1, stride=2, bias=False)
    plain = block(48, 32, stride=2, downsample=nn.Sequential(conv, nn.BatchNorm2d(k))).eval()
    fused = resnet_fast.optimize(plain)
    x = torch.randn(2, 48, 7, 5).contiguous(memory_format=torch.channels_last)
    faults = []
    with torch.no_grad():
        for model in (fused, plain):
            model.to(memory_format=torch.channels_last)
        for write in (lambda m: None, lambda m: m.downsample[1].running_mean.data.add_(3.0)):
            for model in (fused, plain):
                write(model)
            for _ in range(2):
                exact = copy.deepcopy(plain).double()(x.double())
                assert_within(fused(x), plain(x), exact, 500, kind)
    (row,) = resnet_fast.report(fused)
    if (row.backend, row.merged) != ("triton", JOIN):
        faults.append(f"{kind} ran as {row}")
    return faults


def test_blocks_join_by_triton():
    pytest.importorskip("triton")
    with interpreted.pool(1) as pool:
        for kind in ("BasicBlock", "Bottleneck"):
            assert pool.submit(run_interpreted, kind).result() == []
