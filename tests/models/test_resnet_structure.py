# SPDX-License-Identifier: Apache-2.0
"""The ten builders and their classes have torchvision's surface, tree, seeds and errors."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torchvision.models.resnet as reference
from torch import nn
from torch._subclasses import FakeTensorMode
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast.models
import resnet_fast.models.resnet as ours

BUILDERS = [name for name in reference.__all__ if name[0].islower()]

NORMS = {
    "frozen": FrozenBatchNorm2d,
    "group": lambda channels: nn.GroupNorm(32, channels),
    "sync": nn.SyncBatchNorm,
    "no-running-stats": functools.partial(nn.BatchNorm2d, track_running_stats=False),
    "cumulative-average": functools.partial(nn.BatchNorm2d, momentum=None),
}


def outcome(call):
    """The type and the text of what the call raises."""
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


def test_reference_has_ten_builders():
    assert len(BUILDERS) == 10


@pytest.mark.parametrize(
    "name",
    [*reference.__all__, "BasicBlock", "Bottleneck", "conv1x1", "conv3x3", "_resnet"],
)
def test_every_public_name_is_there(name):
    assert hasattr(ours, name)


@pytest.mark.parametrize("name", reference.__all__)
def test_package_has_the_names_of_torchvision_models(name):
    assert getattr(resnet_fast.models, name) is getattr(ours, name)


def shape_of(parameters):
    return [(p.name, p.kind, p.default) for p in parameters]


@pytest.mark.parametrize("name", BUILDERS)
def test_builder_signature(name):
    mine, theirs = (inspect.signature(getattr(m, name)) for m in (ours, reference))
    assert shape_of(mine.parameters.values()) == shape_of(theirs.parameters.values())


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "ResNet", "conv1x1", "conv3x3"])
def test_class_signature_adds_only_keywords(name):
    mine, theirs = (
        list(inspect.signature(getattr(m, name)).parameters.values()) for m in (ours, reference)
    )
    assert shape_of(mine[: len(theirs)]) == shape_of(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])


@pytest.mark.parametrize("name", BUILDERS)
def test_tree_of_every_builder(name, meta_pair):
    mine, theirs = meta_pair(name)
    assert str(mine) == str(theirs)  # children, their order and their hyperparameters
    assert [n for n, _ in mine.named_modules()] == [n for n, _ in theirs.named_modules()]
    described = [[(k, v.shape, v.dtype) for k, v in m.state_dict().items()] for m in (mine, theirs)]
    assert described[0] == described[1]
    counts = [sum(p.numel() for p in m.parameters()) for m in (mine, theirs)]
    assert counts[0] == counts[1]
    for attribute in ("_norm_layer", "inplanes", "dilation", "groups", "base_width"):
        assert getattr(mine, attribute) == getattr(theirs, attribute), attribute
    strides = [[getattr(m, "stride", None) for m in model.modules()] for model in (mine, theirs)]
    assert strides[0] == strides[1]
    assert all(p.is_meta for p in mine.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_equal_seeds_give_equal_models(name, pair, assert_same_state):
    mine, theirs = pair(name)
    assert_same_state(mine, theirs)


def test_equal_seeds_leave_equal_generators():
    states = []
    for module in (ours, reference):
        torch.manual_seed(3)
        module.resnet18(num_classes=7)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual(name, pair, assert_same_state):
    mine, theirs = pair(name, zero_init_residual=True)
    assert_same_state(mine, theirs)
    last = "bn2" if name == "resnet18" else "bn3"
    assert not getattr(mine.layer1[0], last).weight.any()
    assert mine.layer2[0].downsample[1].weight.all()


@pytest.mark.parametrize(
    "dilate", [[False, True, True], (True, True, True), [False, False, True]], ids=str
)
def test_dilation(dilate, meta_pair):
    mine, theirs = meta_pair("resnet50", replace_stride_with_dilation=dilate)
    assert str(mine) == str(theirs)
    assert mine.dilation == theirs.dilation


@pytest.mark.parametrize("dilate", [[], [True], (True, False, True, False)], ids=str)
def test_dilation_of_a_wrong_length(dilate):
    mine, theirs = (
        outcome(lambda m=m: m.resnet50(replace_stride_with_dilation=dilate))
        for m in (ours, reference)
    )
    assert mine == theirs
    assert mine[0] is ValueError


@pytest.mark.parametrize(
    ("error", "kwargs"),
    [
        pytest.param(ValueError, {"groups": 2}, id="groups"),
        pytest.param(ValueError, {"width_per_group": 128}, id="width"),
        pytest.param(
            NotImplementedError, {"replace_stride_with_dilation": [True, True, True]}, id="dilation"
        ),
        pytest.param(TypeError, {"stem": "deep"}, id="unknown-argument"),
    ],
)
def test_what_basic_blocks_refuse(error, kwargs):
    mine, theirs = (outcome(lambda m=m: m.resnet18(**kwargs)) for m in (ours, reference))
    assert mine == theirs
    assert mine[0] is error


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_norm_layers(name, norm, pair, assert_same_state):
    mine, theirs = pair(name, norm_layer=NORMS[norm], zero_init_residual=True)
    assert_same_state(mine, theirs)
    assert len(list(mine.parameters())) == len(list(theirs.parameters()))
    assert str(mine) == str(theirs)


def test_norm_layer_without_affine_fails_alike():
    norm_layer = functools.partial(nn.BatchNorm2d, affine=False)
    mine, theirs = (
        outcome(lambda m=m: m.resnet18(norm_layer=norm_layer)) for m in (ours, reference)
    )
    assert mine == theirs
    assert mine[0] is AttributeError


def test_stride_in_1x1_moves_the_stride_and_nothing_else(assert_same_state):
    torch.manual_seed(0)
    original = ours.resnet50(stride_in_1x1=True)
    torch.manual_seed(0)
    assert_same_state(original, reference.resnet50())
    for stage, stride in ((original.layer1, 1), (original.layer2, 2), (original.layer4, 2)):
        first = stage[0]
        assert (first.conv1.stride, first.conv2.stride) == ((stride, stride), (1, 1))
        assert first.downsample[0].stride == (stride, stride)
        assert first.stride == stride
        assert stage[1].conv1.stride == (1, 1)


def test_stride_in_1x1_needs_a_1x1():
    with pytest.raises(ValueError, match="BasicBlock has no 1x1 convolution"):
        ours.resnet18(stride_in_1x1=True)


def test_builds_under_fake_tensors():
    with FakeTensorMode():
        shapes = [tuple(p.shape) for p in ours.resnet18().parameters()]
    assert shapes == [tuple(p.shape) for p in reference.resnet18().parameters()]
