# SPDX-License-Identifier: Apache-2.0
"""torchvision's own tools take our models for torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision.models.resnet as reference
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.segmentation.deeplabv3 import _deeplabv3_resnet
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast.models.resnet as ours

pytestmark = pytest.mark.usefixtures("plain_path")

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_graph_node_names(name, pair):
    mine, theirs = (get_graph_node_names(m) for m in pair(name))
    assert mine == theirs
    _, evaluated = mine
    assert evaluated[:5] == ["x", "conv1", "bn1", "relu", "maxpool"]
    assert {"layer1.0.add", "layer1.0.relu_1"} <= set(evaluated)
    assert evaluated[-3:] == ["avgpool", "flatten", "fc"]


@torch.no_grad()
def test_feature_extractor(matched):
    nodes = ["layer1.0.relu_1", "layer2.0.add", "layer4", "flatten"]
    mine, theirs = (create_feature_extractor(m.eval(), nodes)(X) for m in matched("resnet18"))
    assert list(mine) == list(theirs) == nodes
    assert all(torch.equal(mine[n], theirs[n]) for n in nodes)


@torch.no_grad()
def test_intermediate_layer_getter(matched):
    layers = {"layer1": "a", "layer3": "b"}
    mine, theirs = (IntermediateLayerGetter(m.eval(), layers)(X) for m in matched("resnet18"))
    assert list(mine) == list(theirs) == ["a", "b"]
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


@torch.no_grad()
def test_detection_backbone(matched):
    models = [m.eval() for m in matched("resnet50", norm_layer=FrozenBatchNorm2d)]
    assert models[0].inplanes == models[1].inplanes == 2048
    outputs, trainable = [], []
    for model in models:
        torch.manual_seed(9)
        backbone = _resnet_fpn_extractor(model, trainable_layers=3).eval()
        trainable.append([n for n, p in backbone.named_parameters() if p.requires_grad])
        outputs.append(backbone.to(memory_format=torch.channels_last)(X))
    assert trainable[0] == trainable[1]
    assert not any("layer1" in n or "body.conv1" in n for n in trainable[0])
    assert list(outputs[0]) == list(outputs[1])
    assert all(torch.equal(outputs[0][k], outputs[1][k]) for k in outputs[0])


@torch.no_grad()
def test_segmentation_model(matched):
    kwargs = {"replace_stride_with_dilation": [False, True, True]}
    outputs = []
    for backbone in matched("resnet50", **kwargs):
        torch.manual_seed(10)
        model = _deeplabv3_resnet(backbone, 4, aux=False).eval()
        outputs.append(model.to(memory_format=torch.channels_last)(X)["out"])
    assert torch.equal(*outputs)
    assert outputs[0].shape == (1, 4, 64, 64)


@pytest.mark.parametrize(
    ("name", "calls"),
    [pytest.param("resnet18", 2, id="basic"), pytest.param("resnet50", 3, id="bottleneck")],
)
@torch.no_grad()
def test_the_shared_relu_fires_its_hook_at_every_use(name, calls):
    model, fired = getattr(ours, name)().eval(), []
    model.layer2[0].relu.register_forward_hook(lambda *_: fired.append(1))
    model(X)
    assert len(fired) == calls


def test_sync_batchnorm_conversion(pair):
    mine, theirs = (torch.nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in pair("resnet18"))
    assert str(mine) == str(theirs)
    assert isinstance(mine, ours.ResNet)
    assert isinstance(theirs, reference.ResNet)
