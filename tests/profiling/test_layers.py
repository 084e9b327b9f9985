# SPDX-License-Identifier: Apache-2.0
"""The layer lists against ResNet-50 as the paper's table 1 has it, and against torch's counter."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast
from resnet_fast.profiling.layers import as_run, layers, layers_of, unfused

N = 2


@pytest.fixture(scope="module")
def resnet50():
    return resnet_fast.models.resnet50().eval()


@pytest.fixture(scope="module")
def theirs50():
    return torchvision.models.resnet50().eval()


@pytest.fixture(scope="module")
def x():
    return torch.zeros(N, 3, 224, 224).to(memory_format=torch.channels_last)


def conv(name, size, c, k, r=1, stride=1, residual=False):
    """(name, FLOPs, bytes) of a fused float32 convolution, from first principles."""
    out = size // stride
    pixels = size * size if r >= stride else out * out
    elements = N * pixels * c + k * c * r * r + N * out * out * k * (2 if residual else 1)
    return name, 2 * N * out * out * k * c * r * r, 4 * (elements + 4 * k)


def resnet50_by_hand():
    rows = [conv("conv1", 224, 3, 64, 7, 2), ("maxpool", 0, 4 * N * 64 * (112**2 + 56**2))]
    size, c = 56, 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            stride = 2 if block == 0 and stage > 1 else 1
            if block == 0:
                rows.append(conv(f"{at}.downsample.0", size, c, 4 * width, 1, stride))
            rows.append(conv(f"{at}.conv1", size, c, width))
            rows.append(conv(f"{at}.conv2", size, width, width, 3, stride))
            size, c = size // stride, 4 * width
            rows.append(conv(f"{at}.conv3", size, width, c, residual=True))
    return rows


def test_each_layer_of_resnet50_has_the_flops_and_bytes_worked_out_by_hand(resnet50, x):
    found = layers(resnet50, x)
    assert [(row.name, row.flops, row.bytes) for row in found[:-2]] == resnet50_by_hand()
    pool, fc = found[-2:]
    assert (pool.name, pool.kind, pool.flops) == ("avgpool", "pool", 0)
    assert pool.bytes >= 4 * N * 2048 * 50
    assert (fc.name, fc.kind, fc.flops) == ("fc", "linear", 2 * N * 2048 * 1000)
    assert fc.bytes == 4 * (N * 2048 + 2048 * 1000 + 1000 + N * 1000)
    assert fc.weight_bytes == 4 * (2048 * 1000 + 1000)
    stages = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert list(dict.fromkeys(row.stage for row in found)) == stages


def test_the_specs_are_those_of_the_ops(resnet50, x):
    rows = {row.name: row for row in layers(resnet50, x)}
    last = rows["layer1.0.conv3"].spec
    assert last.residual and last.norm and last.activation == "relu"
    assert rows["layer1.0.downsample.0"].spec.activation == "none"
    assert (rows["layer2.0.conv2"].spec.stride, rows["layer2.0.conv2"].spec.r) == ((2, 2), 3)
    assert all(row.flops == row.spec.flops for row in rows.values() if row.spec)


def test_each_unfused_layer_has_the_flops_that_torch_counts(theirs50, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs50(x[:, :, :64, :64])
    counted = {
        name.partition(".")[2]: sum(by_op.values())
        for name, by_op in counter.get_flop_counts().items()
    }
    found = unfused(theirs50, x[:, :, :64, :64])
    worked = [row for row in found if row.flops]
    assert len(worked) == 54
    assert [(row.name, row.flops) for row in worked] == [
        (row.name, counted[row.name]) for row in worked
    ]
    assert sum(row.flops for row in found) == counter.get_total_flops()


def test_fused_and_unfused_compute_the_same_and_fused_moves_half(resnet50, theirs50, x):
    fused, plain = layers(theirs50, x), unfused(theirs50, x)
    assert sum(row.flops for row in fused) == sum(row.flops for row in plain)
    assert sum(row.bytes for row in fused) < 0.55 * sum(row.bytes for row in plain)
    assert fused == layers(resnet50, x)
    assert [(r.name, r.kind, r.bytes) for r in unfused(resnet50, x)] == [
        (r.name, r.kind, r.bytes) for r in plain
    ]


def test_a_plain_block_is_its_modules_and_its_addition(theirs50, x):
    names = [r.name for r in unfused(theirs50, x) if r.name.startswith("layer1.0.")]
    parts = ["conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"]
    parts += ["downsample.0", "downsample.1", "add", "relu"]
    assert names == [f"layer1.0.{part}" for part in parts]
    rows = {r.name: r for r in unfused(theirs50, x)}
    y = 4 * N * 56 * 56 * 256
    assert rows["layer1.0.add"].bytes == 3 * y and rows["layer1.0.add"].kind == "add"
    assert rows["layer1.0.relu"].bytes == 2 * y
    assert rows["layer1.0.bn3"].bytes == 2 * y + 4 * 4 * 256


def test_a_change_of_layout_is_a_layer(resnet50):
    first = layers(resnet50, torch.zeros(1, 3, 64, 64))[0]
    assert (first.kind, first.stage, first.bytes) == ("copy", "stem", 2 * 4 * 3 * 64 * 64)


def test_nothing_is_run_or_changed(resnet50):
    """It is told of a batch that would not fit, and the model has run no call."""
    before = [row.fused_calls for row in resnet_fast.report(resnet50)]
    many = layers(resnet50, torch.zeros(1, 3, 224, 224).expand(4096, 3, 224, 224))
    assert many[0].bytes > 4096 * 3 * 224 * 224
    assert [row.fused_calls for row in resnet_fast.report(resnet50)] == before


class Functional(nn.Module):
    def forward(self, x):
        return F.relu(x) + 1


class LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.a(x) if x.sum().item() > 0 else self.b(x)


def test_a_module_without_children_is_one_layer():
    (row,) = as_run(Functional(), torch.zeros(1, 2, 3, 3))
    assert (row.name, row.bytes) == ("Functional", 2 * 2 * 18 * 4)


@pytest.mark.parametrize(("value", "name"), [(1.0, "a"), (-1.0, "b")])
def test_a_model_that_looks_at_values_is_run(value, name):
    rows = as_run(LooksAtValues().eval(), torch.full((1, 3, 5, 5), value))
    assert [row.name for row in rows if row.kind == "conv"] == [name]


def test_what_is_wrong_with_a_model_is_told_by_its_own_run(resnet50):
    with pytest.raises(RuntimeError, match="expected input"):
        as_run(resnet50, torch.zeros(1, 5, 32, 32))


def test_a_model_is_listed_by_its_name_too():
    found = layers_of("resnet18", 2, "bfloat16")
    model = resnet_fast.models.resnet18().eval().bfloat16()
    assert list(found) == layers(model, torch.empty(2, 3, 224, 224, dtype=torch.bfloat16))
    plain = layers_of("resnet18", fused=False)
    assert [layer.kind for layer in plain].count("norm") == 20
    assert sum(layer.flops for layer in plain) * 2 == sum(layer.flops for layer in found)
