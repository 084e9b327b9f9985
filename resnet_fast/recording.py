# SPDX-License-Identifier: Apache-2.0
"""What a model asks of the ops on a GPU, which need not be there."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _names, models, ops
from resnet_fast.spec import Spec


class Work(NamedTuple):
    """What is tuned: an op by its name, and what it computes. Choices are kept under it."""

    op: str
    spec: Spec

    def __str__(self) -> str:
        return str(self.spec)


def works(model: str, batches: Iterable[int], dtypes: Iterable[str]) -> Counter[Work]:
    """The ops that a model runs on a GPU and how often each runs; nothing is computed.

    The model is run on fake tensors that say they are a GPU's, and what it asks of the ops is
    written down.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: Counter[Work] = Counter()
    for batch, dtype in itertools.product(batches, map(_names.dtype, dtypes)):
        recorder = _Recorder()
        with FakeTensorMode() as mode, torch.inference_mode(), _default_dtype(dtype):
            network = models.get_model(model).eval()
            x = torch.empty(batch, 3, 224, 224).to(memory_format=torch.channels_last)
            for module in network.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        tensors[name] = tensor if tensor is None else _on_gpu(tensor, mode)
            with recorder:
                network(_on_gpu(x, mode))
        found += recorder.found
    return found


def _on_gpu(tensor: Tensor, mode) -> Tensor:
    """A fake tensor of the same facts on a GPU, which need not be there."""
    from torch._subclasses.fake_tensor import FakeTensor

    facts = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, facts, torch.device("cuda:0"))
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Writes down what is asked of each op."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Work] = Counter()
        self.ops = {overload: op for op in ops.OPS.values() for overload in op.overloads}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        op = self.ops.get(function)
        if op is not None:
            self.found[Work(op.name, op.spec_of(op.Call(*args, **kwargs or {})))] += 1
        return function(*args, **kwargs or {})


class _default_dtype:
    """The dtype that new tensors have, for a while: parameters of a model included."""

    def __init__(self, dtype: str) -> None:
        self.dtype = getattr(torch, dtype)

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_) -> None:
        torch.set_default_dtype(self.before)
