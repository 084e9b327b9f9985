# SPDX-License-Identifier: Apache-2.0
"""An optimized model in the hands of tools that copy, script, export, swap or drop modules.

Each gets from it what it gets from the model before `optimize`, and what came of it runs the
weights that it holds itself.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torchvision
import torchvision.models.resnet as reference
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fast
import resnet_fast.models.resnet as ours
from resnet_fast.kernels import packed
from tests.conversion.checks import close, is_fused, run


@pytest.fixture
def model(plain):
    return resnet_fast.optimize(plain)


# ---- copies


def test_a_shallow_copy_runs_its_own_children(model, x):
    run(model, x)
    copied = copy.copy(model)
    copied._modules = dict(copied._modules)
    copied.fc = nn.Identity()
    assert run(copied, x).shape == (2, 512)
    assert run(model, x).shape == (2, 10)
    assert is_fused(copied)


def test_a_replica_runs_its_own_weights(model, plain, x):
    """DataParallel's own replication, without its devices: replicas with other weights."""
    run(model, x)

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 0.5)
        return replica

    halved = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    close(run(replicate(model), x), run(halved, x))
    close(run(model, x), run(plain, x))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_optimized_and_independent(protocol, model, x):
    copied = pickle.loads(pickle.dumps(model, protocol))
    assert type(copied) is type(model)
    with torch.no_grad():
        copied.fc.weight.zero_()
        copied.fc.bias.zero_()
    assert not run(copied, x).any()
    assert is_fused(copied)
    assert run(model, x).any()


def test_a_subclass_with_a_reduce_of_its_own_keeps_it(x):
    class Reduced(reference.ResNet):
        def __reduce_ex__(self, protocol):
            return dict, ()

    model = resnet_fast.optimize(Reduced(reference.BasicBlock, [1] * 4).eval(), inplace=True)
    assert pickle.loads(pickle.dumps(model)) == {}


def test_who_makes_a_subclass_of_it_can_copy_it(model, x):
    """As torch's fully_shard does with every module that it shards."""
    model.__class__ = type("Sharded", (type(model),), {})
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    close(run(copied, x), run(model, x))
    assert is_fused(copied)


def test_a_feature_extractor_keeps_its_mode_and_its_graphs(plain, x):
    nodes = {"layer2": "a", "layer4": "b"}
    extractor = create_feature_extractor(plain, nodes)
    optimized = resnet_fast.optimize(extractor, verify=True, example_input=x)
    assert {m.training for m in optimized.modules()} == {False}
    for mode in (False, True, False):
        found, expected = (run(copy.copy(m).train(mode), x) for m in (optimized, extractor))
        for name in nodes.values():
            close(found[name], expected[name])


def test_verify_looks_where_nothing_was_found():
    """No block of it can be fused, and what `optimize` did to it all the same is wrong."""

    class TakesOneLayout(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2)

        def forward(self, x):
            return self.conv(x) * (1 if self.conv.weight.is_contiguous() else 2)

    with pytest.raises(RuntimeError, match="verify failed"):
        resnet_fast.optimize(TakesOneLayout(), verify=True)


def test_what_cannot_be_copied_is_refused_with_the_way_out():
    model = reference.ResNet(reference.BasicBlock, [1] * 4)
    model.handle = (step for step in range(3))  # a generator has no copy
    with pytest.raises(RuntimeError, match=r"cannot be copied.*inplace=True"):
        resnet_fast.optimize(model)
    assert resnet_fast.optimize(model, inplace=True) is model


# ---- scripting, exporting


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("build", [reference, ours], ids=["torchvision", "ours"])
def test_an_optimized_model_scripts(build, backend, x):
    torch.manual_seed(0)
    plain = build.ResNet(build.Bottleneck, [1] * 4, num_classes=10).eval()
    optimized = resnet_fast.optimize(plain, backend=backend)
    scripted = torch.jit.script(optimized)
    close(run(scripted, x), run(plain, x))
    run(optimized, x)
    rows = list(resnet_fast.report(optimized))
    if backend == "aten":  # its ops ran, which fuse nothing
        assert all("aten was asked for" in row.reason for row in rows)
    else:
        assert all(row.fused for row in rows), "scripting has changed the model"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_optimized_detector_scripts():
    build = torchvision.models.detection.fasterrcnn_resnet50_fpn
    detector = resnet_fast.optimize(build(weights=None, weights_backbone=None).eval())
    torch.jit.script(detector)
    body = detector.backbone.body
    run(body, torch.randn(1, 3, 64, 64))
    assert resnet_fast.report(body).fused >= 16


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("tool", [torch.jit.script, None], ids=["script", "trace"])
def test_a_scripted_model_is_reported_and_left_alone(tool, plain, x):
    scripted = tool(plain) if tool else torch.jit.trace(plain, x)
    whole = nn.Sequential(scripted)
    for model in (scripted, whole):
        expected = run(model, x)
        close(run(resnet_fast.optimize(model, inplace=True), x), expected)
        rows = list(resnet_fast.report(model))
        assert rows
        assert all("TorchScript" in row.reason and not row.fused for row in rows)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_program_exported_without_gradients_answers_with_them(mode, model, plain, x):
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    with mode():
        y = program.module()(x)
    close(y, run(plain, x))
    assert y.requires_grad == (mode is torch.enable_grad)
    if y.requires_grad:
        y.sum().backward()


def test_a_forward_keeps_its_signature(model, x):
    close(run(lambda x: model(x=x), x), run(model, x))
    with pytest.raises(TypeError):
        model(image=x)
    with pytest.raises(TypeError):
        model(x, x)


# ---- weights that move or go


@pytest.mark.parametrize("swap", [True, False])
def test_weights_may_be_swapped_on_conversion(swap, model, plain, x):
    run(model, x)
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in plain.state_dict().items()}
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for m in (model, plain):
            m.load_state_dict(state)
        close(run(model, x), run(plain, x))
        for m in (model, plain):
            m.double()
        close(run(model, x.double()), run(plain, x.double()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv2.weight", "layer2.0.bn1.bias"])
@pytest.mark.parametrize("buffer", [None, "layer1.0.bn1.running_mean"])
def test_a_freed_storage_is_an_error_as_in_torch(buffer, name, model, plain, x):
    run(model, x)
    for m in (model, plain):
        tensor = m.get_buffer(buffer) if buffer else m.get_parameter(name)
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            run(m, x)


@pytest.mark.parametrize("converted", [True, False], ids=["optimized", "ours"])
def test_a_deleted_model_is_freed_at_once(converted, x):
    packed.forget()
    build = reference if converted else ours
    model = build.ResNet(build.Bottleneck, [1] * 4, num_classes=10).eval()
    model = resnet_fast.optimize(model, inplace=True)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            run(model, x)
        assert packed._cache
        gone = [weakref.ref(module) for module in model.modules()]
        del model
        assert not any(ref() for ref in gone)
        assert not packed._cache
    finally:
        gc.enable()
