# SPDX-License-Identifier: Apache-2.0
"""What torchvision asks of its detectors, segmenters and pyramids, asked of optimised ones, and of
torchvision's built on our ResNets.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
    _resnet_fpn_extractor,
    resnet_fpn_backbone,
)

import resnet_fast
import resnet_fast.models.resnet as ours
from resnet_fast import agreement
from tests.conversion.test_libraries import assert_agrees, image, randomize
from tests.support.detection import some_boxes, undecided

pytestmark = pytest.mark.slow

K_GEMM = 2048 * 9
SIZE = 96
DETECTORS = [
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
]
# Each candidate costs a head of convolutions, and none of them is ours.
FEW_PROPOSALS = {
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 5,
}
SEGMENTERS = ["fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"]


def tamed(model: nn.Module) -> nn.Module:
    """Statistics as training leaves them, and maps that do not grow from block to block."""
    randomize(model)
    for name, module in model.named_modules():
        if name.endswith("bn3"):
            module.weight.data.mul_(0.2)
    return model


def detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "min_size": SIZE, "max_size": SIZE, "trainable_backbone_layers": 5}
    few = FEW_PROPOSALS if "rcnn" in name else {"topk_candidates": 50, "detections_per_img": 5}
    build = getattr(detection, name)
    return tamed(build(weights=None, weights_backbone=None, **sizes, **few))


def images() -> list[torch.Tensor]:
    x = image(3, SIZE, SIZE).sigmoid()
    return [x, x[:, :64]]


def targets(name: str) -> list[dict]:
    boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [30.0, 5.0, 80.0, 40.0]])
    found = []
    for x in images():
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        if name.startswith("mask"):
            target["masks"] = torch.zeros(2, *x.shape[1:], dtype=torch.uint8)
            target["masks"][:, 15:35, 35:45] = 1
        if name.startswith("keypoint"):
            middle = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
            target["keypoints"] = torch.cat([middle.expand(2, 17, 2), torch.ones(2, 17, 1)], 2)
        found.append(target)
    return found


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boxes in a dtype; keypoints, of one more dimension, are asked for in float32 always."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() < 3 else tensor


def assert_detects_alike(fused: nn.Module, plain: nn.Module) -> None:
    """All that precedes the decisions agrees, and the decisions have torchvision's form."""
    boxes = some_boxes(8, 64)
    double = [x.double() for x in images()]
    exact = undecided(copy.deepcopy(plain).double(), double, boxes)
    eager = undecided(plain, images(), boxes)
    expected = plain(images())
    for _ in range(2):
        assert_agrees(undecided(fused, images(), boxes), eager, exact)
        for mine, theirs in zip(fused(images()), expected, strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                assert mine[key].dtype == theirs[key].dtype
                assert mine[key].shape[1:] == theirs[key].shape[1:]
                assert len(mine[key]) == len(mine["boxes"])


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_detectors(name):
    plain = detector(name)
    fused = resnet_fast.optimize(plain, strict=True)
    assert_detects_alike(fused, plain)
    body = [row for row in resnet_fast.report(fused) if row.name.startswith("backbone.body")]
    assert len(body) == 17 and all(row.fused for row in body)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for mine, theirs in zip(other(images()), fused(images()), strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_and_gradients(name):
    """Losses that no decision precedes agree; the others are there and finite."""
    plain = detector(name)
    # Backward through torchvision's keypoint head, plain as well, refuses channels_last weights.
    layout = torch.preserve_format if "keypoint" in name else torch.channels_last
    fused = resnet_fast.optimize(plain, strict=True, memory_format=layout)
    models = fused, plain, copy.deepcopy(plain).double()
    losses = []
    for model in models:
        dtype = next(model.parameters()).dtype
        torch.manual_seed(0)  # which anchors are looked at is drawn
        given = [{k: cast(v, dtype) for k, v in target.items()} for target in targets(name)]
        losses.append(model.train()([x.to(dtype) for x in images()], given))
        sum(losses[-1].values()).backward()
        assert model.backbone.body.layer2[0].conv1.weight.grad.abs().sum() > 0
    mine, eager, exact = losses
    assert mine.keys() == eager.keys()
    early = {"loss_objectness", "loss_rpn_box_reg"} if "rcnn" in name else set(mine)
    for key in mine:
        assert mine[key].isfinite()
        if key in early:
            verdict = agreement.compare(mine[key], eager[key], exact[key].detach(), K_GEMM)
            assert verdict.agrees, f"{key}: {verdict}"


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_scripted_detectors(name):
    fused = resnet_fast.optimize(detector(name), strict=True)
    expected = fused(images())
    scripted = torch.jit.script(fused)
    _, found = scripted(images())
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters(name):
    torch.manual_seed(0)
    build = getattr(segmentation, name)
    plain = tamed(build(weights=None, weights_backbone=None, num_classes=5, aux_loss=True))
    fused = resnet_fast.optimize(plain, strict=True)
    with torch.no_grad():
        for shape in ((1, 3, 64, 64), (2, 3, 70, 50)):
            x = image(*shape)
            exact = dict(copy.deepcopy(plain).double()(x.double()))
            for _ in range(2):
                y = dict(fused(x))
                assert list(y) == ["out", "aux"]
                assert y["out"].shape == (shape[0], 5, *shape[2:])
                assert_agrees(y, dict(plain(x)), exact)
        scripted = torch.jit.script(fused)
        assert_agrees(dict(scripted(x)), dict(plain(x)), exact)
    fused.train()(image(2, 3, 64, 64))["out"].mean().backward()
    assert fused.backbone.conv1.weight.grad.abs().sum() > 0


# ---- pyramids


def pyramids(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """torchvision's extractor on our ResNet, and on its own with the same weights."""
    made = []
    for builder in (getattr(ours, name), getattr(torchvision.models, name)):
        torch.manual_seed(0)
        backbone = tamed(builder())
        torch.manual_seed(1)
        made.append(_resnet_fpn_extractor(backbone, **options).eval())
    made[0].load_state_dict(made[1].state_dict())
    return made[0], made[1]


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("layers", range(6))
def test_trainable_layers(layers):
    mine, theirs = pyramids("resnet18", trainable_layers=layers)
    assert trainable(mine) == trainable(theirs)
    optimized = resnet_fast.optimize(theirs, strict=True)
    assert trainable(optimized) == trainable(theirs)
    named = {"backbone_name": "resnet18", "weights": None, "norm_layer": nn.BatchNorm2d}
    plain = resnet_fpn_backbone(trainable_layers=layers, **named)
    assert trainable(plain) == trainable(theirs)
    x = image(2, 3, 64, 64)
    for model in (mine, optimized):
        assert_agrees(model(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))


@pytest.mark.parametrize("returned", [[1], [2, 3], [1, 2, 3, 4], [4]])
@torch.no_grad()
def test_returned_layers(returned):
    mine, theirs = pyramids("resnet50", trainable_layers=3, returned_layers=returned)
    x = image(1, 3, 64, 64)
    exact = copy.deepcopy(theirs).double()(x.double())
    assert len(exact) == len(returned) + 1  # and the pooled one
    for model in (mine, resnet_fast.optimize(theirs, strict=True)):
        assert_agrees(model(x), theirs(x), exact)


def test_layers_that_are_none_raise_the_same():
    for backbone in (ours.resnet18(), torchvision.models.resnet18()):
        with pytest.raises(ValueError, match="Each returned layer should be in the range"):
            _resnet_fpn_extractor(backbone, 3, returned_layers=[0, 1])
        with pytest.raises(ValueError, match="Trainable layers should be in the range"):
            _resnet_fpn_extractor(backbone, 6)


@torch.no_grad()
def test_a_detector_on_our_resnet():
    torch.manual_seed(0)
    backbone = _resnet_fpn_extractor(ours.resnet50(), trainable_layers=3)
    sizes = {"num_classes": 3, "min_size": SIZE, "max_size": SIZE}
    mine = detection.FasterRCNN(backbone, **sizes)
    torch.manual_seed(0)
    backbone = _resnet_fpn_extractor(torchvision.models.resnet50(), trainable_layers=3)
    plain = detection.FasterRCNN(backbone, **sizes)
    tamed(plain)
    mine.eval().load_state_dict(plain.state_dict())
    assert_detects_alike(mine, plain)
    assert resnet_fast.report(mine).fused == 16


@torch.no_grad()
def test_a_pyramid_by_hand():
    names = {"layer2": "0", "layer4": "1"}
    made = []
    for builder in (ours.resnet18, torchvision.models.resnet18):
        torch.manual_seed(0)
        made.append(tamed(BackboneWithFPN(builder(), names, [128, 512], 16)))
    made[0].load_state_dict(made[1].state_dict())
    x = image(1, 3, 64, 64)
    exact = copy.deepcopy(made[1]).double()(x.double())
    assert_agrees(made[0](x), made[1](x), exact)
