# SPDX-License-Identifier: Apache-2.0
"""State dicts go both ways; models are copied, pickled, moved and edited as torchvision's are."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision.models.resnet as reference
from torch import nn

import resnet_fast.models.resnet as ours

pytestmark = pytest.mark.usefixtures("plain_path")

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize(("source", "target"), [(reference, ours), (ours, reference)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_strict_loading(name, source, target, assign, assert_same_state):
    torch.manual_seed(5)
    given = getattr(source, name)()
    loaded = getattr(target, name)()
    result = loaded.load_state_dict(given.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(loaded, given)


def test_a_checkpoint_file_of_either_loads_in_the_other(tmp_path, assert_same_state):
    for source, target in ((reference, ours), (ours, reference)):
        given, loaded = source.resnet18(), target.resnet18()
        torch.save(given.state_dict(), tmp_path / "checkpoint.pth")
        loaded.load_state_dict(torch.load(tmp_path / "checkpoint.pth", weights_only=True))
        assert_same_state(loaded, given)


def test_state_dict_metadata(pair):
    mine, theirs = pair("resnet18")
    assert mine.state_dict()._metadata == theirs.state_dict()._metadata


def test_a_state_dict_that_does_not_fit_fails_alike(pair):
    state = reference.resnet18(num_classes=3).state_dict()
    del state["bn1.weight"]
    state["extra"] = torch.zeros(1)
    texts = []
    for model in pair("resnet18"):
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@torch.no_grad()
def test_meta_device_then_assign(matched):
    theirs = matched("resnet18")[1].eval()
    with torch.device("meta"):
        mine = ours.resnet18().eval()
    mine.load_state_dict(theirs.state_dict(), assign=True)
    assert mine.conv1.weight.data_ptr() == theirs.conv1.weight.data_ptr()
    assert torch.equal(mine(X), theirs(X))


def test_meta_device_then_to_empty(assert_same_state):
    with torch.device("meta"):
        mine = ours.resnet18()
    theirs = reference.resnet18()
    mine.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_same_state(mine, theirs)


def through_torch_save(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
        pytest.param(through_torch_save, id="torch.save"),
    ],
)
@torch.no_grad()
def test_copies(copied, assert_same_state):
    model = ours.resnet18().eval()
    copy_ = copied(model)
    assert type(copy_) is ours.ResNet
    assert_same_state(copy_, model)
    assert torch.equal(copy_(X), model(X))
    assert copy_.conv1.weight.stride() == model.conv1.weight.stride()
    copy_.conv1.weight.zero_()
    assert model.conv1.weight.any()


@pytest.mark.parametrize("builder", [ours.resnet50, ours.wide_resnet50_2], ids=lambda f: f.__name__)
def test_builders_pickle_by_name(builder):
    assert pickle.loads(pickle.dumps(builder)) is builder
    assert copy.deepcopy(builder) is builder


def replace_fc(model):
    model.fc = nn.Linear(model.fc.in_features, 4)


def replace_fc_by_identity(model):
    model.fc = nn.Identity()


def replace_conv1(model):
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=True)


def drop_maxpool(model):
    model.maxpool = nn.Identity()


def drop_layer4(model):
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 4)


def replace_a_relu(model):
    model.layer1[0].relu = nn.SiLU()


def replace_a_norm(model):
    model.layer2[1].bn2 = nn.GroupNorm(8, 128)


@pytest.mark.parametrize(
    "edit",
    [
        replace_fc,
        replace_fc_by_identity,
        replace_conv1,
        drop_maxpool,
        drop_layer4,
        replace_a_relu,
        replace_a_norm,
    ],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_edits(edit, matched):
    outputs = []
    for model in matched("resnet18"):
        model.eval()
        torch.manual_seed(6)
        edit(model)
        model.to(memory_format=torch.channels_last)
        outputs.append(model(X))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_children_in_a_sequential_without_the_head(matched):
    mine, theirs = (nn.Sequential(*list(m.children())[:-1]).eval()(X) for m in matched("resnet18"))
    assert mine.shape == (2, 512, 1, 1)
    assert torch.equal(mine, theirs)


@torch.no_grad()
def test_an_encoder_without_fc(matched):
    """The way of segmentation encoders: delete fc, override forward, call the stages."""

    def encode(model):
        del model.fc
        features, x = [], X
        for stage in (
            nn.Sequential(model.conv1, model.bn1, model.relu),
            nn.Sequential(model.maxpool, model.layer1),
            model.layer2,
            model.layer3,
            model.layer4,
        ):
            x = stage(x)
            features.append(x)
        return features

    mine, theirs = (encode(m.eval()) for m in matched("resnet18"))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@torch.no_grad()
def test_subclasses(assert_same_state):
    """Own forward of a block, own `_forward_impl` of a model: both are what runs."""
    built = []
    for module in (ours, reference):

        class PreScaled(module.Bottleneck):
            expansion = 4

            def __init__(self, inplanes, planes, stride=1, downsample=None, *args, **kwargs):
                super().__init__(inplanes, planes, stride, downsample, *args, **kwargs)
                self.gain = nn.Parameter(torch.full((1,), 0.5))

            def forward(self, x):
                return super().forward(x * self.gain)

        class Headless(module.ResNet):
            def _forward_impl(self, x):
                return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

        torch.manual_seed(7)
        built.append(Headless(PreScaled, [2, 1, 1, 1]).eval().to(memory_format=torch.channels_last))
    mine, theirs = built
    assert_same_state(mine, theirs)
    assert torch.equal(mine(X), theirs(X))
    mine.layer1[0].gain.fill_(3.0)
    assert not torch.equal(mine(X), theirs(X))
