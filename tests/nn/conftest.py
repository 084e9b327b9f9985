# SPDX-License-Identifier: Apache-2.0
"""What the tests of fused forwards share: two kinds of model, and torchvision's plain one beside.

A ResNet of two stages has every part of a large one (blocks with and without projection, a stem)
and takes milliseconds.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision.models.resnet as reference
from torch import nn

import resnet_fast
import resnet_fast.models.resnet as ours
from tests.support.tolerance import assert_within

K_GEMM = 512 * 9  # the longest sum in a small model


def randomize(model: nn.Module) -> nn.Module:
    """BatchNorms as training leaves them: no statistic or factor has its initial value."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model


def build(module, block: str, layers: tuple[int, ...]) -> nn.Module:
    """A ResNet of 10 classes; with two layers only, the other stages are the identity."""
    torch.manual_seed(0)
    missing = 4 - len(layers)
    model = module.ResNet(getattr(module, block), [*layers, *[1] * missing], num_classes=10)
    if missing:
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(128 * model.layer2[0].expansion, 10)
    return randomize(model).eval().to(memory_format=torch.channels_last)


@pytest.fixture(scope="session")
def _built():
    cache = {}

    def get(kind: str, block: str, layers: tuple[int, ...]) -> nn.Module:
        key = (kind, block, layers)
        if key not in cache:
            cache[key] = build(ours if kind == "ours" else reference, block, layers)
        return copy.deepcopy(cache[key])

    return get


@pytest.fixture(params=["ours", "optimized"])
def kind(request):
    """Which fused model: this package's own, or torchvision's after `optimize`."""
    return request.param


@pytest.fixture
def pair(_built, kind):
    """pair(block, layers) -> a fused model, and torchvision's plain one with the same weights."""

    def make(block: str = "BasicBlock", layers: tuple[int, ...] = (2, 1)):
        plain = _built("torchvision", block, layers)
        fused = _built("ours", block, layers)
        if kind == "optimized":
            fused = resnet_fast.optimize(plain, strict=True)
        return fused, plain

    return make


@pytest.fixture
def image():
    def make(*shape: int, seed: int = 2) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def assert_agrees():
    """assert_agrees(fused, plain, x): their outputs agree by the rule of `resnet_fast/agreement`.

    float64 is a copy of the plain model, made before either has run.
    """

    def check(fused: nn.Module, plain: nn.Module, x: torch.Tensor, label: str = "") -> torch.Tensor:
        exact = copy.deepcopy(plain).double()
        y, eager = fused(x), plain(x)
        assert y.dtype == eager.dtype
        assert_within(y, eager, exact(x.double()), K_GEMM, label)
        return y

    return check


@pytest.fixture
def row():
    """row(model, name): the line of `report` for one block, "(stem)" for the stem."""

    def find(model: nn.Module, name: str):
        return next(r for r in resnet_fast.report(model) if r.name == name)

    return find


@pytest.fixture(params=[False, True], ids=["cold", "warm"])
def warmed(request, pair, image):
    """A fused and a plain model, the fused one before its first call or after two."""
    fused, plain = pair()
    if request.param:
        with torch.no_grad():
            for _ in range(2):
                fused(image(2, 3, 40, 40))
    return fused, plain
