# SPDX-License-Identifier: Apache-2.0
"""What `optimize`, `report`, `restore` and `disabled` promise."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import MethodType

import pytest
import torch
import torchvision.models.resnet as reference
from torch import nn

import resnet_fast
import resnet_fast.models.resnet as ours
from resnet_fast.conversion.forward import is_converted
from resnet_fast.kernels import cpu, packed
from tests.conversion.checks import close, is_fused, run
from tests.support.here import cpu_refusal


@pytest.fixture
def model(plain):
    return plain


def test_returns_a_fused_copy_and_leaves_the_original_alone(model, x):
    expected = run(model, x)
    before = copy.deepcopy(model.state_dict())
    strides = [p.stride() for p in model.parameters()]
    optimized = resnet_fast.optimize(model)
    assert optimized is not model
    assert type(model) is reference.ResNet
    assert isinstance(optimized, reference.ResNet)
    assert repr(optimized) == repr(model)
    assert list(optimized.state_dict()) == list(before)
    assert [n for n, _ in optimized.named_modules()] == [n for n, _ in model.named_modules()]
    close(run(optimized, x), expected)
    assert is_fused(optimized)
    assert not any(map(is_converted, model.modules()))
    assert [p.stride() for p in model.parameters()] == strides
    assert torch.equal(run(model, x), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    optimized.load_state_dict(before)
    for tensor in model.state_dict().values():
        tensor.zero_()
    close(run(optimized, x), expected)


def test_inplace(model, x):
    expected = run(model, x)
    weight = model.conv1.weight
    assert resnet_fast.optimize(model, inplace=True) is model
    assert model.conv1.weight is weight  # an optimizer made before still holds it
    close(run(model, x), expected)
    assert is_fused(model)


def test_idempotent(model, x):
    once = resnet_fast.optimize(model)
    types = [type(m) for m in once.modules()]
    twice = resnet_fast.optimize(once, inplace=True, strict=True)
    assert [type(m) for m in twice.modules()] == types
    close(run(twice, x), run(model, x))
    resnet_fast.restore(twice)
    assert [type(m) for m in twice.modules()] == [type(m) for m in model.modules()]


NOTHING = [
    pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), id="no-norm"),
    pytest.param(lambda: nn.Identity(), id="no-parameters"),
    pytest.param(lambda: reference.resnet18(norm_layer=group_norm), id="group-norm"),
]


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


@pytest.mark.parametrize("other", NOTHING)
def test_finding_nothing_is_said(other):
    module = other()
    with pytest.raises(RuntimeError, match=r"nothing to fuse in \w+: .*resnet_fast\.report"):
        resnet_fast.optimize(module, strict=True)
    with pytest.warns(UserWarning, match=r"nothing to fuse in \w+") as caught:
        optimized = resnet_fast.optimize(module)
    assert [w.filename for w in caught] == [__file__]  # it points to the caller
    assert not any("forward" in m.__dict__ for m in optimized.modules())
    rows = resnet_fast.report(optimized)
    assert rows.fused == 0
    assert all(row.reason for row in rows)
    if not rows:
        assert "nothing in this model looks as if it could be fused" in str(rows)


def test_what_can_fuse_later_is_something(model):
    assert resnet_fast.optimize(model.train(), strict=True)  # in evaluation it will


@pytest.mark.parametrize("bad", [None, "resnet18", torch.zeros(1), reference.ResNet], ids=repr)
def test_type_error(bad):
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        resnet_fast.optimize(bad)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_unknown_backend_changes_nothing(inplace, model):
    with pytest.raises(ValueError, match=r"unknown backend 'warp'.*aten"):
        resnet_fast.optimize(model, backend="warp", dtype=torch.bfloat16, inplace=inplace)
    assert model.conv1.weight.dtype == torch.float32
    assert not any(map(is_converted, model.modules()))


@pytest.mark.parametrize("package", ["torchvision", "resnet_fast"])
def test_backend_is_obeyed(package, model, x):
    if package == "resnet_fast":
        torch.manual_seed(0)
        model = ours.ResNet(ours.BasicBlock, [2, 1, 1, 1], num_classes=10).eval()
    optimized = resnet_fast.optimize(model, backend="aten")
    assert run(optimized, x).shape == (2, 10)
    rows = resnet_fast.report(optimized)
    assert {r.backend for r in rows} == {"aten"}
    assert rows.fused == 0  # its ops ran, step by step
    assert all("aten was asked for, which fuses nothing" in r.reason for r in rows)
    assert all((r.fused_calls, r.plain_calls) == (0, 1) for r in rows)


def test_dtype(model, x):
    optimized = resnet_fast.optimize(model, dtype=torch.bfloat16)
    assert {t.dtype for t in optimized.state_dict().values()} == {torch.bfloat16, torch.int64}
    y = run(optimized, x.bfloat16())
    assert y.dtype == torch.bfloat16
    exact = run(copy.deepcopy(model).double(), x.double())
    eager = run(copy.deepcopy(model).bfloat16(), x.bfloat16())
    assert resnet_fast.agreement.compare(y, eager, exact).agrees
    assert model.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_format(layout, model, x):
    optimized = resnet_fast.optimize(model, memory_format=layout)
    weights = [p for p in optimized.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=layout) for p in weights)
    close(run(optimized, x), run(model, x))


def test_a_video_network_beside_is_left_as_it_is(model, x):
    both = nn.ModuleDict({"image": model, "video": nn.Conv3d(3, 4, 3)})
    optimized = resnet_fast.optimize(both, strict=True)
    close(run(optimized["image"], x), run(model, x))
    assert optimized["video"].weight.is_contiguous()


# ---- verify


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_verify_accepts_a_right_model(dtype, model, x):
    optimized = resnet_fast.optimize(model, verify=True, dtype=dtype, example_input=x)
    assert is_fused(optimized) == (cpu_refusal(dtype or torch.float32) is None)


def test_verify_has_an_example_of_its_own(model):
    assert is_fused(resnet_fast.optimize(model, verify=True, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_verify_leaves_a_model_in_training_as_it_was(inplace, model, x):
    model.train()
    model.layer2.eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    optimized = resnet_fast.optimize(model, verify=True, example_input=x, inplace=inplace)
    assert [m.training for m in optimized.modules()] == modes
    for name, value in optimized.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_verify_catches_a_wrong_kernel(model, x, monkeypatch):
    right = packed.fold

    def wrong(scale, shift, mean, var, eps):
        gain, bias = right(scale, shift, mean, var, eps)
        return gain * 1.01, bias

    monkeypatch.setattr(packed, "fold", wrong)
    with pytest.raises(RuntimeError, match=r"verify failed: error .* exceeds"):
        resnet_fast.optimize(model, verify=True, example_input=x)


def test_verify_catches_a_lost_nan(model, x, monkeypatch):
    monkeypatch.setattr(cpu, "relu_", lambda y: y.nan_to_num_(0.0).relu_())
    x[0, 0, 10, 10] = torch.nan
    with pytest.raises(RuntimeError, match="verify failed"):
        resnet_fast.optimize(model, verify=True, example_input=x)


# ---- restore, report, disabled


def test_restore_gives_the_plain_model_back(model, x):
    optimized = resnet_fast.optimize(model)
    run(optimized, x)
    assert resnet_fast.restore(optimized) is optimized
    assert not any(map(is_converted, optimized.modules()))
    before = [r.fused_calls for r in resnet_fast.report(optimized)]
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert torch.equal(run(optimized, x), run(plain, x))
    rows = resnet_fast.report(optimized)
    assert [r.fused_calls for r in rows] == before
    assert all(not r.fused and "optimize(model)" in r.reason for r in rows)
    close(run(resnet_fast.optimize(optimized), x), run(plain, x))


def test_a_forward_of_the_users_stays(model, x):
    replaced = [model.layer1[0], model.layer2, model.layer3]
    for module in replaced:
        module.forward = MethodType(lambda m, x: type(m).forward(m, x) * 2, module)
    forwards = [m.forward for m in replaced]
    expected = run(model, x)
    optimized = resnet_fast.optimize(model)
    close(run(optimized, x), expected)
    same = resnet_fast.optimize(model, inplace=True)
    close(run(same, x), expected)
    resnet_fast.restore(same)
    assert [m.forward for m in replaced] == forwards


def test_report_before_and_after(model, x):
    names = ["(stem)", "layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
    rows = list(resnet_fast.report(model))
    assert [r.name for r in rows] == names
    assert all(not r.fused and "resnet_fast.optimize(model)" in r.reason for r in rows)
    optimized = resnet_fast.optimize(model)
    report = resnet_fast.report(optimized)
    assert [(r.fused, r.backend, r.fused_calls) for r in report] == [(True, "", 0)] * 6
    assert "not run yet" in str(report)
    for _ in range(3):
        run(optimized, x)
    report = resnet_fast.report(optimized)
    assert [(r.fused, r.backend, r.fused_calls) for r in report] == [(True, "cpu", 3)] * 6
    assert "6 of 6 fused" in str(report)
    report = resnet_fast.report(optimized.train())
    assert report.fused == 6  # it tells of the last run ...
    report = resnet_fast.report(optimized, example_input=x)  # ... and this is one
    assert report.fused == 0
    assert all("training mode" in r.reason and r.plain_calls == 1 for r in report)


def test_report_foretells_what_would_speak_against_it(model):
    optimized = resnet_fast.optimize(model.train())
    assert all("training mode" in r.reason for r in resnet_fast.report(optimized))
    optimized.eval().layer1[0].relu = nn.GELU()
    rows = {r.name: r for r in resnet_fast.report(optimized)}
    assert "GELU" in rows["layer1.0"].reason
    assert rows["layer1.1"].fused


def test_disabled_is_exact_nests_and_ends(model, x):
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)
    optimized = resnet_fast.optimize(model)
    run(optimized, x)
    with resnet_fast.disabled():
        with resnet_fast.disabled():
            assert torch.equal(run(optimized, x), run(plain, x))
        assert torch.equal(run(optimized, x), run(plain, x))
        assert all("disabled()" in r.reason for r in resnet_fast.report(optimized))
    with pytest.raises(KeyError), resnet_fast.disabled():
        raise KeyError
    run(optimized, x)
    assert is_fused(optimized)


SCRIPT = """
import torch, torchvision, resnet_fast
model = resnet_fast.optimize(torchvision.models.resnet18(num_classes=4).eval())
with torch.inference_mode():
    model(torch.zeros(1, 3, 32, 32))
