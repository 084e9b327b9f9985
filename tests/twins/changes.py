# SPDX-License-Identifier: Apache-2.0
"""What people do to a model between two calls: (model, generator) -> the model to go on with.

Each is made to a fused model and to its twin with generators of one seed, so whatever is drawn is
drawn alike. One that raises must raise for both. None returned means the same model.
"""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast


def _pick(items, generator):
    items = list(items)
    return items[torch.randint(len(items), (), generator=generator).item()]


def _modules(model, *kinds):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]


def _conv(model, generator) -> nn.Conv2d:
    return _pick(_modules(model, nn.Conv2d), generator)[1]


def _norm(model, generator) -> nn.Module:
    return _pick(_modules(model, nn.BatchNorm2d), generator)[1]


def _any_module(model, generator) -> nn.Module:
    return _pick(model.modules(), generator)


def _blocks(model):
    return [m for m in model.modules() if hasattr(m, "conv2") and hasattr(m, "downsample")]


def _like(tensor, generator):
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype) / 8


# ---- values


def clip_by_data(model, generator):
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data.clamp_(-0.05, 0.05)


def zero_a_filter_by_data(model, generator):
    weight = _conv(model, generator).weight
    weight.data[torch.randint(len(weight), (), generator=generator)] = 0


def scale_a_channel_by_data(model, generator):
    weight = _conv(model, generator).weight
    weight.data[:, torch.randint(weight.shape[1], (), generator=generator)] *= 3


def mask_by_data(model, generator):
    for parameter in model.parameters():
        kept = torch.rand(parameter.shape, generator=generator) > 0.01
        parameter.data.mul_(kept)


def one_element_by_data(model, generator):
    weight = _conv(model, generator).weight
    flat = weight.data.permute(0, 2, 3, 1).reshape(-1)  # a view where it is channels_last
    index = torch.randint(flat.numel(), (), generator=generator).item()
    weight.data[tuple(torch.unravel_index(torch.tensor(index), weight.shape))] += 0.5


def filter_by_numpy(model, generator):
    weight = _conv(model, generator).weight
    weight.detach().numpy()[len(weight) // 2] *= -2


def filter_by_a_view(model, generator):
    weight = _conv(model, generator).weight
    torch.from_dlpack(weight.detach())[len(weight) // 3] += 0.25


def write_a_weight(model, generator):
    weight = _conv(model, generator).weight
    weight.copy_(_like(weight, generator))


def write_under_inference_mode(model, generator):
    with torch.inference_mode():
        _conv(model, generator).weight.mul_(1.5)


def write_statistics(model, generator):
    norm = _norm(model, generator)
    norm.running_mean.data[0] += 1
    norm.running_var.data[-1] *= 4


def write_an_affine(model, generator):
    norm = _norm(model, generator)
    norm.weight.data[0] = -1
    norm.bias.data[-1] += 1


def optimizer_step(model, generator):
    kind = _pick((torch.optim.SGD, torch.optim.AdamW), generator)
    size = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    dtype = next(model.parameters()).dtype
    x = torch.randn(2, size, 33, 33, generator=generator).to(dtype)
    optimizer = kind(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        y = model(x)
        y.float().square().mean().backward()
    if kind is torch.optim.AdamW:  # a rounding may turn the sign of a small gradient
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def average(model, generator):
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(0.9).add_(_like(tensor, generator).abs(), alpha=0.1)


def _state(model, generator):
    return {
        name: t * (0.8 + 0.4 * torch.rand(t.shape, generator=generator)).to(t.dtype)
        if t.is_floating_point()
        else t.clone()
        for name, t in model.state_dict().items()
    }


def load(model, generator):
    model.load_state_dict(_state(model, generator))


def load_by_assignment(model, generator):
    model.load_state_dict(_state(model, generator), assign=True)


def load_made_under_inference_mode(model, generator):
    with torch.inference_mode():
        state = _state(model, generator)
    model.load_state_dict(state, assign=True)


# ---- tensors and storages


def new_data(model, generator):
    weight = _conv(model, generator).weight
    weight.data = _like(weight, generator)


def new_parameter(model, generator):
    conv = _conv(model, generator)
    if prune.is_pruned(conv):  # its hook would assign a tensor where a parameter now is
        prune.remove(conv, "weight")
    conv.weight = nn.Parameter(_like(conv.weight, generator))


def new_storage(model, generator):
    weight = _conv(model, generator).weight
    weight.set_(_like(weight, generator))


def swap_a_tensor(model, generator):
    weight = _conv(model, generator).weight
    torch.utils.swap_tensors(weight, nn.Parameter(_like(weight, generator)))


def swap_two_data(model, generator):
    a, b = _conv(model, generator).weight, _conv(model, generator).weight
    if a.shape == b.shape:
        a.data, b.data = b.data, a.data


def tie_two_weights(model, generator):
    a, b = _conv(model, generator), _conv(model, generator)
    if a.weight.shape == b.weight.shape:
        a.weight = b.weight


def share_memory(model, generator):
    model.share_memory()


# ---- modules


def new_conv(model, generator):
    conv = _conv(model, generator)
    other = copy.deepcopy(conv)
    other.weight = nn.Parameter(_like(conv.weight, generator))
    _replace(model, conv, other)


def conv_with_bias(model, generator):
    conv = _conv(model, generator)
    conv.bias = nn.Parameter(_like(conv.weight[:, 0, 0, 0], generator))


def group_norm(model, generator):
    norm = _norm(model, generator)
    _replace(model, norm, nn.GroupNorm(4, norm.num_features).to(norm.weight.dtype))


def frozen_norm(model, generator):
    norm = _norm(model, generator)
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if "num" not in k})
    _replace(model, norm, frozen.to(norm.weight.dtype))


def folded_norm(model, generator):
    block = _pick(_blocks(model), generator)
    if isinstance(block.bn1, nn.BatchNorm2d):
        block.conv1 = fusion.fuse_conv_bn_eval(block.conv1.eval(), block.bn1.eval())
        block.bn1 = nn.Identity()


def other_activation(model, generator):
    relu = _pick(_modules(model, nn.ReLU), generator)[1]
    kind = _pick((nn.LeakyReLU, nn.Identity, nn.Hardswish, nn.ReLU6), generator)
    _replace(model, relu, kind())


def swap_blocks(model, generator):
    for stage in (m for m in model.modules() if type(m) is nn.Sequential and len(m) > 2):
        stage[0], stage[1] = stage[1], stage[0]


def drop_a_block(model, generator):
    _replace(model, _pick(_blocks(model), generator), nn.Identity())


def own_forward(model, generator):
    block = _pick(_blocks(model), generator)
    block.forward = _Twice(block.conv2)  # other channels than the next one takes, or not


class _Twice:
    def __init__(self, conv):
        self.conv = conv

    def __call__(self, x):
        return x * 2


def _replace(model, old, new):
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


# ---- switches


def training(model, generator):
    model.train()


def evaluation(model, generator):
    model.eval()


def one_norm_trains(model, generator):
    _norm(model, generator).train()


def other_eps(model, generator):
    _norm(model, generator).eps = 0.3


def no_statistics(model, generator):
    norm = _norm(model, generator)
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


def reset(model, generator):
    _norm(model, generator).reset_parameters()


def other_stride(model, generator):
    conv = _conv(model, generator)
    conv.stride = (1, 1) if conv.stride == (2, 2) else (2, 2)


def other_padding(model, generator):
    conv = _conv(model, generator)
    if conv.kernel_size == (3, 3):
        conv.dilation = conv.padding = (2, 2)


def circular_padding(model, generator):
    conv = _conv(model, generator)
    other = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups, bias=False, padding_mode="circular",
    )  # fmt: skip
    other.weight = conv.weight
    _replace(model, conv, other)


