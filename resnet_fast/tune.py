# SPDX-License-Identifier: Apache-2.0
"""`resnet-fast tune`: measure which backend and tile is fastest for each convolution of a model.

    convolutions of the model -> candidates -> checked against the reference -> timed -> chosen

Three things are kept apart so that each can be tested without a GPU: what may run (`candidates`),
how long it takes (a `Timer`), and what follows from that (`choose`). A candidate whose result
disagrees with the float64 reference gets no time at all. The heuristics' own choice is kept unless
another is faster beyond the noise: what cannot be told apart should not depend on the day.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _hardware, _names, agreement, models, ops
from resnet_fast.dispatch import backends, cuda, heuristics, tuning
from resnet_fast.dispatch.problem import Problem
from resnet_fast.spec import ConvSpec, TileConfig

SHORTLIST = 8  # candidates of one backend that are timed: each tile costs a compilation in Triton
WITHIN = 2.0  # times the best estimate: the model is a roofline, not off by more
MARGIN = 0.02  # a gain below this is not worth a departure from the heuristics
MIN_ROUNDS = 11
MAX_ROUNDS = 400
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache; and work that hides the launch of what follows


class Candidate(NamedTuple):
    """A backend, and a tile where it has them."""

    backend: str
    tile: TileConfig | None = None

    def __str__(self) -> str:
        return f"{self.backend} {self.tile}" if self.tile else self.backend


class Tensors(NamedTuple):
    """The operands of one convolution on the device."""

    x: Tensor  # [N, H, W, C]
    weight: Tensor  # [K, R, S, C]
    scale: Tensor  # [K]
    shift: Tensor  # [K]
    residual: Tensor | None  # [N, P, Q, K]
    mean: Tensor | None  # [K]
    var: Tensor | None  # [K]
    eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one candidate over all rounds."""

    median: float
    p20: float
    p80: float


Function = Callable[[], Tensor]
Bind = Callable[[Candidate, Problem, Tensors], Function]
# (functions by candidate, seconds) -> their times, taken in turn
Timer = Callable[[dict[Candidate, Function], float], dict[Candidate, Timing]]


@dataclass(slots=True)
class Result:
    """What was found for one convolution.

    Args:
        spec: the convolution.
        usual: what is chosen without any measurement.
        choices: the fastest of each backend, the one to take first; empty if none was right, or
            if there was nothing to choose from.
        timings: of every candidate that agreed with the reference.
        faults: of every other, why it got no time.
    """

    spec: ConvSpec
    usual: Candidate
    choices: tuple[tuning.Choice, ...] = ()
    timings: dict[Candidate, Timing] = field(default_factory=dict)
    faults: dict[Candidate, str] = field(default_factory=dict)

    def to_rows(self) -> list[dict]:
        """Flat rows, as for a CSV file: one per candidate."""
        first = self.choices[0] if self.choices else None
        chosen = first and Candidate(first.backend, first.tile)
        return [
            {
                "convolution": str(self.spec), "candidate": str(candidate),
                "chosen": candidate == chosen, "usual": candidate == self.usual,
                "median_us": time and time.median, "p20_us": time and time.p20,
                "p80_us": time and time.p80, "fault": self.faults.get(candidate, ""),
            }
            for candidate in dict.fromkeys((*self.timings, *self.faults, self.usual))
            for time in (self.timings.get(candidate),)
        ]  # fmt: skip


# ---- which convolutions


