# SPDX-License-Identifier: Apache-2.0
"""A small model of torchvision's to convert, and images for it."""

from __future__ import annotations

import pytest
import torch
import torchvision.models.resnet as reference


@pytest.fixture
def plain():
    """torchvision's ResNet with one block a stage but the first, in evaluation, NCHW weights."""
    torch.manual_seed(0)
    return reference.ResNet(reference.BasicBlock, [2, 1, 1, 1], num_classes=10).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