report = resnet_fast.report(model)
print(report.fused, len(report), report.rows[0].reason)
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", "0 9 RESNET_FAST_DISABLE is set"), ("0", "9 9"), ("", "9 9")],
)
def test_environment(value, expected):
    environment = {**os.environ, "RESNET_FAST_DISABLE": value}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@torch.inference_mode()
def test_report_tells_what_the_packed_copies_take(model, x):
    optimized = resnet_fast.optimize(model)
    assert "packed" not in str(resnet_fast.report(optimized))
    optimized(x)
    convs = [m.weight for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    told = resnet_fast.report(optimized)
    assert told.packed_bytes >= sum(weight.nbytes for weight in convs)  # padded, never smaller
    assert f"packed copies of weights: {told.packed_bytes / 2**20:.1f} MiB" in str(told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_fused_means_that_a_fused_kernel_ran(dtype, model, x, monkeypatch):
    """An op that no kernel of this machine takes runs step by step, which is told before too."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    optimized = resnet_fast.optimize(model, dtype=dtype)
    reason = "no float64 convolution" if dtype == torch.float64 else "no float16 instructions"
    for ran in (False, True):
        rows = resnet_fast.report(optimized)
        assert rows.fused == 0
        assert all(reason in row.reason for row in rows), str(rows)
        assert [(r.fused_calls, r.plain_calls) for r in rows] == [(0, int(ran))] * 6
        run(optimized, torch.randn(1, 3, 40, 56).to(dtype))