def freeze(model, generator):
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def thaw(model, generator):
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def half(model, generator):
    model.half()


def bfloat16(model, generator):
    model.bfloat16()


def double(model, generator):
    model.double()


def single(model, generator):
    model.float()


def contiguous(model, generator):
    model.to(memory_format=torch.contiguous_format)


def channels_last(model, generator):
    model.to(memory_format=torch.channels_last)


# ---- hooks and parametrizations


def _scale_output(module, inputs, output):
    return output * 1.25


def _scale_input(module, inputs):
    return (inputs[0] * 0.75, *inputs[1:])


def _leave(module, *_):
    return None


def hook(model, generator):
    _any_module(model, generator).register_forward_hook(_scale_output)


def pre_hook(model, generator):
    _any_module(model, generator).register_forward_pre_hook(_scale_input)


def backward_hook(model, generator):
    _any_module(model, generator).register_full_backward_hook(_leave)


def no_hooks(model, generator):
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(model, generator):
    parametrize.register_parametrization(_conv(model, generator), "weight", Halved())


def weight_norm(model, generator):
    parametrizations.weight_norm(_conv(model, generator))


def unparametrized(model, generator):
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)


def pruned(model, generator):
    prune.l1_unstructured(_conv(model, generator), "weight", 0.3)


def unpruned(model, generator):
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and prune.is_pruned(module):
            prune.remove(module, "weight")


# ---- copies


def deep_copy(model, generator):
    return copy.deepcopy(model)


def shallow_copy(model, generator):
    """A copy with children of its own, of which one is another; the first is used no more."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    name = list(other._modules)[-1]
    child = copy.deepcopy(other._modules[name])
    for parameter in child.parameters():
        parameter.data.mul_(0.5)
    other._modules[name] = child
    return other


def pickled(model, generator):
    return pickle.loads(pickle.dumps(model))


def saved(model, generator):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def refreshed(model, generator):
    return resnet_fast.refresh(model)


CHANGES = {
    name: change
    for name, change in list(globals().items())
    if getattr(change, "__module__", "") == __name__
    and not isinstance(change, type)
    and not name.startswith("_")
}
# Writes to some of a convolution's weights that PyTorch does not count: a CPU's packed copy may
# stand for another `PIXELS_PER_SUM` output pixels, as `optimize` says.
UNCOUNTED = {
    clip_by_data,
    zero_a_filter_by_data,
    scale_a_channel_by_data,
    mask_by_data,
    one_element_by_data,
    filter_by_numpy,
    filter_by_a_view,
    swap_two_data,
}
