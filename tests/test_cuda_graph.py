# SPDX-License-Identifier: Apache-2.0
"""cuda_graph's logic, with a stand-in that records by remembering what to run.

The stand-in does what a graph does to memory: it runs on the input's and output's own storage, and
knows nothing of the call it is replayed in. What it cannot show, and only a GPU can: that a ResNet
is recorded at all, and how much faster it is (the last test here, which needs one).
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.graphs import RETRY, WARM_UP, CudaCapture, GraphedModel, cuda_graph


class Recording:
    """A graph: it runs the function again, reading and writing where it did before."""

    def __init__(self, function, x, out):
        self.function, self.x, self.out = function, x, out
        self.weights = {name: p.data_ptr() for name, p in function.named_parameters()}

    def replay(self):
        now = {name: p.data_ptr() for name, p in self.function.named_parameters()}
        assert now == self.weights, "a graph was replayed whose weights had moved"
        self.out.copy_(self.function(self.x))


class StandIn:
    """A capture that takes CPU tensors."""

    device = "cpu"

    def __init__(self):
        self.captured, self.busy, self.error = [], False, None

    def capture(self, function, x):
        if isinstance(self.error, Exception):
            raise self.error
        if self.error:
            raise RuntimeError(self.error)
        self.captured.append(tuple(x.shape))
        with torch.inference_mode(False), torch.no_grad():
            out = function(x).clone()
        return Recording(function, x, out), out

    def capturing(self):
        return self.busy


@pytest.fixture
def model():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*parts).eval()


@pytest.fixture
def capture():
    return StandIn()


@pytest.fixture
def graphed(model, capture):
    return GraphedModel(model, capture=capture)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def agree(graphed, x=X) -> bool:
    return torch.equal(graphed(x), graphed.model(x))


@torch.inference_mode()
def test_it_is_recorded_once_and_replayed(graphed, capture):
    assert all(agree(graphed, x) for x in (X, X + 1, X * 2))
    assert capture.captured == [(2, 3, 8, 8)] and graphed.replays == 3
    assert "3 calls replayed from 1 graphs" in graphed.report()
    assert "plain" not in graphed.report()


@torch.inference_mode()
def test_each_shape_dtype_and_layout_has_a_graph(graphed, capture):
    nhwc = X.contiguous(memory_format=torch.channels_last)
    for x in (X, X[:1], nhwc, X, nhwc):
        assert agree(graphed, x)
    assert len(capture.captured) == 3 and graphed.captures == 3
    graphed.model.double()
    assert agree(graphed, X.double()) and len(capture.captured) == 4


@torch.inference_mode()
def test_a_strided_slice_is_recorded_with_its_values(graphed):
    wide = torch.randn(2, 6, 8, 16)[:, ::2, :, ::2]
    assert agree(graphed, wide) and agree(graphed, wide * 1)


@torch.inference_mode()
def test_outputs_are_ones_own_unless_asked_otherwise(model, capture):
    own = GraphedModel(model, capture=capture)
    first = own(X)
    kept = first.clone()
    own(X + 1)
    assert torch.equal(first, kept)
    shared = GraphedModel(model, clone=False, capture=capture)
    first = shared(X)
    assert shared(X + 1) is first and torch.equal(first, model(X + 1))


def test_inside_and_outside_of_inference_mode(graphed, capture):
    with torch.inference_mode():
        assert agree(graphed)
    with torch.no_grad():
        assert agree(graphed) and not graphed(X).is_inference()
    with torch.inference_mode():
        assert agree(graphed, X * 3)
    assert len(capture.captured) == 1


@torch.no_grad()
def test_weights_changed_in_place_are_picked_up_without_recording(graphed, capture):
    assert agree(graphed)
    graphed.model[0].weight.mul_(2)
    graphed.model[1].running_mean.add_(1)
    graphed.model.load_state_dict({k: v * 1.5 for k, v in graphed.model.state_dict().items()})
    assert agree(graphed) and len(capture.captured) == 1 and graphed.moved == 0


MOVES = {
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone() + 1),
    "parameter": lambda m: setattr(m[4], "bias", nn.Parameter(torch.ones(5))),
    "buffer": lambda m: setattr(m[1], "running_var", torch.full((4,), 3.0)),
    "module": lambda m: m.__setitem__(2, nn.Tanh()),
    "new-child": lambda m: m.append(nn.Hardtanh(-0.01, 0.01)),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "dilation": lambda m: (setattr(m[0], "dilation", (2, 2)), setattr(m[0], "padding", (1, 1))),
}


@pytest.mark.parametrize("name", MOVES)
@torch.no_grad()
def test_what_moved_or_changed_is_recorded_anew(graphed, capture, name):
    before = graphed(X)
    MOVES[name](graphed.model)
    graphed.model.eval()
    assert agree(graphed) and not torch.equal(graphed(X), before)
    assert len(capture.captured) == 2 and graphed.moved == 1
    assert "1 times anew" in graphed.report()


def refusals(graphed):
    child = graphed.model[0]
    return {
        "gradients": lambda: None,
        "training": child.train,
        "hook": lambda: child.register_forward_hook(lambda *_: None),
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [("gradients", "gradients are enabled"), ("training", "training"), ("hook", "a hook")],
)
def test_what_a_graph_cannot_hold_is_a_plain_call(graphed, capture, name, words):
    with torch.no_grad():
        graphed(X)
    refusals(graphed)[name]()
    with torch.set_grad_enabled(name == "gradients"):
        expected = graphed.model(X)
        assert torch.equal(graphed(X), expected)
    assert graphed.replays == 1 and sum(graphed.plain.values()) == 1
    assert words in graphed.report() and "1 plain calls" in graphed.report()


def test_a_hook_is_called_and_its_removal_noticed(graphed):
    seen = []
    with torch.no_grad():
        graphed(X)
        hook = graphed.model[2].register_forward_pre_hook(lambda *_: seen.append(1))
        graphed(X)
        hook.remove()
        graphed(X)
    assert seen == [1] and graphed.replays == 2


def test_gradients_flow(graphed):
    graphed(X).sum().backward()
    assert graphed.model[0].weight.grad is not None


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
        (resnet_fast.disabled, "disabled"),
    ],
    ids=["autocast", "disabled"],
)
@torch.no_grad()
def test_contexts_that_change_what_runs_are_honoured(graphed, context, words):
    graphed(X)
    with context():
        expected = graphed.model(X)
        assert torch.equal(graphed(X), expected)
    assert words in graphed.report()


@torch.no_grad()
def test_another_recording_is_not_disturbed(graphed, capture):
    capture.busy = True
    assert agree(graphed) and "another graph" in graphed.report() and not capture.captured


@torch.no_grad()
def test_what_cannot_be_recorded_runs_plainly_and_is_not_tried_again(graphed, capture):
    capture.error = "operation not permitted when stream is capturing\nmore"
    assert agree(graphed)
    capture.error = None
    assert agree(graphed) and not capture.captured and graphed.replays == 0
    assert "2 plain calls: it cannot be recorded: operation not permitted" in graphed.report()
    graphed.reset()
    assert agree(graphed) and len(capture.captured) == 1


def ended_badly() -> Exception:
    """As torch.cuda.graph raises it: the recording that memory broke cannot be ended either."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return error


OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "at-the-end": ended_badly(),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
@torch.no_grad()
def test_what_only_memory_kept_from_being_recorded_is_tried_again(graphed, capture, name):
    capture.error = OUT_OF_MEMORY[name]
    assert agree(graphed)
    capture.error = None
    for _ in range(RETRY):
        assert agree(graphed) and not capture.captured  # not in each call: a try is several runs
    assert agree(graphed) and agree(graphed)
    assert len(capture.captured) == 1 and graphed.replays == 2
    assert f"{RETRY + 1} plain calls: there was no memory to record it" in graphed.report()


@torch.no_grad()
def test_the_graph_not_used_for_longest_goes(model, capture):
    graphed = GraphedModel(model, max_graphs=2, capture=capture)
    for n in (1, 2, 1, 3, 1):
        assert agree(graphed, torch.ones(n, 3, 8, 8))
    assert [shape[0] for shape in capture.captured] == [1, 2, 3]
    graphed(torch.ones(2, 3, 8, 8))
    assert len(capture.captured) == 4


class Several(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        y = self.conv(x)
        return {"out": y, "sizes": [y.sum(), 3]}


class Trees(StandIn):
    def capture(self, function, x):
        out = function(x)

        class Graph:
            def replay(self):
                new = function(x)
                out["out"].copy_(new["out"])
                out["sizes"][0].copy_(new["sizes"][0])

        return Graph(), out


@torch.no_grad()
def test_any_tree_of_outputs_is_cloned(model):
    graphed = GraphedModel(Several(model[0]).eval(), capture=Trees())
    first = graphed(X)
    kept = first["out"].clone()
    second = graphed(X + 1)
    assert torch.equal(first["out"], kept) and second["sizes"][1] == 3
    assert torch.equal(second["out"], model[0](X + 1))


@torch.inference_mode()
def test_a_fused_resnet_gives_its_own_answers(capture):
    model = resnet_fast.models.resnet18().eval()
    graphed = GraphedModel(model, capture=capture)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(graphed(x), expected)
    torch.testing.assert_close(graphed(x), expected)
    assert graphed.replays == 2
    assert next(iter(graphed.state_dict())) == "model.conv1.weight"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@torch.no_grad()
def test_on_the_cpu_it_is_the_model(model):
    graphed = cuda_graph(model, X)
    assert torch.equal(graphed(X), model(X))
    assert "2 plain calls: x is on the cpu device, graphs are for cuda" in graphed.report()


@pytest.mark.parametrize("arguments", [("resnet50",), (nn.Identity(), "x")], ids=["model", "x"])
def test_bad_input(arguments):
    with pytest.raises(TypeError, match=r"resnet_fast\.cuda_graph: .* got"):
        cuda_graph(*arguments)


def test_it_is_recorded_on_the_device_of_the_input(monkeypatch):
    """On a stream made there: on another device's the graph would be empty, and say nothing."""
    log, here = [], ["cuda:0"]

    class Stream:
        def __init__(self):
            self.device = here[-1]

        def wait_stream(self, other):
            assert other.device == self.device

    @contextlib.contextmanager
    def device(which):
        here.append(which)
        yield
        here.pop()

    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        log.append((stream.device, capture_error_mode))
        yield

    for name, fake in {
        "device": device, "Stream": Stream, "current_stream": Stream, "graph": graph,
        "CUDAGraph": object, "stream": lambda stream: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    x = SimpleNamespace(device="cuda:1")
    CudaCapture().capture(lambda x: log.append("run"), x)
    # "thread_local": a data loader's thread that pins memory meanwhile is none of its business.
    assert log == ["run"] * WARM_UP + [("cuda:1", "thread_local"), "run"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
@torch.inference_mode()
def test_on_a_gpu_it_is_recorded_and_agrees():
    model = resnet_fast.models.resnet50().eval().cuda().half()
    model.to(memory_format=torch.channels_last)  # which the kernels ask for
    x = torch.randn(1, 3, 224, 224, device="cuda", dtype=torch.float16)
    graphed = cuda_graph(model, x)
    torch.testing.assert_close(graphed(x), model(x))
    model.fc.weight.mul_(2)
    torch.testing.assert_close(graphed(x * 2), model(x * 2))
    assert graphed.captures == 1 and not graphed.plain
