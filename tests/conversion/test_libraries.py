# SPDX-License-Identifier: Apache-2.0
"""`optimize` on the models that torchvision and timm build out of ResNets."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
    _resnet_fpn_extractor,
    resnet_fpn_backbone,
)
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast
import resnet_fast.models.resnet as ours
from tests.support.detection import some_boxes, undecided

K_GEMM = 2048 * 9


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)  # timm starts some at zero
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def assert_agrees(mine: dict, eager: dict, exact: dict) -> None:
    """Each tensor agrees by the rule of `resnet_fast/agreement`."""
    assert list(mine) == list(eager)
    for name in mine:
        verdict = resnet_fast.agreement.compare(mine[name], eager[name], exact[name], K_GEMM)
        assert verdict.agrees, f"{name}: {verdict}"


def check(model: nn.Module, x: torch.Tensor, pick=lambda y: {"": y}) -> nn.Module:
    """Optimize the model; each tensor that `pick` takes of its output must agree; twice."""
    optimized = resnet_fast.optimize(model, strict=True)
    with torch.inference_mode():
        exact = pick(copy.deepcopy(model).double()(x.double()))
        eager = pick(model(x))
        for _ in range(2):
            assert_agrees(pick(optimized(x)), eager, exact)
    return optimized


def assert_fused(model: nn.Module, expected: int) -> None:
    rows = resnet_fast.report(model)
    assert (rows.fused, len(rows)) == (expected, expected), str(rows)
    assert all(r.backend == "cpu" for r in rows), str(rows)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_faster_rcnn(norm):
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "min_size": 64, "max_size": 64}
    if norm is nn.BatchNorm2d:
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, **sizes
        )
    else:
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm)
        model = torchvision.models.detection.FasterRCNN(backbone, **sizes)
    randomize(model)
    for name, module in model.backbone.body.named_modules():
        if name.endswith("bn3"):
            module.weight.data.mul_(0.2)  # else the features grow from block to block
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0  # as torchvision does once it has loaded weights
    optimized = resnet_fast.optimize(model, strict=True)
    x = image(3, 64, 64).sigmoid()
    images, boxes = [x, x[:, :48]], some_boxes(20, 64)
    with torch.inference_mode():
        double = [image.double() for image in images]
        exact = undecided(copy.deepcopy(model).double(), double, boxes)
        eager = undecided(model, images, boxes)
        for _ in range(2):
            assert_agrees(undecided(optimized, images, boxes), eager, exact)
            assert all(len(detected["boxes"]) > 0 for detected in optimized(images))
    assert_fused(optimized, 17)  # the stem too, although the extractor calls its parts in turn


@pytest.mark.parametrize("build", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_segmentation(build):
    torch.manual_seed(0)
    model = getattr(torchvision.models.segmentation, build)(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )
    optimized = check(randomize(model), image(1, 3, 64, 64), dict)
    assert optimized.backbone.layer4[1].conv2.dilation == (4, 4)
    plain = [row for row in resnet_fast.report(optimized) if not row.fused]
    assert [row.kind for row in plain] == ["ASPPPooling"] * (build == "deeplabv3_resnet50")


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_pyramid_on_our_resnet(norm):
    torch.manual_seed(0)
    mine = ours.resnet18(norm_layer=norm)
    theirs = torchvision.models.resnet18(norm_layer=norm)
    theirs.load_state_dict(mine.state_dict())
    pyramids = []
    for model in (randomize(mine), randomize(theirs)):
        torch.manual_seed(3)
        pyramids.append(_resnet_fpn_extractor(model, trainable_layers=3).eval())
    x = image(2, 3, 64, 64)
    with torch.inference_mode():
        exact = copy.deepcopy(pyramids[1]).double()(x.double())
        fused, eager = (p(x) for p in pyramids)
    assert list(fused) == list(eager)
    for name in fused:
        assert resnet_fast.agreement.compare(fused[name], eager[name], exact[name], K_GEMM).agrees
    stem, *rest = resnet_fast.report(pyramids[0])
    assert (stem.name, stem.fused) == ("body.(stem)", False)  # the extractor is torchvision's
    assert "resnet_fast.optimize(model)" in stem.reason
    assert len(rest) == 8 and all(row.fused for row in rest)


def test_backbones_with_pyramids():
    torch.manual_seed(0)
    names = {"layer2": "0", "layer4": "1"}
    resnet = torchvision.models.resnet18()
    for model in (
        BackboneWithFPN(resnet, names, [128, 512], 16),
        resnet_fpn_backbone(backbone_name="resnet18", weights=None),
    ):
        assert_fused(check(randomize(model), image(1, 3, 64, 64), dict), 9)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_feature_extractors_see_the_same_graph(name):
    model = getattr(torchvision.models, name)().eval()
    optimized = resnet_fast.optimize(model)
    with torch.no_grad():
        optimized(image(1, 3, 32, 32))
    assert get_graph_node_names(optimized) == get_graph_node_names(model)
    nodes = ["layer1.0.relu_1", "layer2.1.add", "flatten"]
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        mine, theirs = (create_feature_extractor(m, nodes)(x) for m in (optimized, model))
    for node in nodes:
        torch.testing.assert_close(mine[node], theirs[node], rtol=1e-4, atol=1e-4)


def test_resnext():
    torch.manual_seed(0)
    model = torchvision.models.resnext50_32x4d(num_classes=4)
    rows = resnet_fast.report(check(randomize(model), image(1, 3, 64, 64)))
    assert rows.fused == len(rows) == 17


# ---- timm

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 9), ("resnet50", 17)])
def test_timm(name, blocks):
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, pretrained=False, num_classes=4))
    optimized = check(model, image(1, 3, 64, 64))
    assert_fused(optimized, blocks)
    assert isinstance(optimized, type(model))
    x = image(1, 3, 64, 64)
    with torch.inference_mode():
        mine, theirs = (m.forward_intermediates(x)[1] for m in (optimized, model))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        pytest.param("resnet50d", {}, "downsample.0 (AvgPool2d) runs by itself", id="avg-pool"),
        pytest.param("seresnet50", {}, "se (SEModule) runs by itself", id="squeeze-excite"),
        pytest.param("resnet18", {"act_layer": nn.SiLU}, "act1: SiLU is not a ReLU", id="silu"),
        pytest.param(
            *("resnet18", {"aa_layer": nn.AvgPool2d}, "aa (AvgPool2d) runs by itself"),
            id="anti-alias",
        ),
    ],
)
def test_timm_blocks_are_fused_in_parts(name, options, left):
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, pretrained=False, num_classes=4, **options))
    optimized = check(model, image(1, 3, 64, 64))
    rows = resnet_fast.report(optimized)
    assert_fused(optimized, len(rows))
    assert any(left in r.reason for r in rows), str(rows)


def test_timm_stochastic_depth_only_in_evaluation():
    torch.manual_seed(0)
    model = randomize(
        timm.create_model("resnet18", pretrained=False, num_classes=4, drop_path_rate=0.5)
    )
    optimized = check(model, image(1, 3, 64, 64))
    assert_fused(optimized, 9)
    drop = optimized.layer4[1].drop_path
    drop.train()
    x = image(1, 3, 64, 64)
    with torch.inference_mode():
        outputs = {tuple(optimized(x)[0].tolist()) for _ in range(12)}
    assert len(outputs) == 2  # with and without the last block
    assert "drop_path (DropPath)" in list(resnet_fast.report(optimized))[-1].reason


def test_timm_feature_pyramid():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, features_only=True)
    optimized = check(
        randomize(model), image(1, 3, 64, 64), lambda ys: {str(i): y for i, y in enumerate(ys)}
    )
    assert_fused(optimized, 9)


def test_all_frozen_norms_of_transformers_compute_the_same():
    """They are known by their name, of which each model file has a copy."""
    transformers = pytest.importorskip("transformers")
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    pattern = r"class \w+FrozenBatchNorm2d\(nn\.Module\):.*?def forward\(self, x\):(.*?)\n\n"
    found = [re.search(pattern, file.read_text(), re.DOTALL) for file in files]
    bodies = [re.sub(r"#.*|\s+", "", match.group(1)) for match in found if match]
    assert len(bodies) >= 3
    assert len(set(bodies)) == 1


@torch.inference_mode()
def test_what_a_backbone_returns_may_change_between_calls():
    """Its stem then ends elsewhere: what was kept for the other one does not serve."""
    plain = IntermediateLayerGetter(randomize(torchvision.models.resnet18()), {"relu": "a"})
    optimized = resnet_fast.optimize(plain, strict=True)
    x = image(1, 3, 32, 32)
    for wanted in ({"relu": "a"}, {"conv1": "a", "relu": "b"}, {"bn1": "c"}, {"relu": "a"}):
        exact = copy.deepcopy(plain).double()
        for model in (plain, optimized, exact):
            model.return_layers = wanted
        for _ in range(2):
            assert_agrees(optimized(x), plain(x), exact(x.double()))