def convolutions(model: str, batches: Iterable[int], dtypes: Iterable[str]) -> Counter[ConvSpec]:
    """The fused convolutions of a model and how often each runs; nothing is computed.

    The model is run on fake tensors, and what its blocks ask of `conv_bn_act` is written down.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: Counter[ConvSpec] = Counter()
    for batch, dtype in itertools.product(batches, map(_names.dtype, dtypes)):
        recorder = _Recorder(dtype)
        with FakeTensorMode(), torch.inference_mode(), _default_dtype(dtype):
            network = models.get_model(model).eval()
            x = torch.empty(batch, 3, 224, 224)
            with recorder:
                network(x)
        found += recorder.specs
    return found


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Writes down every convolution that is asked of the op."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype, self.specs = dtype, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (ops.conv_bn_act_op, ops.conv_bn_act_op_):
            self.specs[_spec_of(ops.Call(*args, **kwargs or {}), self.dtype)] += 1
        return function(*args, **kwargs or {})


def _spec_of(call: ops.Call, dtype: str) -> ConvSpec:
    n, c, h, w = call.x.shape
    k, _, r, s = call.weight.shape
    return ConvSpec(
        n, h, w, c, k, r, s, tuple(call.stride), tuple(call.padding), tuple(call.dilation),
        call.groups, dtype, call.activation, call.residual is not None, call.mean is not None,
        ops.precision(),
    )  # fmt: skip


class _default_dtype:
    """The dtype that new tensors have, for a while: parameters of a model included."""

    def __init__(self, dtype: str) -> None:
        self.dtype = getattr(torch, dtype)

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_) -> None:
        torch.set_default_dtype(self.before)


def problem_of(
    spec: ConvSpec, arch: int, gpu: str = "", hardware: _hardware.Gpu | None = None
) -> Problem:
    """A convolution as the models ask for it on a GPU: channels_last, aligned, one dtype."""
    nhwc, norm = "channels_last", spec.dtype if spec.norm else None
    strides = (spec.h * spec.w * spec.c, spec.w * spec.c, spec.c)
    return Problem(
        spec, "cuda", arch, nhwc, nhwc, nhwc if spec.residual else "", strides, vectors=True,
        vector_dtypes=(spec.dtype, spec.dtype, norm, norm), tracked=True, aligned=True, gpu=gpu,
        hardware=hardware,
    )  # fmt: skip


# ---- which candidates


def modelled(
    spec: ConvSpec, target: heuristics.Target, names: Sequence[str] = ()
) -> dict[Candidate, float]:
    """The candidates for `spec` and the microseconds that the heuristics estimate; no GPU is asked.

    Of each backend the best few: those within twice its best estimate, at most eight.
    """
    found: dict[Candidate, float] = {}
    for name, family in tuning.FAMILIES.items():
        refused = spec.groups != 1 or (name == "cuda" and cuda.spec_refusal(spec))
        if refused or (names and name not in names):
            continue
        rows = [row for row in heuristics.explain(spec, target, family) if row.refusal is None]
        rows.sort(key=lambda row: row.microseconds)
        for row in rows[:SHORTLIST]:
            if row.microseconds <= WITHIN * rows[0].microseconds:
                found[Candidate(name, row.tile)] = row.microseconds
    return found


def candidates(problem: Problem, names: Sequence[str] = ()) -> list[Candidate]:
    """What may run `problem` here and could be chosen for it.

    Beside the backends in `names` (all, if empty) what is chosen without measurements, always: a
    choice is a comparison with it.
    """
    tiled = modelled(problem.spec, problem.target, names)
    found = []
    for row in backends.BACKENDS:
        if names and row.name not in names:
            continue
        if backends.why_not(row, problem) is None:
            tiles = [candidate for candidate in tiled if candidate.backend == row.name]
            found += tiles or [Candidate(row.name)]
    first = usual(problem)
    return found if first in found else [first, *found]


def check(names: Iterable[str], dtypes: Iterable[str]) -> None:
    """Raise ValueError for a dtype that is unknown, or a backend that is, or is never chosen."""
    for dtype in dtypes:
        _names.dtype(dtype)
    for name in names:
        backends.check_name(name)
        row = next((row for row in backends.BACKENDS if row.name == name), None)
        if row is None or row.by_name or row.device == "cpu":
            reason = row.by_name if row and row.by_name else "it does not run on a GPU"
            raise ValueError(f"backend {name!r} cannot be tuned: {reason}")


def usual(problem: Problem) -> Candidate:
    """What is chosen for `problem` without measurements."""
    name, _ = backends.explain(replace(problem, gpu=""))
    family = tuning.FAMILIES.get(name)
    return Candidate(name, family and heuristics.choose(problem.spec, problem.target, family))


# ---- where

clear = tuning.clear


def gpu(name: str) -> torch.device:
    """The GPU of that name.

    Raises:
        ValueError: there is none, or it is no device that kernels here run on.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: {error}") from None
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"nothing can be measured: no NVIDIA GPU that torch can use is at {name!r} "
            "(--dry-run prints the candidates, modelled)"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name!r}: there are {torch.cuda.device_count()} GPUs")
    if _hardware.nearest_architecture(_hardware.capability_of(device)) is None:
        raise ValueError(f"{name_of(device)}: the kernels need compute capability 8.0 or newer")
    return device


