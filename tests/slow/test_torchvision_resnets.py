# SPDX-License-Identifier: Apache-2.0
"""What torchvision asks of its own ResNets, asked of ours and of optimised ones.

Beside each stands torchvision's plain model with the same weights.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
import resnet_fast.models.resnet as ours
from resnet_fast import agreement
from tests.nn.conftest import randomize

pytestmark = pytest.mark.slow

K_GEMM = 2048 * 9
BUILDERS = [name for name in resnet_fast.models.__all__ if name.startswith(("resn", "wide"))]
SMALL = ["resnet18", "resnet50", "resnext50_32x4d"]
KINDS = ["ours", "optimized"]


def pair(kind: str, name: str, **arguments) -> tuple[nn.Module, nn.Module]:
    """A fused and a plain model of equal weights, as training leaves them, in evaluation mode."""
    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)(**arguments)
    randomize(plain).eval().to(memory_format=torch.channels_last)
    for block in plain.modules():  # else the maps grow from block to block
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if hasattr(block, "downsample") and hasattr(last, "weight"):
            last.weight.data.mul_(0.3)
    if kind == "optimized":
        return resnet_fast.optimize(plain, strict=True), plain
    mine = getattr(ours, name)(**arguments).eval().to(memory_format=torch.channels_last)
    assert mine.load_state_dict(plain.state_dict()) == ([], [])
    return mine, plain


def image(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(y) -> dict[str, torch.Tensor]:
    return y if isinstance(y, dict) else {"": y}


def assert_agree(fused, plain, x) -> None:
    """Two calls of the fused model (the second by what was kept) beside eager and float64."""
    exact = outputs(copy.deepcopy(plain).double()(x.double()))
    eager = outputs(plain(x))
    for _ in range(2):
        mine = outputs(fused(x))
        assert list(mine) == list(eager)
        for name, y in mine.items():
            verdict = agreement.compare(y, eager[name], exact[name], K_GEMM)
            assert verdict.agrees, f"{name}: {verdict}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_answers(name, kind):
    fused, plain = pair(kind, name)
    for shape in ((2, 3, 64, 64), (1, 3, 75, 50)):
        assert fused(image(*shape)).shape == (shape[0], 1000)
        assert_agree(fused, plain, image(*shape))
    rows = resnet_fast.report(fused)
    assert rows.fused == len(rows) > 8
    with torch.enable_grad():
        assert_agree(fused, plain, image(1, 3, 64, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_classes_and_state(name, kind):
    fused, plain = pair(kind, name, num_classes=50)
    assert fused(image(1, 3, 32, 32)).shape == (1, 50)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other, again = pair(kind, name, num_classes=50)
    for model in (other, again):
        for parameter in model.parameters():
            parameter.mul_(0)
    other(image(1, 3, 32, 32))
    state = torch.load(file)
    assert list(state) == list(plain.state_dict())
    for model in (other, again):
        model.load_state_dict(state)
    assert torch.equal(other(image(1, 3, 32, 32)), fused(image(1, 3, 32, 32)))
    assert_agree(other, again, image(1, 3, 32, 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_copies_answer_alike(name, kind):
    fused, _ = pair(kind, name)
    x = image(1, 3, 32, 32)
    y = fused(x)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    copies = (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert type(other) is type(fused)
        assert torch.equal(other(x), y)


OPTIONS = {
    "dilated": {"replace_stride_with_dilation": [False, True, True]},
    "zero-init": {"zero_init_residual": True},
    "frozen": {"norm_layer": FrozenBatchNorm2d},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_options(options, kind):
    fused, plain = pair(kind, "resnet50", **OPTIONS[options])
    assert_agree(fused, plain, image(2, 3, 64, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients(training, name, kind):
    fused, plain = pair(kind, name, num_classes=4)
    exact = copy.deepcopy(plain).double()
    gradients = []
    for model, dtype in ((fused, None), (plain, None), (exact, torch.float64)):
        x = image(4, 3, 64, 64).to(dtype).requires_grad_()
        model.train(training)
        model(x).square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        gradients.append({"x": x.grad, **found})
    mine, eager, reference = gradients
    assert list(mine) == list(eager)
    for name in mine:
        verdict = agreement.compare(mine[name], eager[name], reference[name], K_GEMM)
        assert verdict.agrees, f"{name}: {verdict}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_scripting(name, kind):
    fused, plain = pair(kind, name)
    x = image(1, 3, 64, 64)
    fused(x)
    scripted = torch.jit.script(fused)
    assert_agree(scripted, plain, x)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert_agree(torch.jit.load(file), plain, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_tracing(name, kind):
    fused, plain = pair(kind, name)
    x = image(1, 3, 64, 64)
    assert_agree(torch.jit.trace(fused, x), plain, x)
    assert_agree(torch.fx.symbolic_trace(fused), plain, x)


# ---- feature extractors


NODES = {"layer1": "a", "layer2.0.bn1": "b", "layer3": "c", "layer4.1.add": "d", "flatten": "e"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDERS)
def test_node_names(name, kind):
    fused, plain = pair(kind, name)
    assert get_graph_node_names(fused) == get_graph_node_names(plain)
    for model in (fused, plain):
        model.train()
    assert get_graph_node_names(fused) == get_graph_node_names(plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_feature_extractors(name, kind):
    fused, plain = pair(kind, name)
    x = image(2, 3, 64, 64)
    mine, theirs = (create_feature_extractor(m, NODES) for m in (fused, plain))
    assert_agree(mine, theirs, x)
    for extractor in (mine, theirs):
        extractor.train()
        assert extractor.get_submodule("layer1.0.bn1").training
        extractor.eval()
        assert not extractor.get_submodule("layer1.0.bn1").training
    assert_agree(mine, theirs, x)
    nodes = {"train_return_nodes": ["layer1", "layer2"], "eval_return_nodes": ["layer4"]}
    for extractor in (create_feature_extractor(m, **nodes) for m in (fused, plain)):
        extractor.eval()
        assert list(extractor(x)) == ["layer4"]
        extractor.train()
        assert list(extractor(x)) == ["layer1", "layer2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_feature_extractors_train(name, kind):
    fused, _ = pair(kind, name)
    extractor = create_feature_extractor(fused, ["layer2", "layer4"]).train()
    sum(y.mean() for y in extractor(image(2, 3, 64, 64)).values()).backward()
    assert extractor.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@torch.no_grad()
def test_an_extractor_optimized_afterwards(inplace, name):
    _, plain = pair("optimized", name)
    theirs = create_feature_extractor(copy.deepcopy(plain), NODES).eval()
    mine = create_feature_extractor(copy.deepcopy(plain), NODES).eval()
    mine = resnet_fast.optimize(mine, inplace=inplace)
    assert [m.training for m in mine.modules()] == [m.training for m in theirs.modules()]
    assert_agree(mine, theirs, image(2, 3, 64, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_intermediate_layers(name, kind):
    fused, plain = pair(kind, name)
    layers = {"layer1": "low", "layer4": "high"}
    mine, theirs = (IntermediateLayerGetter(m, layers) for m in (fused, plain))
    assert list(mine) == list(theirs)
    assert_agree(mine, theirs, image(2, 3, 64, 64))
    again = resnet_fast.optimize(theirs, strict=True)
    assert_agree(again, theirs, image(2, 3, 64, 64))
