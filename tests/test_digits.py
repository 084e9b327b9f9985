# SPDX-License-Identifier: Apache-2.0
"""A ResNet-20 trained on real digits decides the same before and after `optimize`.

scikit-learn's digits are 1797 handwritten ones of 8x8 pixels. The network is the paper's for
CIFAR-10 (He et al. 2015, section 4.2), of one channel in and with projections as shortcuts.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fast
from resnet_fast import agreement
from resnet_fast.models.resnet import BasicBlock, conv1x1, conv3x3
from tests.support.here import cpu_refusal

datasets = pytest.importorskip("sklearn.datasets")

K_GEMM = 64 * 9  # the longest sum

TESTED_EVERY = 4  # the others are trained with; so both have digits by every writer


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [conv3x3(1, 16), nn.BatchNorm2d(16), nn.ReLU()]
    inplanes = 16
    for planes in (16, 32, 64):
        for i in range(3):
            stride = 2 if i == 0 and planes > 16 else 1
            projection = None
            if stride != 1:
                projection = nn.Sequential(conv1x1(inplanes, planes, 2), nn.BatchNorm2d(planes))
            layers.append(BasicBlock(inplanes, planes, stride, projection))
            inplanes = planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def trained():
    """The network after six passes over the training digits, and the test digits."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    tested = torch.arange(len(labels)) % TESTED_EVERY == 0
    learnt, truth = images[~tested], labels[~tested]
    torch.manual_seed(0)
    model, passes, batch = resnet20(), 6, 50
    steps = passes * len(learnt.split(batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(passes):
        for chosen in torch.randperm(len(learnt)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(learnt[chosen]), truth[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval(), images[tested], labels[tested]


def certain_decisions(model, images, dtype):
    """The decisions in float64, and which of them rounding in `dtype` cannot turn.

    Those whose two best scores lie further apart than both may be off by the rule of agreement.
    """
    exact = copy.deepcopy(model).double()(images.double())
    with resnet_fast.disabled():
        eager = copy.deepcopy(model).to(dtype)(images.to(dtype))
    error = agreement.error(eager, exact)
    limit = agreement.bound(error, dtype, K_GEMM) * exact.abs().max()
    best = exact.topk(2, dim=1).values
    return exact.argmax(1), best[:, 0] - best[:, 1] > 2 * limit


@torch.inference_mode()
def test_the_same_decisions(trained):
    model, images, labels = trained
    expected, certain = certain_decisions(model, images, torch.float32)
    assert (expected == labels).float().mean() > 0.95
    assert certain.float().mean() > 0.99
    optimized = resnet_fast.optimize(model, strict=True)
    for _ in range(2):
        assert torch.equal(optimized(images).argmax(1)[certain], expected[certain])
    rows = resnet_fast.report(optimized)
    assert rows.fused == len(rows) == 10  # the nine blocks, and the stem
    assert all(r.backend and r.backend != "aten" for r in rows)


@torch.inference_mode()
def test_bfloat16_decides_alike(trained):
    model, images, _ = trained
    expected, certain = certain_decisions(model, images, torch.bfloat16)
    assert certain.float().mean() > 0.9
    optimized = resnet_fast.optimize(model, dtype=torch.bfloat16)
    decided = optimized(images.bfloat16()).argmax(1)
    assert torch.equal(decided[certain], expected[certain])
    fused = cpu_refusal(torch.bfloat16) is None
    assert all(row.fused == fused for row in resnet_fast.report(optimized))


def test_training_goes_on_after_optimize(trained):
    model, images, labels = trained
    optimized = resnet_fast.optimize(model)
    with torch.inference_mode():
        before = optimized(images)
    optimizer = torch.optim.SGD(optimized.parameters(), lr=0.01)
    optimized.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(optimized(images), labels).backward()
        optimizer.step()
    optimized.eval()
    with torch.inference_mode():
        after = optimized(images)
        with resnet_fast.disabled():
            torch.testing.assert_close(after, optimized(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)