def arch_here() -> int | None:
    """Compute capability times ten of the first GPU; None where there is none."""
    return _hardware.capability_of(torch.device("cuda")) if torch.cuda.is_available() else None


def name_of(device: torch.device) -> str:
    """The GPU's name, under which choices are kept."""
    return torch.cuda.get_device_name(device)


def path_of(device: torch.device):
    """The file of the choices for a GPU."""
    return tuning.path_of(name_of(device))


# ---- checking and measuring


def tune(
    specs: Iterable[ConvSpec],
    device: torch.device,
    names: Sequence[str] = (),
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Measure convolutions on a GPU, and keep each one's choice as soon as it is made.

    Args:
        specs: what to measure, for example the keys of `convolutions`.
        device: the GPU.
        names: backends to measure; all if empty.
        seconds: of timing for each convolution, compilation and checks apart.
        progress: told what is being done.

    Yields:
        a `Result` per spec. Whoever stops early has lost none of those before.
    """
    name, hardware = name_of(device), _hardware.gpu_of(device)
    timer = EventTimer(device)
    for spec in specs:
        problem = problem_of(spec, hardware.capability, name, hardware)
        found = candidates(problem, names)
        if len(found) == 1:
            yield Result(spec, found[0])
            continue
        tensors = operands(spec, device)
        result = measure(problem, tensors, found, timer=timer, seconds=seconds, progress=progress)
        if result.choices:
            tuning.store(name, {spec: result.choices})
        yield result


def measure(
    problem: Problem,
    tensors: Tensors,
    found: Sequence[Candidate],
    *,
    timer: Timer,
    seconds: float,
    bind: Bind | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Check each candidate against the reference, time those that agree, and choose.

    Args:
        problem: the convolution.
        tensors: its operands.
        found: the candidates.
        timer: takes the times.
        seconds: for all of them together.
        bind: (candidate, problem, tensors) -> the function to check and to time.
        progress: told what is being done.
    """
    bind = bind or function_of
    result = Result(problem.spec, usual(problem))
    eager, reference = _eager(tensors, problem.spec), _reference(tensors, problem.spec)
    right: dict[Candidate, Function] = {}
    for candidate in found:
        progress(f"checking {candidate}")
        try:
            function = bind(candidate, problem, tensors)
            # What is left in memory for y to be written over is NaN, not an earlier right answer.
            torch.full_like(eager, float("nan"))
            verdict = agreement.compare(function(), eager, reference, problem.spec.k_gemm)
        except Exception as error:  # a kernel that does not compile or launch is no candidate
            result.faults[candidate] = f"{type(error).__name__}: {error}"
            continue
        if verdict.agrees:
            right[candidate] = function
        else:
            result.faults[candidate] = f"wrong: {verdict}"
    if right:
        progress(f"timing {len(right)} candidates")
        result.timings = timer(right, seconds)
        result.choices = choose(result.timings, result.usual)
    return result


def choose(timings: dict[Candidate, Timing], usual: Candidate) -> tuple[tuning.Choice, ...]:
    """The fastest candidate of each backend, and the backend to take first.

    `usual` comes first unless another is faster beyond the noise: at least 2 % at the median, and
    the middle 60 % of the two do not overlap.
    """
    best: dict[str, Candidate] = {}
    for candidate in sorted(timings, key=lambda c: timings[c].median):
        best.setdefault(candidate.backend, candidate)
    if usual in timings:
        ours = best[usual.backend]
        if not _beats(timings[ours], timings[usual]):
            best[usual.backend] = usual
    order = sorted(best.values(), key=lambda c: timings[c].median)
    if usual.backend in best:
        kept = best[usual.backend]
        if not _beats(timings[order[0]], timings[kept]):
            order.remove(kept)
            order.insert(0, kept)
    return tuple(tuning.Choice(*c, timings[c].median) for c in order)


def _beats(one: Timing, other: Timing) -> bool:
    return one.p80 < other.p20 and one.median < (1 - MARGIN) * other.median


def operands(spec: ConvSpec, device: torch.device) -> Tensors:
    """Random operands, dense and channels_last, with BatchNorm's vectors in the model's dtype."""
    dtype = getattr(torch, spec.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def nhwc(*shape: int) -> Tensor:
        return normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    weight = (2 / spec.k_gemm) ** 0.5 * nhwc(spec.k, spec.c // spec.groups, spec.r, spec.s)
    residual = nhwc(spec.n, spec.k, spec.p, spec.q) if spec.residual else None
    vectors = [normal(spec.k).abs() + 0.5, normal(spec.k)]
    vectors += [normal(spec.k), normal(spec.k).abs() + 0.5] if spec.norm else []
    scale, shift, mean, var = [v.to(dtype) for v in vectors] + [None] * (4 - len(vectors))
    x = nhwc(spec.n, spec.c, spec.h, spec.w)
    return Tensors(x, weight, scale, shift, residual, mean, var)


def function_of(candidate: Candidate, problem: Problem, tensors: Tensors) -> Function:
    """A call of one candidate."""
    row = next(row for row in backends.BACKENDS if row.name == candidate.backend)
    x, weight, scale, shift, residual, mean, var, eps = tensors
    launch = row.build(problem, candidate.tile)(weight, scale, shift, mean, var, eps)
    return lambda: launch(x, residual)


def _reference(tensors: Tensors, spec: ConvSpec) -> Tensor:
    return _eager(Tensors(*(t.double() if isinstance(t, Tensor) else t for t in tensors)), spec)


def _eager(tensors: Tensors, spec: ConvSpec) -> Tensor:
    x, weight, scale, shift, residual, mean, var, eps = tensors
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups, spec.activation)
    return ops.reference(ops.Call(x, weight, scale, shift, residual, *geometry, mean, var, eps))


class EventTimer:
    """A `Timer` of a GPU: CUDA events around each call, the L2 cache flushed before it.

    The candidates take turns, so that drift of clocks and heat meets all alike. The flush keeps the
    GPU busy while Python launches what is timed, so the time between the events is the GPU's own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, functions, seconds: float) -> dict[Candidate, Timing]:
        times: dict[Candidate, list[float]] = {candidate: [] for candidate in functions}
        end = time.perf_counter() + seconds
        with torch.cuda.device(self.device):
            for rounds in itertools.count():
                late = rounds >= MIN_ROUNDS and time.perf_counter() > end
                if late or rounds == MAX_ROUNDS:
                    break
                for candidate, function in functions.items():
                    times[candidate].append(self._microseconds(function))
        return {candidate: summary(found) for candidate, found in times.items()}

    def _microseconds(self, function: Function) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3


def summary(times: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(times, n=5)
    return Timing(statistics.median(times), fifths[0], fifths[3])
