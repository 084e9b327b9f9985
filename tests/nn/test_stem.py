# SPDX-License-Identifier: Apache-2.0
"""Stem and pool of a ResNet as one op: where a device has kernels for it, here a stand-in's.

The stand-in is the row `cuda` of the stem's backends on the CPU: it takes any layout, as the CUDA
kernel does, and computes by torch's functions. Triton's kernels are interpreted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast import ops
from resnet_fast.dispatch import problem, table
from tests.support import interpreted

WITH_POOL = "cuda with maxpool"


class StandIn:
    """The stem's kernel on another device: what it was given, in order."""

    def __init__(self) -> None:
        self.layouts: list[str] = []
        self.refusal: str | None = None

    def row(self, row: table.Row) -> table.Row:
        return replace(row, device="cpu", missing=lambda arch: None, build=self.build,
                       refusal=lambda stem: self.refusal)  # fmt: skip

    def build(self, stem: problem.StemProblem, tile):
        def run(*tensors):
            *layer, x = tensors[:9]
            self.layouts.append(stem.conv.x)
            return ops.STEM_POOL.reference(ops.StemCall(x, *layer))

        return problem.binder(run)


@pytest.fixture
def stand_in(monkeypatch):
    kernel = StandIn()
    ours = table.row_of("stem_pool", "cuda")
    rows = (kernel.row(row) if row is ours else row for row in table.ROWS)
    monkeypatch.setattr(table, "ROWS", tuple(rows))
    monkeypatch.setattr(ops.STEM_POOL, "_plans", {})
    return kernel


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@torch.no_grad()
def test_the_model_agrees_and_hands_x_over_as_it_lies(
    layout, block, stand_in, pair, image, assert_agrees, row
):
    fused, plain = pair(block, (2, 1))
    x = image(2, 3, 32, 40).contiguous(memory_format=layout)
    before = x.clone()
    for _ in range(3):
        assert_agrees(fused, plain, x)
    name = "contiguous" if layout is torch.contiguous_format else "channels_last"
    assert stand_in.layouts == [name] * 3
    assert torch.equal(x, before)
    found = row(fused, "(stem)")
    assert (found.fused, found.backend, found.fused_calls) == (True, WITH_POOL, 3)


@torch.no_grad()
def test_x_is_converted_where_the_kernel_refuses(stand_in, pair, image, assert_agrees, row):
    stand_in.refusal = "it is out of order"
    fused, plain = pair()
    for _ in range(2):
        assert_agrees(fused, plain, image(2, 3, 40, 40))
    assert stand_in.layouts == []
    assert row(fused, "(stem)").backend == "cpu with maxpool"


def ceil_pool(model):
    model.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)


def wider_pool(model):
    model.maxpool.kernel_size = 2
    model.maxpool.padding = 0


def hooked_pool(model):
    model.maxpool.register_forward_hook(lambda *_: None)


def replaced_pool(model):
    model.maxpool.forward = nn.AvgPool2d(3, 2, 1).forward


def no_pool(model):
    model.maxpool = nn.Identity()


def three_by_three(model):
    torch.manual_seed(3)
    model.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)


def dilated(model):
    model.conv1.dilation, model.conv1.padding = (2, 2), (6, 6)


def hooked_norm(model):
    model.bn1.register_forward_hook(lambda *_: None)


CHANGES = (
    ceil_pool, wider_pool, hooked_pool, replaced_pool, no_pool,
    three_by_three, dilated, hooked_norm,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@torch.no_grad()
def test_what_is_not_the_plain_stem_runs_apart(change, warm, stand_in, pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    if warm:
        fused(x), fused(x)
        stand_in.layouts.clear()
    change(fused), change(plain)
    fused.to(memory_format=torch.channels_last)
    for _ in range(2):
        assert_agrees(fused, plain, x)
    assert stand_in.layouts == []


@torch.no_grad()
def test_new_weights_and_statistics_are_seen(stand_in, pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 40, 40)
    fused(x), fused(x)
    for model in (fused, plain):
        model.conv1.weight.data.mul_(0.5)
        model.bn1.running_mean.add_(0.25)
    assert_agrees(fused, plain, x)
    for model in (fused, plain):
        model.conv1.weight = nn.Parameter(model.conv1.weight * 3)
        model.bn1.eps = 0.1
    assert_agrees(fused, plain, x)
    assert len(stand_in.layouts) == 4


@torch.no_grad()
def test_a_model_compiles_with_the_stem_in_one_node(stand_in, pair, image):
    fused, _ = pair()
    x = image(2, 3, 40, 40)
    program = torch.export.export(fused, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    # An exported graph asks the device alone, and the CPU's keeps its two steps.
    assert "resnet_fast.stem_pool.default" not in targets
    assert targets.count("resnet_fast.conv_bn_act.default") > 4
    with torch.autograd.profiler.profile():  # something listens: the op, not a launch
        fused(x)
    assert stand_in.layouts == ["channels_last"]


@torch.no_grad()
def test_the_cpu_keeps_its_two_steps(pair, image, row):
    fused, _ = pair()
    fused(image(2, 3, 40, 40))
    assert row(fused, "(stem)").backend == "cpu"


@torch.no_grad()
def test_a_backend_without_a_stem_is_left_its_convolution(stand_in, pair, image, kind):
    if kind != "optimized":
        pytest.skip("only optimize() chooses a backend")
    _, plain = pair()
    model = resnet_fast.optimize(plain, backend="aten")
    model(image(2, 3, 40, 40))
    assert stand_in.layouts == []


def interpreted_model() -> tuple[bool, str, str]:
    """Runs where Triton's kernels are interpreted: whether the pooled stem agrees, and its row."""
    model = resnet_fast.models.resnet18().eval().to(memory_format=torch.channels_last)
    for stage in ("layer1", "layer2", "layer3", "layer4", "fc"):
        setattr(model, stage, nn.Identity())
    x = torch.randn(1, 3, 30, 21)
    with torch.no_grad():
        found = [model(x) for _ in range(2)]
        (row,) = resnet_fast.report(model)
        with resnet_fast.disabled():
            expected = model(x)
    same = all(torch.allclose(y, expected, atol=1e-5) for y in found)
    return same, row.backend, row.reason


def test_triton_pools_too():
    pytest.importorskip("triton")
    with interpreted.pool(1) as pool:
        assert pool.submit(interpreted_model).result() == (True, "triton with maxpool", "")


def test_on_a_gpu_a_traced_model_has_the_stem_in_one_node():
    """Fake tensors have a device that need not be there."""
    called = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model, x = resnet_fast.models.resnet18().eval(), torch.empty(2, 3, 64, 64)
        with Log():
            assert model(x).shape == (2, 1000)
    ours = [name for name in called if name.startswith("resnet_fast")]
    assert ours[0] == "resnet_fast.stem_pool.default"
    rest = {f"resnet_fast.{op.name}.default" for op in (ops.CONV_BN_ACT, ops.CONV_BN_JOIN)}
    assert set(ours[1:]) == rest
