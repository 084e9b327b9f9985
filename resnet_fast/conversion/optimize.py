# SPDX-License-Identifier: Apache-2.0
"""optimize(model): the same model, its residual blocks fused; restore(model): as it was."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_fast import agreement, ops
from resnet_fast.conversion import recipes
from resnet_fast.conversion.forward import Role, convert, revert
from resnet_fast.dispatch import backends
from resnet_fast.nn import blocks
from resnet_fast.nn.fusion import disabled


# Tensors made under inference mode have no version counter, so no packed copy is kept of them.
@torch.inference_mode(False)
def optimize(
    model: nn.Module,
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    example_input: Tensor | None = None,
    backend: str = "auto",
    strict: bool = False,
    verify: bool = False,
) -> nn.Module:
    """Fuse the ResNets in a model: each conv + BatchNorm (+ shortcut) + ReLU becomes one op.

    Finds torchvision's ResNets, also as backbones inside its detection and segmentation models,
    timm's plain ResNets, and this package's own. The result has the same children and state_dict
    keys; its weights are live: loading, training and moving it go on as before, and a call that
    cannot be fused (training, hooks, gradients) runs the plain forward by itself.

    What is traded for speed, exactly:

    - The class of a converted module is a subclass of the same name that differs in `forward`.
    - Results agree with the plain model's to rounding, not to the bit.
    - On a CPU each convolution has a packed copy of its weight, and a second or third one if image
      sizes are met for which oneDNN wants another layout; `report` says how large they are.
    - On a CPU a write to some of a convolution's weights that PyTorch does not count (`.data`,
      `.numpy()`) may be seen late: when the layer has made another 8192 output pixels (N * H * W)
      at the latest; `refresh` makes it seen at once, and shared memory is looked at in each call.
    - Replicas that DataParallel makes for several devices run the plain forward.

    Args:
        model: any module; what is not a known residual block is left as it is.
        inplace: change `model` itself; by default a deep copy is changed and returned.
        dtype: cast the model; None leaves it.
        memory_format: of its 4-D weights. The GPU kernels read torch.channels_last; a CPU's need
            none: torch.preserve_format there for what refuses channels_last parameters, such as
            torch.optim.LBFGS, parameters_to_vector and fully_shard.
        example_input: what `verify` runs, [N, C, H, W]; by default random, [2, 3, 224, 224].
        backend: "auto", or one backend's name for all blocks (`resnet-fast check` lists them).
        strict: raise if nothing was found to fuse.
        verify: run copies from before and after, in evaluation mode, and raise if the fused one is
            less exact than the plain one by more than a factor of two, measured against float64.

    Returns:
        The optimized model. Optimizing it again changes nothing.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown backend.
        RuntimeError: strict, and no residual block of a known class was found; or verify, and the
            outputs disagree.

    Example:
        >>> model = resnet_fast.optimize(torchvision.models.resnet50().eval())
        >>> with torch.inference_mode():
        ...     y = model(torch.randn(1, 3, 224, 224))
        >>> print(resnet_fast.report(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"resnet_fast.optimize: model must be an nn.Module, got {type(model)}")
    backends.check_name(backend)
    before = _copy(model) if verify else None
    optimized = model if inplace else _copy(model)
    if dtype is not None:
        optimized.to(dtype)
    _set_memory_format(optimized, memory_format)
    found = _convert(optimized, backend)
    if strict and not found:
        raise RuntimeError(
            f"resnet_fast.optimize: no residual block of a known class in {type(model).__name__}; "
            f"known are {', '.join('.'.join(key) for key in recipes.BLOCKS)}"
        )
    if verify:
        _verify(before.eval(), _copy(optimized).eval(), dtype, example_input)
    return optimized


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize` in place: every module gets its class's forward back.

    Args:
        model: an optimized model, or any other.

    Returns:
        The same model. Its memory format and dtype stay as `optimize` left them.

    Example:
        >>> resnet_fast.restore(model)
    """
    for module in model.modules():
        revert(module)
    return refresh(model)


def refresh(model: nn.Module) -> nn.Module:
    """Forget what was packed of the model's weights: the next forward packs them again.

    Needed only on a CPU, after a write to some of a convolution's weights that PyTorch does not
    count (`.data`, `.numpy()`), for it to be seen at once; see `optimize`.

    Args:
        model: any module.

    Returns:
        The same model.

    Example:
        >>> model.conv1.weight.data[0, 0, 0, 0] = 0.5
        >>> resnet_fast.refresh(model)
    """
    blocks.forget_programs(model)
    ops.forget(model.parameters())
    return model


def _convert(model: nn.Module, backend: str) -> int:
    """Convert what can fuse; the number of residual blocks that fuse, now or already before."""
    found = 0
    asked = backend != backends.AUTO  # else this package's own modules need nothing installed
    for module in model.modules():
        known = blocks.fusable(module)
        recipe = recipes.recipe_for(module) or (asked and known and known.recipe)
        if recipe:
            convert(module, Role("block", recipe, backend))
        if recipes.is_torchvision_resnet(module) or (asked and recipes.is_own_resnet(module)):
            convert(module, Role("model", backend=backend))
        found += blocks.fusable(module) is not None
    for module in model.modules():
        if type(module) is nn.Sequential and any(map(blocks.fusable, module)):
            convert(module, Role("stage", backend=backend))
    return found


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy in the same modes: a graph module's is in training, whatever the module was."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"resnet_fast.optimize: {type(model).__name__} cannot be copied ({error}); pass "
            "inplace=True to change the model itself"
        ) from error
    before, after = dict(model.named_modules()), dict(copied.named_modules())
    if before.keys() != after.keys():
        raise RuntimeError(
            f"resnet_fast.optimize: a copy of {type(model).__name__} has other modules than the "
            "model; pass inplace=True to change the model itself"
        )
    if copied.training != model.training:
        copied.train(model.training)  # a feature extractor has a graph for each mode
    for name, module in before.items():
        after[name].training = module.training
    return copied


def _set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """As `model.to(memory_format=...)`, which refuses models that have 5-D weights as well."""
    if memory_format is torch.preserve_format:
        return
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.dim() == 4 and not tensor.is_contiguous(memory_format=memory_format):
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


@torch.inference_mode()
def _verify(before: nn.Module, after: nn.Module, dtype, example: Tensor | None) -> None:
    first = next(after.parameters(), torch.empty(0))
    given = example is not None
    if not given:
        example = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    example = example.to(first.device)
    try:
        exact = _outputs(_copy(before).double(), example.double())
    except RuntimeError as error:
        if given:
            raise
        raise RuntimeError(
            "resnet_fast.optimize: verify ran the model on random images of shape "
            f"{list(example.shape)}, which it does not take; pass example_input ({error})"
        ) from error
    with disabled():
        plain = _outputs(before.to(dtype) if dtype else before, example.to(first.dtype))
    fused = _outputs(after, example.to(first.dtype))
    k_gemm = max((p[0].numel() for p in after.parameters() if p.dim() == 4), default=1)
    for ours, theirs, reference in zip(fused, plain, exact, strict=True):
        if ours.is_floating_point():
            verdict = agreement.compare(ours, theirs, reference, k_gemm)
            if not verdict.agrees:
                raise RuntimeError(f"resnet_fast.optimize: verify failed: {verdict}")


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
