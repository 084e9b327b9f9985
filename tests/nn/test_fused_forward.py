# SPDX-License-Identifier: Apache-2.0
"""A fused model computes what torchvision's computes, and writes over nothing that others see."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torchvision.models.resnet as reference
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

import resnet_fast
from tests.support.here import cpu_refusal

DEEP = {"resnet18": ("BasicBlock", (2, 2, 2, 2)), "resnet50": ("Bottleneck", (3, 4, 6, 3))}
SMALL = {"basic": ("BasicBlock", (2, 2)), "bottleneck": ("Bottleneck", (2, 2))}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def all_fused(model: nn.Module) -> bool:
    rows = resnet_fast.report(model)
    return len(rows) > 0 and rows.fused == len(rows)


@pytest.mark.parametrize(
    ("name", "dtype", "batch", "layout"),
    [
        pytest.param("resnet18", torch.float32, 1, "nchw", id="r18-fp32-1"),
        pytest.param("resnet18", torch.float32, 3, "nhwc", id="r18-fp32-3-nhwc"),
        pytest.param("resnet18", torch.bfloat16, 3, "nchw", id="r18-bf16-3"),
        pytest.param("resnet18", torch.bfloat16, 1, "nhwc", id="r18-bf16-1-nhwc"),
        pytest.param("resnet50", torch.float32, 3, "nchw", id="r50-fp32-3"),
        pytest.param("resnet50", torch.bfloat16, 1, "nhwc", id="r50-bf16-1-nhwc"),
    ],
)
@torch.no_grad()
def test_whole_networks_with_two_sizes_alternating(
    name, dtype, batch, layout, pair, image, assert_agrees
):
    fused, plain = (m.to(dtype) for m in pair(*DEEP[name]))
    inputs = [
        image(batch, 3, *size).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        for size in ((64, 64), (33, 47))
    ]
    first = [assert_agrees(fused, plain, x) for x in inputs]
    again = [fused(x) for x in inputs]  # by what was kept
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    calls = (4, 0) if cpu_refusal(dtype) is None else (0, 4)
    rows = resnet_fast.report(fused)
    assert all((row.fused_calls, row.plain_calls) == calls for row in rows)


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (2, 3, 1, 1), (1, 3, 1, 40)], ids=str)
@pytest.mark.parametrize("block", SMALL)
@torch.no_grad()
def test_extreme_sizes(block, shape, pair, image, assert_agrees):
    fused, plain = pair(*SMALL[block])
    x = image(*shape)
    for _ in range(2):
        assert fused(x).shape == (shape[0], 10)
        if shape[0]:
            assert_agrees(fused, plain, x)
    assert all_fused(fused)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x[:, :, 1::2, 3:40], id="sliced"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), id="expanded"),
        pytest.param(lambda x: x.to(memory_format=torch.channels_last)[:, :, 2:], id="nhwc-sliced"),
    ],
)
@torch.no_grad()
def test_strided_inputs_are_read_right_and_left_alone(view, pair, image, assert_agrees):
    fused, plain = pair()
    x = view(image(2, 3, 48, 64))
    before, strides = x.clone(), x.stride()
    for _ in range(2):
        assert_agrees(fused, plain, x)
        assert torch.equal(x, before)
        assert x.stride() == strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", SMALL)
@torch.no_grad()
def test_blocks_called_by_hand_overwrite_nothing(block, layout, pair, image):
    fused, _ = pair(*SMALL[block])
    x = image(2, 3, 64, 64).contiguous(memory_format=LAYOUTS[layout])
    parts = [fused.conv1, fused.bn1, fused.relu, fused.maxpool]
    parts += [b for stage in (fused.layer1, fused.layer2) for b in stage]
    for _ in range(2):
        kept = [(x, x.clone())]
        for part in parts[:1] + parts[3:]:  # without the in-place ReLU of the stem
            y = part(kept[-1][0])
            kept.append((y, y.clone()))
        assert all(torch.equal(y, copied) for y, copied in kept)
    assert resnet_fast.report(fused).fused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["layer1", "layer2"])
@torch.no_grad()
def test_a_stage_can_be_called_again_on_its_input(name, layout, pair, image, assert_agrees):
    fused, plain = (getattr(m, name) for m in pair("BasicBlock", (3, 3)))
    x = image(2, 64, 16, 16).relu().contiguous(memory_format=LAYOUTS[layout])
    before = x.clone()
    first = assert_agrees(fused, plain, x)
    copied = first.clone()
    second = fused(x)
    assert torch.equal(x, before)
    assert torch.equal(first, copied)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr() != x.data_ptr()


@torch.no_grad()
def test_features_taken_between_stages_stay_whole(pair, image):
    fused, plain = pair("BasicBlock", (2, 2, 2, 1))
    wanted = {name: name for name in ("layer1", "layer2", "layer3")}
    x = image(2, 3, 64, 64)
    exact = IntermediateLayerGetter(copy.deepcopy(plain).double(), wanted)(x.double())
    for _ in range(2):
        mine, theirs = (IntermediateLayerGetter(m, wanted)(x) for m in (fused, plain))
        for name in wanted:
            assert resnet_fast.agreement.compare(mine[name], theirs[name], exact[name], 576).agrees
    assert resnet_fast.report(fused).fused


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@torch.no_grad()
def test_outputs_that_hooks_store_stay_whole(warm, pair, image, assert_agrees):
    fused, plain = pair("BasicBlock", (3, 2))
    x = image(2, 3, 64, 64)
    if warm:
        fused(x)
    stored = []

    def store(_module, inputs, output):
        stored.extend((t, t.clone()) for t in (inputs[0], output))

    for module in (fused.layer1[0], fused.layer1[2], fused.layer1, fused.layer2, fused.maxpool):
        module.register_forward_hook(store)
    fused.layer1[1].conv1.register_forward_pre_hook(lambda m, i: stored.append((i[0], i[0] + 0)))
    for _ in range(2):
        assert_agrees(fused, plain, x)
    assert len(stored) == 2 * 11
    # Torch's own in-place ReLU runs before a hook of a block: nothing may change after it.
    assert all(torch.equal(y, copied) for y, copied in stored)


# ---- NaN and infinities


def poison_input(model, x):
    x[0, 1, 20, 20] = torch.nan


def poison_weight(model, x):
    model.layer2[0].conv2.weight[3, 5, 1, 1] = torch.nan


def poison_running_mean(model, x):
    model.layer1[1].bn1.running_mean[7] = torch.nan


def huge_weights(model, x):
    for conv in (model.layer1[0].conv1, model.layer1[1].conv2, model.layer2[0].conv1):
        conv.weight.mul_(1e18)


def infinite_input(model, x):
    x[1, 0, 3, 3] = torch.inf
    x[0, 2, 9, 9] = -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "poison",
    [poison_input, poison_weight, poison_running_mean, huge_weights, infinite_input],
)
@pytest.mark.parametrize("block", SMALL)
@torch.no_grad()
def test_nan_and_inf_come_out_where_eager_has_them(block, poison, dtype, pair, image):
    fused, plain = (m.to(dtype) for m in pair(*SMALL[block]))
    for warm in (False, True):
        if warm:
            fused(image(2, 3, 48, 48).to(dtype))
        x = image(2, 3, 48, 48).to(dtype)
        for model in (fused, plain):
            if warm and poison not in (poison_input, infinite_input):
                continue  # the weights are poisoned already
            poison(model, x)
        trunks = [
            nn.Sequential(m.conv1, m.bn1, m.relu, m.maxpool, m.layer1) for m in (fused, plain)
        ]
        for mine, theirs in ((fused, plain), trunks):
            mine, theirs = mine(x), theirs(x)
            assert torch.equal(mine.isnan(), theirs.isnan())
            assert torch.equal(mine.isinf(), theirs.isinf())
        everything = fused(x)
        if poison is not huge_weights:
            assert not everything.isfinite().all()


# ---- how the model is called


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes(mode, pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 48, 48)
    with mode():
        for _ in range(2):
            assert_agrees(fused, plain, x)
    assert all_fused(fused)


def test_kept_programs_serve_both_grad_modes(pair, image, assert_agrees):
    fused, plain = pair()
    x = image(2, 3, 48, 48)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            y = assert_agrees(fused, plain, x)
        assert y.is_inference() == (mode is torch.inference_mode)


@torch.no_grad()
def test_autocast(pair, image):
    fused, plain = pair()
    x = image(2, 3, 48, 48)
    exact = copy.deepcopy(plain).double()(x.double())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = fused(x), plain(x)
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert resnet_fast.agreement.compare(mine, theirs, exact).agrees
        assert fused(x).dtype == torch.float32  # and what autocast kept is not used without it
        assert resnet_fast.agreement.compare(fused(x), plain(x), exact, 4608).agrees
    assert all_fused(fused)


def test_a_model_built_under_inference_mode(kind, image, assert_agrees):
    with torch.inference_mode():
        torch.manual_seed(0)
        plain = reference.ResNet(reference.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
        if kind == "ours":
            fused = resnet_fast.models.resnet.ResNet(
                resnet_fast.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10
            ).eval()
            fused.load_state_dict(plain.state_dict())
        else:
            fused = resnet_fast.optimize(plain)
        x = image(2, 3, 48, 48)
        for _ in range(2):
            assert_agrees(fused, plain, x)
        for model in (fused, plain):
            model.layer1[0].conv1.weight[0] += 1  # no version counter tells of this
        assert_agrees(fused, plain, x)
    if kind == "ours":  # `optimize` made a copy that has version counters
        assert all("inference_mode" in r.reason for r in resnet_fast.report(fused))
    else:
        assert all(r.backend == "cpu" for r in resnet_fast.report(fused))


@torch.no_grad()
def test_threads_share_a_model(pair, image):
    fused, _ = pair("BasicBlock", (2, 2))
    inputs = [image(1, 3, 32 + 16 * (i % 2), 48, seed=i) for i in range(6)]
    with resnet_fast.disabled():
        expected = [fused(x) for x in inputs]
    failures = []

    def work(offset: int) -> None:
        with torch.no_grad():
            for i in range(24):
                k = (i * (1 + offset) + offset) % len(inputs)
                if not torch.allclose(fused(inputs[k]), expected[k], rtol=1e-3, atol=1e-3):
                    failures.append(k)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all_fused(fused)


@torch.no_grad()
def test_a_model_that_has_run_can_be_freed(pair, image):
    fused, plain = pair()
    del plain
    for size in (32, 48):
        fused(image(1, 3, size, size))
    watched = [weakref.ref(m) for m in (fused, fused.layer1[0], fused.layer1[0].conv1.weight)]
    del fused
    for _ in range(3):  # what is kept for a module goes after the module, in the next pass
        gc.collect()
    assert [w() for w in watched] == [None, None, None]


@torch.no_grad()
def test_replaced_weights_can_be_freed(pair, image):
    fused, _ = pair()
    for size in (32, 48):
        fused(image(1, 3, size, size))
    watched = weakref.ref(fused.layer1[0].conv1.weight)
    fused.load_state_dict({k: v.clone() for k, v in fused.state_dict().items()}, assign=True)
    fused(image(1, 3, 32, 32))
    gc.collect()
    assert watched() is None


@torch.no_grad()
def test_meta_tensors_give_shapes(pair, image):
    fused, _ = pair()
    fused.to("meta")
    for _ in range(2):
        y = fused(torch.empty(2, 3, 48, 48, device="meta"))
        assert y.shape == (2, 10)
        assert y.is_meta
