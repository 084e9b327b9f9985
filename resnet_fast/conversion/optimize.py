# SPDX-License-Identifier: Apache-2.0
"""optimize(model): the same model, its residual blocks fused; restore(model): as it was."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_fast import agreement, ops
from resnet_fast.conversion.find import owners
from resnet_fast.conversion.forward import Role, convert, revert
from resnet_fast.nn.reasons import disabled
from resnet_fast.nn.recipes import is_sequence
from resnet_fast.nn.run import forget_plans


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

    Finds the blocks and stems of torchvision, timm, transformers, open_clip and torchreid, also as
    backbones of detectors and segmenters, and in any model the sequences of a convolution, its norm
    and perhaps a ReLU. A block of which only parts can be fused is fused in parts. The result has
    the same children and state_dict keys; its weights are live: loading, training and moving it
    go on as before, and a call that cannot be fused (training, hooks, gradients) runs the plain
    forward by itself.

    What is traded for speed, exactly:

    - The class of a converted module is a subclass of the same name that differs in `forward`, or
      in the method that runs its stem.
    - Results agree with the plain model's to rounding, not to the bit.
    - On a CPU each convolution has a packed copy of its weight, and a second or third one if image
      sizes are met for which oneDNN wants another layout; `report` says how large they are.
    - On a CPU a write to some of a convolution's weights that PyTorch does not count (`.data`,
      `.numpy()`) may be seen late: when the layer has made another 8192 output pixels (N * H * W)
      at the latest; `refresh` makes it seen at once, and shared memory is looked at in each call.
    - Replicas that DataParallel makes for several devices run the plain forward.

    Args:
        model: any module; what is not known is left as it is.
        inplace: change `model` itself; by default a deep copy is changed and returned.
        dtype: cast the model; None leaves it.
        memory_format: of its 4-D weights. The GPU kernels read torch.channels_last; a CPU's need
            none: torch.preserve_format there for what refuses channels_last parameters, such as
            torch.optim.LBFGS, parameters_to_vector, fully_shard and the training of torchvision's
            keypoint head.
        example_input: what `verify` runs, [N, C, H, W]; by default random, [2, 3, 224, 224].
        backend: "auto", or one backend's name for all blocks (`resnet-fast check` lists them).
        strict: raise if nothing was found that could ever be fused; otherwise that is a warning.
        verify: run copies from before and after, in evaluation mode, and raise if the fused one is
            less exact than the plain one by more than a factor of two, measured against float64.

    Returns:
        The optimized model. Optimizing it again changes nothing.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown backend.
        RuntimeError: strict, and nothing was found to fuse; or verify, and the outputs disagree.

    Example:
        >>> model = resnet_fast.optimize(torchvision.models.resnet50().eval())
        >>> with torch.inference_mode():
        ...     y = model(torch.randn(1, 3, 224, 224))
        >>> print(resnet_fast.report(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"resnet_fast.optimize: model must be an nn.Module, got {type(model)}")
    ops.check_backend(backend)
    before = _copy(model) if verify else None
    optimized = model if inplace else _copy(model)
    if dtype is not None:
        optimized.to(dtype)
    _set_memory_format(optimized, memory_format)
    found = _convert(optimized, backend)
    if not found:
        message = (
            f"resnet_fast.optimize: nothing to fuse in {type(model).__name__}: no convolution with "
            "a BatchNorm2d behind it in a module whose forward is known; "
            "print(resnet_fast.report(model)) lists what was left and why"
        )
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)  # torch's decorator is between here and the caller
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
    forget_plans(model)
    ops.forget(model.parameters())
    return model


def _convert(model: nn.Module, backend: str) -> int:
    """Convert what can fuse; how many convolutions may now run fused, or could before."""
    asked = backend != ops.AUTO  # else this package's own modules need no conversion
    found = [owner for owner in owners(model) if owner.convs]
    for owner in found:
        if asked or not owner.installed:
            convert(owner.module, replace(owner.role, backend=backend))
    blocks_found = {owner.module for owner in found if owner.recipe.shortcut}
    for module in model.modules():
        if is_sequence(module) and not blocks_found.isdisjoint(module._modules.values()):
            convert(module, Role("stage", backend=backend))
    return len({conv for owner in found for conv in owner.convs})


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
