# SPDX-License-Identifier: Apache-2.0
"""cuda_graph(model, example): a whole forward as one launch, for latency at small batches.

A ResNet-50 is 53 launches and more, each of which the host needs longer for than a GPU for the
layer at batch 1. A CUDA graph records them once and launches them together.

A graph has addresses in it, not values. Therefore
- the input is copied to where the graph reads it, and the output from where the graph writes it;
- weights that change in place (an optimizer's step, load_state_dict, BatchNorm's statistics) are
  picked up by themselves, as the kernels read them live; weights that move and modules that change
  (a stride, an eps, a child) are noticed, and the graph is recorded anew;
- what a graph cannot hold (hooks, gradients, training, autocast, CPU tensors) is a plain call,
  counted with its reason in `report()`; so is what cannot be recorded, which is tried once, or now
  and then where only memory was short.

Source: CUDA C++ Programming Guide, "CUDA Graphs"; PyTorch documentation, "CUDA Graphs".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree

from resnet_fast import _hardware, ops
from resnet_fast.nn import reasons
from resnet_fast.nn.guard import Guard

WARM_UP = 3  # runs before recording: plans are made, kernels compiled, cuDNN's choice settled
MAX_GRAPHS = 8  # each keeps its own activations alive
RETRY = 16  # plain calls after which recording is tried again where memory did not suffice

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRAINING = attrgetter("training")


class Graph(Protocol):
    """A recorded run: `replay` does it again on the same memory."""

    def replay(self) -> None: ...


class CudaCapture:
    """Records on a GPU; a test puts another in its place."""

    device = "cuda"  # of the tensors it takes

    def capture(self, function: Callable[[Tensor], object], x: Tensor) -> tuple[Graph, object]:
        """Run `function(x)` a few times, record it once: the graph, and what it writes to."""
        with torch.cuda.device(x.device):
            # Not on the stream that is current: recording forbids what its first runs may do.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # torch's own stream for this stays on the device that was the first to record. What
            # other threads allocate or pin meanwhile is not recorded, and need not fail.
            stream, mode = torch.cuda.Stream(), "thread_local"
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                out = function(x)
        return graph, out

    def capturing(self) -> bool:
        """Whether someone else is recording already."""
        return torch.cuda.is_current_stream_capturing()


class Recorded(NamedTuple):
    """A graph with its memory."""

    graph: Graph
    x: Tensor  # [N, C, H, W]; the graph reads it
    out: object  # the graph writes it


class Failure(NamedTuple):
    """Why an input could not be recorded, and for how many calls more that is not tried again."""

    reason: str
    calls: float


class GraphedModel(nn.Module):
    """A model whose forward is replayed from a CUDA graph; see `cuda_graph`.

    Args:
        model: in eval mode; kept as the child `model`.
        clone: see `cuda_graph`.
        max_graphs: input shapes that are kept; the one not used for longest goes first.
        capture: records; see `CudaCapture`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        clone: bool = True,
        max_graphs: int = MAX_GRAPHS,
        capture: CudaCapture | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.clone, self.max_graphs = clone, max_graphs
        self._capture = capture or CudaCapture()
        self._failed: dict[tuple, Failure] = {}
        self.replays = self.captures = self.moved = 0
        self.plain: Counter[str] = Counter()
        self.training = model.training
        self.reset()

    def reset(self) -> None:
        """Forget all graphs: after a change that no weight and no module shows."""
        self._graphs: dict[tuple, Recorded] = {}
        self._failed.clear()
        self._modules_seen = list(self.model.modules())
        seen = self._modules_seen
        self._hooks = [getattr(m, name) for m in seen for name in _HOOKS]
        self._guard = Guard(self.model)
        tensors = chain(self.model.parameters(), self.model.buffers())
        self._guard.watch((m for m in seen if m is not self.model), tensors)

    def forward(self, x: Tensor) -> object:
        """The model's output on x: from a graph where one can hold the call."""
        reason = self._refusal(x)
        if reason is not None:
            return self._call_plainly(x, reason)
        if not self._guard.holds(self.model):
            self.moved += bool(self._graphs)
            self.reset()
            reason = self._refusal(x)  # of other modules, perhaps
            if reason is not None:
                return self._call_plainly(x, reason)
        key = (x.shape, x.stride(), x.dtype, x.device, ops.precision())
        failure = self._failed.get(key)
        if failure is not None and failure.calls:
            self._failed[key] = failure._replace(calls=failure.calls - 1)
            return self._call_plainly(x, failure.reason)
        recorded = self._graphs.pop(key, None)
        if recorded is None:
            recorded = self._record(x)
            if isinstance(recorded, Failure):
                self._failed[key] = recorded
                return self._call_plainly(x, recorded.reason)
        self._graphs[key] = recorded  # the last used is the last
        with torch.inference_mode(False), torch.no_grad():
            recorded.x.copy_(x)
        recorded.graph.replay()
        self.replays += 1
        return pytree.tree_map(_clone, recorded.out) if self.clone else recorded.out

    def report(self) -> str:
        """How its calls ran so far."""
        lines = [
            f"{self.replays} calls replayed from {len(self._graphs)} graphs; recorded "
            f"{self.captures} times, {self.moved} times anew because weights had moved or modules "
            "had changed"
        ]
        lines += [f"{count} plain calls: {reason}" for reason, count in self.plain.most_common()]
        return "\n".join(lines)

    def _record(self, x: Tensor) -> Recorded | Failure:
        while len(self._graphs) >= self.max_graphs:
            del self._graphs[next(iter(self._graphs))]
        try:
            # Normal tensors, which later calls may write to inside and outside of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                static = x.detach().clone()
                graph, out = self._capture.capture(self.model, static)
        except RuntimeError as error:
            text = str(error).partition("\n")[0]
            if _hardware.is_out_of_memory(error):  # ending the broken recording has its own error
                return Failure(f"there was no memory to record it: {text}", RETRY)
            return Failure(f"it cannot be recorded: {text}", math.inf)
        self.captures += 1
        return Recorded(graph, static, out)

    def _call_plainly(self, x: Tensor, reason: str) -> object:
        self.plain[reason] += 1
        return self.model(x)

    def _refusal(self, x: Tensor) -> str | None:
        """Why a graph cannot hold this call, or None."""
        reason = reasons.context_refusal(x)
        if reason is not None:
            return reason
        if torch.compiler.is_compiling():
            return "inside torch.compile"
        device = x.device.type
        if device != self._capture.device:
            return f"x is on the {device} device, graphs are for {self._capture.device}"
        if torch.is_grad_enabled():
            return "gradients are enabled; use torch.inference_mode() or no_grad()"
        if torch.is_autocast_enabled(device):
            return "under autocast"
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return "a dispatch or function mode is on"
        if any(map(_TRAINING, self._modules_seen)):
            return "the model, or a part of it, is in training mode"
        if any(self._hooks) or nn_module._has_any_global_hook():
            return "a hook is registered, which a graph would not call"
        return "another graph is being recorded" if self._capture.capturing() else None


