# SPDX-License-Identifier: Apache-2.0
"""The plain path computes what torchvision computes, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torchvision.models.resnet as reference
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast.models.resnet as ours

pytestmark = pytest.mark.usefixtures("plain_path")


def image(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_bits(mine, theirs):
    assert mine.dtype == theirs.dtype
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("resnet18", (2, 3, 64, 64), id="r18"),
        pytest.param("resnet34", (1, 3, 33, 65), id="r34-odd"),
        pytest.param("resnet50", (2, 3, 64, 64), id="r50"),
        pytest.param("resnet50", (1, 3, 1, 1), id="r50-one-pixel"),
        pytest.param("resnet50", (0, 3, 64, 64), id="r50-empty"),
        pytest.param("resnext50_32x4d", (1, 3, 64, 64), id="x50"),
        pytest.param("wide_resnet50_2", (1, 3, 64, 64), id="w50"),
    ],
)
@torch.no_grad()
def test_eval(name, shape, matched):
    mine, theirs = (m.eval() for m in matched(name))
    x = image(*shape)
    assert_bits(mine(x), theirs(x))
    assert mine(x).shape == (shape[0], 1000)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x[:, :, 3:45:2, 1:60], id="sliced"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), id="expanded"),
    ],
)
@torch.no_grad()
def test_layouts_of_the_input(view, matched):
    mine, theirs = (m.eval() for m in matched("resnet18"))
    x = view(image(2, 3, 64, 64))
    before = x.clone(), x.stride()
    assert_bits(mine(x), theirs(x))
    assert torch.equal(x, before[0])
    assert x.stride() == before[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_dtypes(dtype, matched):
    mine, theirs = (m.eval().to(dtype) for m in matched("resnet18"))
    x = image(2, 3, 64, 64).to(dtype)
    assert mine.bn1.num_batches_tracked.dtype == torch.int64
    assert_bits(mine(x), theirs(x))


@torch.no_grad()
def test_autocast(matched):
    mine, theirs = (m.eval() for m in matched("resnet18"))
    x = image(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits(mine(x), theirs(x))
    assert mine(x).dtype == mine.fc.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_step(name, matched, assert_same_state):
    x, gradients = image(4, 3, 64, 64), []
    models = matched(name)
    for model in models:
        given = x.clone().requires_grad_()
        model.train()(given).square().mean().backward()
        gradients.append([given.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert_same_state(*models)  # the running statistics moved alike


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        pytest.param(
            "resnet50", {"replace_stride_with_dilation": [False, True, True]}, id="dilated"
        ),
        pytest.param("resnet50", {"norm_layer": FrozenBatchNorm2d}, id="frozen"),
        pytest.param("resnet18", {"norm_layer": lambda c: nn.GroupNorm(32, c)}, id="group"),
        pytest.param("resnet18", {"norm_layer": nn.SyncBatchNorm}, id="sync"),
        pytest.param(
            "resnet18",
            {"norm_layer": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
            id="no-running-stats",
        ),
        pytest.param(
            "resnet18", {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=None)}, id="cumulative"
        ),
        pytest.param("resnet18", {"num_classes": 3, "zero_init_residual": True}, id="zero-init"),
    ],
)
@torch.no_grad()
def test_variants(name, kwargs, matched):
    mine, theirs = (m.eval() for m in matched(name, **kwargs))
    x = image(2, 3, 64, 64)
    assert_bits(mine(x), theirs(x))


@torch.no_grad()
def test_stride_in_1x1_equals_torchvision_with_the_strides_moved(matched):
    theirs = matched("resnet50")[1].eval()
    mine = ours.resnet50(stride_in_1x1=True).eval().to(memory_format=torch.channels_last)
    mine.load_state_dict(theirs.state_dict())
    x = image(1, 3, 64, 64)
    assert not torch.equal(mine(x), theirs(x))
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    assert_bits(mine(x), theirs(x))


@pytest.mark.parametrize(
    ("training", "shape"),
    [
        pytest.param(False, (3, 64, 64), id="three-dimensions"),
        pytest.param(False, (1, 1, 64, 64), id="one-channel"),
        pytest.param(True, (1, 3, 32, 32), id="one-value-per-channel-in-training"),
    ],
)
def test_bad_input_fails_alike(training, shape, matched):
    errors = []
    for model in matched("resnet18"):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            model.train(training)(image(*shape))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def small(block=ours.BasicBlock):
    """A whole ResNet of one block a layer: what is asked of it takes no time."""
    torch.manual_seed(0)
    return ours.ResNet(block, [1, 1, 1, 1], num_classes=5).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("block", [ours.BasicBlock, ours.Bottleneck])
@torch.no_grad()
def test_scripts_and_traces(block):
    model, x = small(block), image(2, 3, 64, 64)
    assert_bits(torch.jit.script(model)(x), model(x))
    assert_bits(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("block", [ours.BasicBlock, ours.Bottleneck])
@torch.no_grad()
def test_compiles_without_a_graph_break(block):
    model = small(block)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((2, 3, 64, 64), (3, 3, 33, 65)):
        x = image(*shape)
        assert_bits(compiled(x), model(x))


def test_exports_with_a_dynamic_batch():
    model = small()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (image(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    x = image(5, 3, 64, 64)
    with torch.no_grad():
        assert_bits(program.module()(x), model(x))


def test_gradients_reach_everything_in_eval_mode(matched):
    mine, theirs = (m.eval() for m in matched("resnet18"))
    x = image(2, 3, 64, 64)
    for model in (mine, theirs):
        model(x).sum().backward()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_functional_call_reads_the_given_parameters(matched):
    mine, theirs = (m.eval() for m in matched("resnet18"))
    other = {name: p.detach() * 1.01 for name, p in theirs.named_parameters()}
    x = image(1, 3, 64, 64)
    mine, theirs = (torch.func.functional_call(m, other, (x,)) for m in (mine, theirs))
    assert_bits(mine, theirs)


def test_torchvision_blocks_work_in_our_resnet(assert_same_state):
    torch.manual_seed(0)
    mixed = ours.ResNet(reference.Bottleneck, [1, 1, 1, 1])
    torch.manual_seed(0)
    assert_same_state(mixed, reference.ResNet(reference.Bottleneck, [1, 1, 1, 1]))
