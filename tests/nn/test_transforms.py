# SPDX-License-Identifier: Apache-2.0
"""torch's tools see in a fused model what they need: a graph, a count, a pickle, the plain modules.

A tool that captures a model is asked on another input than it was shown: nothing may be baked in.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast

OPS = torch.ops.resnet_fast.conv_bn_act.default


def close(mine, theirs):
    scale = float(theirs.abs().max())
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("tool", ["script", "trace"])
@torch.no_grad()
def test_torchscript_holds_the_plain_model(tool, warmed, image):
    fused, plain = warmed
    x = image(3, 3, 33, 47)
    shown = image(2, 3, 40, 40)
    if tool == "trace":
        captured = torch.jit.trace(fused, shown)
    else:
        captured = torch.jit.script(resnet_fast.restore(fused))
    assert not any("resnet_fast" in node.kind() for node in captured.inlined_graph.nodes())
    close(captured(x), plain(x))
    file = io.BytesIO()
    torch.jit.save(captured, file)
    file.seek(0)
    close(torch.jit.load(file)(x), plain(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_compiles_as_one_graph(backend, kind, pair, image):
    torch._dynamo.reset()
    fused, plain = pair("BasicBlock", (1, 1))
    compiled = torch.compile(fused, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 40, 40), (3, 3, 48, 32)):
        x = image(*shape)
        close(compiled(x), plain(x))
    for model in (fused, plain):
        model.layer1[0].bn1.running_mean += 1.0
        model.layer1[0].conv1.weight *= 1.5
    close(compiled(x), plain(x))


@torch.no_grad()
def test_a_compiled_model_sees_disabled(pair, image):
    torch._dynamo.reset()
    fused, plain = pair("BasicBlock", (1, 1))
    graphs = []

    def keep(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(fused, backend=keep, fullgraph=True)
    x = image(2, 3, 40, 40)
    close(compiled(x), plain(x))
    with resnet_fast.disabled():
        close(compiled(x), plain(x))
    close(compiled(x), plain(x))
    close(compiled(x), plain(x))
    assert ["conv_bn_act" in g for g in graphs] == [True, False], "compiled once for each"


@torch.no_grad()
def test_a_compiled_block_is_called(warmed, image):
    torch._dynamo.reset()
    fused, plain = warmed
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    fused.layer1[1].compile(backend=keep)
    fused.layer2.compile(backend=keep)
    x = image(2, 3, 40, 40)
    for _ in range(2):
        close(fused(x), plain(x))
    assert len(graphs) == 2


def test_exports_with_a_dynamic_batch(warmed, image):
    fused, plain = warmed
    for strict in (False, True):
        with torch.no_grad():
            program = torch.export.export(
                fused,
                (image(2, 3, 40, 40),),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                strict=strict,
            )
            assert any(n.target is OPS for n in program.graph.nodes)
            x = image(5, 3, 40, 40)
            close(program.module()(x), plain(x))


@torch.no_grad()
def test_make_fx_bakes_nothing_in(warmed, image):
    fused, plain = warmed
    graph = make_fx(fused)(image(2, 3, 40, 40))
    x = image(2, 3, 40, 40, seed=9)
    close(graph(x), plain(x))


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
@torch.no_grad()
def test_copies_are_fused_and_live_by_themselves(copied, warmed, image):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    other = copied(fused)
    assert type(other) is type(fused)
    for _ in range(2):
        close(other(x), plain(x))
    rows = resnet_fast.report(other)
    assert rows.fused == len(rows) > 0
    assert all(r.fused_calls == 2 for r in rows)
    for tensor in fused.state_dict().values():
        tensor.zero_()
    close(other(x), plain(x))
    other.layer1[0].conv1.weight.mul_(2)
    plain.layer1[0].conv1.weight.mul_(2)
    close(other(x), plain(x))


@torch.no_grad()
def test_functional_call_uses_the_given_tensors(warmed, image):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    for factor in (1.1, 0.7):
        given = {n: p * factor for n, p in plain.named_parameters()}
        close(functional_call(fused, given, (x,)), functional_call(plain, given, (x,)))
    close(fused(x), plain(x))


@torch.no_grad()
def test_vmap_over_an_ensemble(warmed, image):
    fused, plain = warmed
    other, reference = copy.deepcopy(fused), copy.deepcopy(plain)
    for model in (other, reference):
        model.layer1[0].conv1.weight.mul_(1.5)
    state = stack_module_state([fused, other])
    x = image(2, 3, 40, 40)
    y = vmap(lambda p, b: functional_call(fused, (p, b), (x,)))(*state)
    close(y, torch.stack([plain(x), reference(x)]))


def test_torch_func_grad(warmed, image):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    mine, theirs = (torch.func.grad(lambda x, m=m: m(x).square().sum())(x) for m in (fused, plain))
    close(mine, theirs)


@torch.no_grad()
def test_flops_are_counted_as_eagers(warmed, image):
    x = image(2, 3, 40, 40)
    totals = []
    for model in warmed:
        with FlopCounterMode(display=False) as counter:
            model(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@torch.no_grad()
def test_a_profiler_sees_the_ops(warmed, image):
    fused, plain = warmed
    x = image(2, 3, 40, 40)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y = fused(x)
    close(y, plain(x))
    names = [event.key for event in profiler.key_averages()]
    assert "resnet_fast::conv_bn_act" in names


@torch.no_grad()
def test_modes_and_fake_tensors(warmed, image):
    from torch._subclasses import FakeTensorMode

    fused, plain = warmed
    x = image(2, 3, 40, 40)
    with torch.device("cpu"):  # a torch function mode
        close(fused(x), plain(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fused(mode.from_tensor(x)).shape == (2, 10)
    close(fused(x), plain(x))


def test_distributed_data_parallel(warmed, image, tmp_path):
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch has no distributed package")
    fused, plain = warmed
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(fused)
        x = image(4, 3, 40, 40)
        parallel.train()(x).sum().backward()
        plain.train()(x).sum().backward()
        for mine, theirs in zip(parallel.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
        parallel.eval(), plain.eval()
        with torch.no_grad():
            for _ in range(2):
                close(parallel(x), plain(x))
    finally:
        distributed.destroy_process_group()