def cuda_graph(
    model: nn.Module, example: Tensor | None = None, *, clone: bool = True
) -> GraphedModel:
    """The model as one launch: for latency where the host, not the GPU, sets the pace.

    A graph is recorded for each shape, dtype and layout that comes, at most 8 of them, and anew
    when weights have moved (`.to()`, a new Parameter) or a module has changed (a stride, an eps).
    In-place changes of weights need nothing. Calls that a graph cannot hold run as always, and
    `report()` of the result counts them.

    Args:
        model: any eager model with one [N, C, H, W] input, in eval mode; it is not copied.
        example: an input to record for at once; None records in the first call.
        clone: copy the output out of the graph's memory; without it, the next call writes over
            what this one has returned.

    Returns:
        A `GraphedModel`, called as the model is. Calls must not overlap: they share an input.

    Raises:
        TypeError: model is not a module, or example not a tensor.

    Example:
        >>> fast = resnet_fast.cuda_graph(model.cuda().eval(), x)
        >>> with torch.inference_mode():
        ...     y = fast(x)
        >>> print(fast.report())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"resnet_fast.cuda_graph: model must be an nn.Module, got {type(model)}")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"resnet_fast.cuda_graph: example must be a tensor, got {type(example)}")
    graphed = GraphedModel(model, clone=clone)
    if example is not None:
        with torch.no_grad():
            graphed(example)
    return graphed


def _clone(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
