# SPDX-License-Identifier: Apache-2.0
"""What the tests of the models share: torchvision is the reference, asked at run time."""

from __future__ import annotations

import pytest
import torch
import torchvision.models.resnet as reference

import resnet_fast
import resnet_fast.models.resnet as ours


@pytest.fixture
def plain_path():
    """Every model takes its plain path: eager torch, op for op, so bit equality can be asked."""
    with resnet_fast.disabled():
        yield


@pytest.fixture
def pair():
    """pair(name, seed=0, **kwargs) -> our model and torchvision's, built from equal seeds."""

    def build(name: str, seed: int = 0, **kwargs):
        models = []
        for module in (ours, reference):
            torch.manual_seed(seed)
            models.append(getattr(module, name)(**kwargs))
        return models

    return build


@pytest.fixture
def meta_pair(pair):
    """`pair` without storage, for the models that are too large to fill in a test."""

    def build(name: str, **kwargs):
        with torch.device("meta"):
            return pair(name, **kwargs)

    return build


@pytest.fixture
def matched(pair):
    """pair(...) with equal memory formats and BatchNorm statistics other than the initial."""

    def build(name: str, **kwargs):
        mine, theirs = pair(name, **kwargs)
        for model in (mine, theirs):
            model.to(memory_format=torch.channels_last)
            generator = torch.Generator().manual_seed(1)
            for module in model.modules():
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.normal_(0, 0.1, generator=generator)
                    module.running_var.uniform_(0.5, 1.5, generator=generator)
        return mine, theirs

    return build


@pytest.fixture
def assert_same_state():
    """Equal state dicts: names, their order, dtypes, shapes, and values bit for bit."""

    def check(mine: torch.nn.Module, theirs: torch.nn.Module):
        a, b = mine.state_dict(), theirs.state_dict()
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), name

    return check
