# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: a packed weight is never stale, is shared, counted, and goes with its weight.

Each way to change a layer is tried twice: through the op, which looks at the tensors anew, and
through a launch that was bound before the change, whose `fresh` must say so.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import ops
from resnet_fast.agreement import error
from resnet_fast.kernels import cpu, packed
from resnet_fast.spec import ConvSpec
from tests.support.here import cpu_backend

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def without_gradient():
    packed.forget()
    with torch.no_grad():
        yield


class Layer(nn.Module):
    """Convolution and BatchNorm, run fused, beside the two modules run by torch."""

    def __init__(self, channels: int = 16, filters: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(filters).eval()
        for tensor in (self.bn.weight, self.bn.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (self.bn.bias, self.bn.running_mean):
            nn.init.normal_(tensor)

    def call(self, x: torch.Tensor) -> ops.Call:
        bn = self.bn
        return ops.Call(
            x, self.conv.weight, bn.weight, bn.bias, padding=(1, 1), activation="none",
            mean=bn.running_mean, var=bn.running_var, eps=bn.eps,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ops.CONV_BN_ACT.overload(*self.call(x))
        assert ops.CONV_BN_ACT.last_plan().backend == cpu_backend(x.dtype), (
            ops.CONV_BN_ACT.last_plan().why_fallback()
        )
        return y

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    def bind(self, x: torch.Tensor):
        call = self.call(x)
        return ops.CONV_BN_ACT.plan_of(call).bind(
            call.weight, call.scale, call.shift, call.mean, call.var, call.eps
        )


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer()


@pytest.fixture
def x():
    return torch.randn(2, 16, 8, 8).contiguous(memory_format=CHANNELS_LAST)


def entry_of(weight) -> packed.PackedWeight:
    (entry,) = packed._entries(weight).values()
    return entry


def close(a, b) -> bool:
    return error(a, b.double()) < 1e-2 if a.dtype.itemsize == 2 else error(a, b.double()) < 1e-5


def train_one_step(layer):
    layer.bn.train()
    layer.bn(torch.randn(8, 32, 5, 5) * 3 + 1)
    layer.bn.eval()


def optimize_one_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with torch.enable_grad():
        layer.plain(torch.randn(2, 16, 8, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def average(layer):
    """An exponential moving average as many write it, on .data."""
    for parameter in layer.parameters():
        parameter.data.mul_(0.9).add_(torch.randn_like(parameter.data), alpha=0.1)


def load(layer):
    layer.load_state_dict(Layer().state_dict())


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.conv.weight.mul_(2)


def through_numpy(layer):
    layer.bn.running_mean.numpy()[5] += 1


CHANGES = {
    "weight-inplace": lambda layer: layer.conv.weight.mul_(1.5),
    "weight-one-element": lambda layer: layer.conv.weight[7, 3, 1, 1].add_(1),
    "weight-under-inference-mode": in_inference_mode,
    "weight-data": lambda layer: layer.conv.weight.data.mul_(1.5),
    "weight-data-copy": lambda layer: layer.conv.weight.data.copy_(torch.randn(32, 16, 3, 3)),
    "moving-average": average,
    "bn-weight-data-one-element": lambda layer: layer.bn.weight.data[31].add_(1),
    "bn-bias-data-one-element": lambda layer: layer.bn.bias.data[0].add_(1),
    "running-mean-data": lambda layer: layer.bn.running_mean.data[5].add_(1),
    "running-mean-numpy": through_numpy,
    "running-var-inplace": lambda layer: layer.bn.running_var[9].mul_(4),
    "reset-running-stats": lambda layer: layer.bn.reset_running_stats(),
    "training-forward": train_one_step,
    "optimizer-step": optimize_one_step,
    "load-state-dict": load,
}
MOVES = {
    "load-assign": lambda layer: layer.load_state_dict(Layer().state_dict(), assign=True),
    "eps": lambda layer: setattr(layer.bn, "eps", 0.7),
    "new-weight": lambda layer: setattr(layer.conv, "weight", Layer().conv.weight),
    "weight-data-replaced": lambda layer: setattr(
        layer.conv.weight, "data", torch.randn(32, 16, 3, 3)
    ),
    "new-buffer": lambda layer: setattr(layer.bn, "running_mean", torch.randn(32)),
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "half-and-back": lambda layer: layer.half().float(),
    "channels-last": lambda layer: layer.to(memory_format=CHANNELS_LAST).conv.weight.data.neg_(),
}


@pytest.mark.parametrize("name", CHANGES | MOVES)
def test_a_changed_layer_gives_the_new_result(name, layer, x):
    before = layer(x)
    assert close(before, layer.plain(x))
    (CHANGES | MOVES)[name](layer)
    x = x.to(layer.conv.weight.dtype)
    after, expected = layer(x), layer.plain(x)
    assert close(after, expected)
    rounded = after.dtype != before.dtype
    assert rounded or not close(before, expected), "the change changed nothing"


@pytest.mark.parametrize("name", CHANGES)
def test_a_launch_bound_before_the_change_is_not_fresh(name, layer, x):
    launch = layer.bind(x)
    assert launch.fresh(layer.conv.weight)
    launch(x, None)
    assert launch.fresh(layer.conv.weight)
    CHANGES[name](layer)
    assert not launch.fresh(layer.conv.weight)
    again = layer.bind(x)
    assert again.fresh(layer.conv.weight)
    assert close(again(x, None), layer.plain(x))


def test_eps_back_and_forth(layer, x):
    for eps in (1e-5, 0.5, 1e-5, 0.0):
        layer.bn.eps = eps
        assert close(layer(x), layer.plain(x))


def test_train_and_eval_in_turn(layer, x):
    for _ in range(3):
        train_one_step(layer)
        assert close(layer(x), layer.plain(x))


def unsampled(weight) -> int:
    """An element of weight that none of the four samples covers."""
    element = weight.element_size()
    last = weight.nbytes - packed.SAMPLE_BYTES
    starts = [last * i // (packed.SAMPLES - 1) for i in range(packed.SAMPLES)]
    covered = {
        byte // element for start in starts for byte in range(start, start + packed.SAMPLE_BYTES)
    }
    return min(set(range(weight.numel())) - covered)


@pytest.mark.parametrize("everything", [True, False], ids=["all", "one"])
def test_forget_is_for_the_data_write_that_leaves_no_trace(everything, layer, x):
    layer(x)
    launch = layer.bind(x)
    weight = layer.conv.weight
    weight.data.view(-1)[unsampled(weight)] = 30.0
    assert not close(layer(x), layer.plain(x)), "seen at once: the documentation is too modest"
    assert launch.fresh(weight)
    packed.forget(None if everything else [weight])
    assert not launch.fresh(weight)
    assert close(layer(x), layer.plain(x))


WRITES_NO_SAMPLE_SEES = {
    "one-element": lambda weight: weight.data.view(-1)[unsampled(weight)].fill_(30.0),
    "one-filter": lambda weight: weight.data[10].zero_(),
    "one-channel": lambda weight: weight.data[:, 5].mul_(3),
    "clamped": lambda weight: weight.data.clamp_(-0.083, 0.083),
    "through-numpy": lambda weight: weight.detach().numpy()[20].fill(0.0),
}


@pytest.mark.parametrize("name", WRITES_NO_SAMPLE_SEES)
def test_a_write_that_no_sample_sees_is_seen_before_many_pixels(name, layer, x):
    """After `PIXELS_PER_SUM` output pixels at the latest; 8 x 8 of 2 images are 128."""
    layer(x)
    launch = layer.bind(x)
    WRITES_NO_SAMPLE_SEES[name](layer.conv.weight)
    calls = -(-packed.PIXELS_PER_SUM // 128)
    assert not all(launch.fresh(layer.conv.weight) for _ in range(calls))
    assert close(layer(x), layer.plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (3, 5, 3, 3), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_sums_see_every_element_wherever_the_weight_begins(offset, shape, dtype):
    memory = torch.randn(200 + offset + torch.Size(shape).numel()).to(dtype)
    weight = memory[offset : offset + torch.Size(shape).numel()].view(shape)
    before = packed._sums(weight)
    for element in range(weight.numel()):
        kept = weight.view(-1)[element].clone()
        weight.view(-1)[element] += 1
        assert not torch.equal(packed._sums(weight), before)
        weight.view(-1)[element] = kept
    memory[-200:] = 0.0
    assert torch.equal(packed._sums(weight), before)


def test_a_write_is_seen_at_once_by_a_large_convolution(layer):
    x = torch.randn(8, 16, 32, 32).contiguous(memory_format=CHANNELS_LAST)
    assert packed.PIXELS_PER_SUM <= 8 * 32 * 32
    layer(x)
    layer.conv.weight.data[10, 3, 1, 1] = 30.0
    assert close(layer(x), layer.plain(x))


def _write_from_another_process(weight):
    weight.data[10, 3, 1, 1] = 30.0


def test_a_shared_weight_is_compared_at_each_call(layer, x):
    layer.share_memory()
    layer(x)
    worker = torch.multiprocessing.get_context("spawn").Process(
        target=_write_from_another_process, args=(layer.conv.weight.detach(),)
    )
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert layer.conv.weight[10, 3, 1, 1] == 30.0
    assert close(layer(x), layer.plain(x))


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("bound", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", ["weight", "scale", "shift", "mean", "var"])
def test_a_storage_that_was_resized_is_an_error(name, bound, size, layer, x):
    if bound:
        layer(x)
    tensor = getattr(layer.call(x), name)
    tensor.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match=r"needs \d+ bytes.*its storage has"):
        layer(x)


def test_weights_may_be_swapped(layer, x):
    """torch.utils.swap_tensors refuses tensors that anything refers to weakly."""
    other = Layer()
    layer(x), other(x)
    torch.utils.swap_tensors(layer.conv.weight, other.conv.weight)
    assert close(layer(x), layer.plain(x))
    assert close(other(x), other.plain(x))


def test_aliases_that_count_their_versions_apart_keep_a_copy_each(layer, x, packs):
    other = Layer()
    other.conv.weight.data = layer.conv.weight.data
    layer.conv.weight.mul_(1.0)
    other.bn.load_state_dict(layer.bn.state_dict())
    for _ in range(3):
        assert close(layer(x), layer.plain(x))
        assert close(other(x), other.plain(x))
    assert len(packs) == 2
    for _ in range(5):  # functional_call with fresh aliases, say
        call = layer.call(x)
        ops.CONV_BN_ACT.overload(*call._replace(weight=call.weight.data))
    assert len(packed._entries(layer.conv.weight)) <= packed.MAX_ALIASES


def test_forget_of_one_weight_leaves_the_others(layer, x):
    other = Layer()
    layer(x), other(x)
    packed.forget([layer.conv.weight, torch.ones(3)])
    assert packed.packed_bytes([layer.conv.weight]) == 0
    assert packed.packed_bytes([other.conv.weight]) > 0


@pytest.fixture
def packs(monkeypatch):
    """The list of all packings since the test began."""
    done = []
    pack = packed.PackedWeight.pack

    def counted(self, *arguments):
        done.append(arguments)
        return pack(self, *arguments)

    monkeypatch.setattr(packed.PackedWeight, "pack", counted)
    return done


def test_nothing_is_packed_twice(layer, x, packs):
    layer(x)
    for _ in range(3):
        layer(x)
        layer(torch.randn_like(x))
        layer.bind(x)
    layer.train().eval()
    layer.bn.running_mean = layer.bn.running_mean.clone()  # moved, with equal values
    layer(x)
    assert len(packs) == 1


def test_two_input_sizes_are_both_right_and_share_what_they_can(layer, x, packs):
    small = torch.randn(1, 16, 5, 3).contiguous(memory_format=CHANNELS_LAST)
    for _ in range(3):
        assert close(layer(x), layer.plain(x))
        assert close(layer(small), layer.plain(small))
    assert len(packs) == 2
    assert packed.packed_bytes([layer.conv.weight]) <= 2 * layer.conv.weight.nbytes


def test_many_input_sizes_do_not_pile_up(layer, monkeypatch):
    monkeypatch.setattr(packed, "MAX_SHAPES", 3)
    for size in range(3, 12):
        x = torch.randn(1, 16, size, size).contiguous(memory_format=CHANNELS_LAST)
        assert close(layer(x), layer.plain(x))
    assert len(entry_of(layer.conv.weight).packed) <= 3


SIZES = [(1, 7), (1, 8), (1, 14), (1, 20), (1, 28), (1, 33), (1, 56), (2, 7), (4, 14), (8, 28)]


@pytest.mark.parametrize(("filters", "channels", "size"), [(64, 64, 3), (64, 256, 1), (512, 64, 1)])
def test_copies_differ_in_their_layout(filters, channels, size):
    """As values: the bytes of oneDNN's description have holes, which differ from call to call."""
    weight = torch.randn(filters, channels, size, size)
    one, zero = torch.ones(filters), torch.zeros(filters)
    for n, h in SIZES:
        x = torch.randn(n, channels, h, h).contiguous(memory_format=CHANNELS_LAST)
        y = ops.conv_bn_act(x, weight, one, zero, padding=size // 2)
        assert close(y, F.relu(F.conv2d(x, weight, padding=size // 2)))
    copies = {id(p): p for p in entry_of(weight).packed.values()}.values()
    described = [torch.ops.mkldnn._get_mkldnn_serialized_md(p).tolist() for p in copies]
    fields = [field_by_field(bytes(d)) for d in described]
    assert len(set(fields)) == len(fields) <= 3


def field_by_field(description: bytes) -> str:
    """oneDNN's memory descriptor with its holes masked, and what lies behind array ends."""
    words = [int.from_bytes(description[i : i + 4], "little") for i in range(0, 620, 4)]
    rank, depth = words[1], words[104]
    assert rank == 4
    holes = {27, 79, 105}
    for first in (2, 28, 52, 80):  # arrays of 12 eight-byte numbers, of which `rank` are used
        holes |= set(range(first + 2 * rank, first + 24))
    for first in (106, 130):
        holes |= set(range(first + 2 * depth, first + 24))
    return str([word for i, word in enumerate(words) if i not in holes])


def test_a_weight_that_two_layers_share(layer, x):
    other = Layer()
    other.conv.weight = layer.conv.weight
    for _ in range(2):
        assert close(layer(x), layer.plain(x))
        assert close(other(x), other.plain(x))


def test_a_weight_beside_two_equal_norms_of_which_one_changes(layer, x):
    """They share a packed weight, and yet each launch must look at its own layer's vectors."""
    other = Layer()
    other.conv.weight = layer.conv.weight
    other.bn.load_state_dict(layer.bn.state_dict())
    first, second = layer.bind(x), other.bind(x)
    train_one_step(layer)
    assert not first.fresh(layer.conv.weight)
    assert second.fresh(layer.conv.weight)
    assert close(layer(x), layer.plain(x))
    assert close(other(x), other.plain(x))


def test_a_weight_with_two_geometries(x):
    weight = torch.randn(8, 16, 3, 3)
    one, zero = torch.ones(8), torch.zeros(8)
    for stride, padding, dilation in ((1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 0, 1)) * 2:
        y = ops.conv_bn_act(x, weight, one, zero, None, stride, padding, dilation)
        assert close(y, F.relu(F.conv2d(x, weight, None, stride, padding, dilation)))


def test_packed_bytes_counts_what_is_kept(layer, x):
    weight = layer.conv.weight
    assert packed.packed_bytes([weight]) == 0
    layer(x)
    assert weight.nbytes <= packed.packed_bytes([weight]) <= 2 * weight.nbytes


def test_a_narrow_weight_has_a_narrow_copy(layer, x, needs_cpu_backend):
    needs_cpu_backend(torch.bfloat16)
    layer(x)
    weight = layer.conv.weight
    layer.bfloat16()(x.bfloat16())
    assert packed.packed_bytes([layer.conv.weight]) <= weight.numel() * 4


def test_the_packed_copy_goes_with_the_weight(x):
    layer = Layer()
    layer(x)
    weight = layer.conv.weight
    (copy,) = entry_of(weight).packed.values()
    gone = weakref.ref(copy)
    gc.disable()
    try:
        del copy, layer, weight
        assert not packed._cache
        assert gone() is None
    finally:
        gc.enable()


def test_a_new_weight_at_an_old_identity_is_packed_anew(x):
    """Weights come and go: an id or an address that is used again must not find old values."""
    one, zero = torch.ones(8), torch.zeros(8)
    for seed in range(20):
        weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(seed))
        y = ops.conv_bn_act(x, weight, one, zero, padding=1)
        assert close(y, F.relu(F.conv2d(x, weight, padding=1)))
        del weight
    assert len(packed._cache) <= 1


def test_a_weight_made_under_inference_mode_is_not_packed(x):
    with torch.inference_mode():
        layer = Layer()
        y = ops.CONV_BN_ACT.overload(*layer.call(x))
        plan = ops.CONV_BN_ACT.last_plan()
        assert close(y, layer.plain(x))
        layer.conv.weight.mul_(2)
        assert close(ops.CONV_BN_ACT.overload(*layer.call(x)), layer.plain(x))
    assert plan.backend == "aten"
    assert "inference_mode" in plan.why_fallback()
    assert not packed._cache


def test_calls_under_inference_mode_pack_an_ordinary_weight(layer, x):
    with torch.inference_mode():
        assert close(layer(x), layer.plain(x))
        x = torch.randn(2, 16, 8, 8).contiguous(memory_format=CHANNELS_LAST)
        assert close(layer(x), layer.plain(x))


def test_small_weights_are_compared_whole(x):
    weight = torch.randn(2, 1, 1, 1)
    x = x[:, :1].contiguous(memory_format=CHANNELS_LAST)
    one, zero = torch.ones(2), torch.zeros(2)
    for _ in range(3):
        y = ops.conv_bn_act(x, weight, one, zero)
        assert close(y, F.relu(F.conv2d(x, weight)))
        weight.data[1] += 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_without_onednn_it_refuses_with_the_reason(dtype, monkeypatch):
    spec = ConvSpec(1, 4, 4, 8, 8, 1, 1, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "enabled is False" in cpu.refusal(spec)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no oneDNN" in cpu.refusal(spec)


def test_float64_is_refused():
    assert "float64" in cpu.refusal(ConvSpec(1, 4, 4, 8, 8, 1, 1, dtype="float64"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cpu_without_the_instructions_is_refused(dtype, monkeypatch):
    name = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)
    assert f"no {dtype} instructions" in cpu.refusal(ConvSpec(1, 4, 4, 8, 8, 1, 1, dtype=dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (7, 8), (8, 7), (9, 5)], ids=str)
def test_the_pool_is_torchs(size, dtype):
    x = torch.randn(2, 5, *size).relu().to(getattr(torch, dtype))
    expected = F.max_pool2d(x, 3, 2, 1)
    y = cpu.max_pool_3x3_2(x.contiguous(memory_format=CHANNELS_LAST))
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=CHANNELS_LAST)
