# SPDX-License-Identifier: Apache-2.0
"""The suite: cases x providers through the protocol, to rows. `resnet-fast bench` and
`pytest benchmarks` both come here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from resnet_fast.benchmarking import formulas
from resnet_fast.benchmarking.cases import ModelCase, OpCase, torch_dtype
from resnet_fast.benchmarking.plan import (
    QUICK_COMPILED,
    QUICK_SECONDS,
    Request,
    TimeLeft,
    seconds_of,
)
from resnet_fast.benchmarking.providers import OpWork
from resnet_fast.benchmarking.rows import Result, Results
from resnet_fast.measuring import clock as clocks
from resnet_fast.measuring import photographs, protocol
from resnet_fast.measuring.machine import Environment, clocks_of, environment
from resnet_fast.measuring.memory import check_memory
from resnet_fast.measuring.peers import ModelWork, Provider, searching
from resnet_fast.measuring.progress import Progress
from resnet_fast.measuring.protocol import Case, Outcome
from resnet_fast.measuring.steadiness import Timing
from resnet_fast.measuring.twins import build_pair
from resnet_fast.profiling.layers import layers_of
from resnet_fast.profiling.roofline import Roofline, roofline_of
from resnet_fast.spec import ELEMENT_SIZE

CHECKED = 8  # images of a batch that are held against float64
MAX_SETS = 256  # of inputs, to rotate through
SETS_BYTES = 256 << 20
ROOF_TOLERANCE = 1.05

Told = Callable[[str], None]


def run(
    request: Request,
    *,
    progress: Progress = lambda text, share: None,
    keep: Callable[[Results], object] = lambda results: None,
) -> Results:
    """Measure all that is asked; Ctrl-C ends it early and keeps what was measured.

    Args:
        request: see there.
        progress: told what is being done, and which share of the cases is done.
        keep: called with the results after each case, so that a crash loses one case at most.
    """
    start = time.perf_counter()
    results = Results()
    clock = clocks.clock_of(request.place)
    began = clock.now()
    facts = environment(request.place)
    left = TimeLeft(request, clock.now)
    asked = {suite: request.cases(suite) for suite in filter(request.asks, request.suites)}
    total, done = sum(map(len, asked.values())), 0
    try:
        for suite, listed in asked.items():
            deadline = began + QUICK_SECONDS[suite] if request.quick else math.inf
            for number, case in enumerate(listed, 1):
                text = f"{suite} {number}/{len(listed)}, {left.said()}: {case}"
                tell = partial(_tell, progress, done / total, text)
                end = _share(listed[number - 1 :], request, clock.now(), deadline)
                found, left_out, interrupted = measure_case(case, request, clock, facts, end, tell)
                left.done(case)
                results.rows += found
                results.left_out |= {f"{suite}: {name}": why for name, why in left_out.items()}
                if interrupted:
                    raise KeyboardInterrupt
                keep(results)
                done += 1
    except KeyboardInterrupt:
        results.complete = False
    roofs = roofs_of(results.rows, request.place, lambda text: progress(text, 1))
    results.rows = with_shares(results.rows, roofs)
    results.seconds = time.perf_counter() - start
    return results


def _share(listed: list, request: Request, now: float, deadline: float) -> float:
    """When the first of the cases left has to end, so that each has its part of the time."""
    if deadline == math.inf or now > deadline:
        return deadline
    seconds = [seconds_of(case, request) for case in listed]
    return now + (deadline - now) * seconds[0] / sum(seconds)


def _tell(progress: Progress, share: float, label: str, text: str) -> None:
    progress(f"{label}: {text}", share)


def measure_case(
    case: ModelCase | OpCase,
    request: Request,
    clock: clocks.Clock,
    facts: Environment,
    deadline: float = math.inf,
    progress: Told = lambda text: None,
    samples: dict[str, tuple[float, ...]] | None = None,
) -> tuple[list[Result], dict[str, str], bool]:
    """One case: a row per provider, those left out with the reason, and whether Ctrl-C came.

    `samples`, if given, is filled with the rounds' wall times in milliseconds by provider.
    """
    suite = "models" if isinstance(case, ModelCase) else "ops"
    asked, left_out = request.asked(case)
    interrupted = False
    try:
        with _precision(case.dtype, request.place), searching():
            material = _model if suite == "models" else _op
            if clock.now() > deadline:
                raise protocol.LeftOut(protocol.TIME_IS_UP)
            progress("inputs and references")
            check_memory(str(case), needed_bytes(case), request.place)
            shared, work = material(case, request)
            builders = {p.name: partial(p.build, work) for p in asked}
            outcomes, interrupted = protocol.measure(
                builders, shared, clock, seconds=request.seconds_of(suite), deadline=deadline,
                progress=progress,
            )  # fmt: skip
            facts = replace(facts, clocks=clocks_of(request.place))  # warm, as in the rounds
    except KeyboardInterrupt:
        outcomes, interrupted, shared = {p.name: Outcome() for p in asked}, True, None
    except Exception as error:  # inputs or references: no provider could start
        status, reason = protocol.why(error)
        outcomes = {p.name: Outcome(status, reason) for p in asked}
        shared = None
    if samples is not None:
        samples |= {name: o.samples for name, o in outcomes.items() if o.wall}
    text = shared.cache_text if shared else ""
    found = [_row(case, p, outcomes[p.name], text, clock, facts) for p in asked]
    release(request.place)
    return found, left_out, interrupted


def release(place: torch.device) -> None:
    """Let go of what a case has left in memory."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it would look through the case's models for ever
    if place.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _precision(dtype: str, place: torch.device) -> Iterator[None]:
    """On a GPU, float32 by IEEE or by TF32 products, as the case says.

    By the flags `allow_tf32`, which set `fp32_precision` too: where that alone was set, reading the
    older flags throws, and Inductor reads them.
    """
    if place.type != "cuda":
        yield
        return
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def needed_bytes(case: ModelCase | OpCase) -> int:
    """About what a case needs: the largest layer three times, the weights for each provider."""
    if isinstance(case, OpCase):
        return 3 * case.bytes + SETS_BYTES
    layers = layers_of(case.model, fused=False)
    size = ELEMENT_SIZE[case.dtype.replace("tf32", "float32")]
    largest = max(layer.bytes - layer.weight_bytes for layer in layers) * case.batch * size / 4
    return int(3 * largest + 6 * sum(layer.weight_bytes for layer in layers) * size / 4)


# ---- materials


def _op(case: OpCase, request: Request) -> tuple[Case, OpWork]:
    place, dtype = request.place, torch_dtype(case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = formulas.module_of(case)
        shapes = formulas.input_shapes(case)
        first = tuple(
            torch.randn(s).to(dtype).to(memory_format=torch.channels_last) for s in shapes
        )
    few = tuple(t[:CHECKED].clone(memory_format=torch.preserve_format) for t in first)
    with torch.inference_mode():
        exact = copy.deepcopy(module).double()(*(t.double() for t in few))
    module = module.to(place)
    with torch.inference_mode():
        eager = module(*(t.to(place) for t in few)).cpu()
    size = sum(t.numel() * t.element_size() for t in first)
    count, text = rotation(size, place)
    # A roll keeps the values' distribution, and no other set's result can pass for this one's.
    sets = [
        tuple(t.roll(i, dims=3).to(place).contiguous(memory_format=torch.channels_last)
              for t in first)
        for i in range(count)
    ]  # fmt: skip
    shared = Case(sets, exact, eager, case.k_gemm, cache_text=text)
    return shared, OpWork(case, module, place)


def rotation(size: int, place: torch.device) -> tuple[int, str]:
    """How many sets of inputs of `size` bytes an op walks through, and the row's words for it."""
    if place.type == "cuda":
        return 2, "L2 flushed before each timed call"
    l2, last = clocks.cache_bytes()
    count = max(2, min(math.ceil(2 * l2 / size) + 1, MAX_SETS, SETS_BYTES // size))
    total = count * size
    return count, (
        f"rotated through {count} sets, {total / 1e6:.0f} MB "
        f"({total / l2:.1f} x L2, {total / last:.2f} x last-level cache)"
    )


@functools.cache
def _pictures() -> photographs.Photographs:
    return photographs.load()


@functools.lru_cache(maxsize=1)
def _pair(model: str) -> tuple:
    """torchvision's model, ours, and float64's answers on the photographs."""
    pixels = _pictures().pixels
    theirs, ours = build_pair(model, None, pixels)
    with torch.inference_mode():
        return theirs, ours, copy.deepcopy(theirs).double()(pixels.double())


def _model(case: ModelCase, request: Request) -> tuple[Case, ModelWork]:
    theirs, ours, answers = _pair(case.model)
    compiles = not request.quick or (case.model, case.batch) in QUICK_COMPILED
    place, dtype = request.place, torch_dtype(case.dtype)
    images = partial(batch_of, _pictures().pixels, case.batch, place, dtype)
    return model_case(images, answers, ModelWork(theirs, ours, images(0), compiles))


def batch_of(pixels: Tensor, size: int, place: torch.device, dtype: torch.dtype, shift: int):
    """A batch of the photographs, starting over where there are fewer, from number `shift` on."""
    chosen = pixels[(torch.arange(size) + shift) % len(pixels)]
    return chosen.to(place, dtype).contiguous(memory_format=torch.channels_last)


def model_case(
    images: Callable[[int], Tensor], answers: Tensor, work: ModelWork
) -> tuple[Case, ModelWork]:
    """A model's case: batches to walk through, and what the answers are held against.

    Args:
        images: gives a batch whose first photograph has that number.
        answers: float64's, of all photographs.
        work: what the providers are given.
    """
    first = images(0)
    count = min(len(first), CHECKED)
    exact = answers[torch.arange(count) % len(answers)]
    with torch.inference_mode():
        eager = work.placed(work.theirs)(first[:count]).cpu()
    sets = max(2, min(8, SETS_BYTES // (first.numel() * first.element_size())))
    text = (
        f"rotated through {sets} batches; each timed call follows an untimed one of the same "
        "provider, as a server's calls do"
    )
    inputs = [(first,), *((images(i),) for i in range(1, sets))]
    return Case(inputs, exact, eager, back_to_back=True, cache_text=text), work


# ---- rows


def roofs_of(found: list[Result], place: torch.device, progress: Told) -> dict[str, Roofline]:
    """The device's rooflines by dtype, raised by those ops that went through them."""
    roofs = {}
    timed = [row for row in found if row.suite == "ops" and row.measured]
    for dtype in dict.fromkeys(row.dtype for row in timed):
        layers = [
            (f"{row.subject} {row.shape}", row.flops, row.bytes, row.time_ms / 1e3)
            for row in timed
            if row.dtype == dtype
        ]
        # No roofline is known for some devices; that of float32 on a GPU is by the flags.
        with contextlib.suppress(ValueError), _precision(dtype, place):
            roofs[dtype] = roofline_of(place, dtype, progress).raised(layers)
    return roofs


def with_shares(found: list[Result], roofs: dict[str, Roofline]) -> list[Result]:
    """The rows with the share of the roofline that each measured op reaches."""

    def shared(row: Result) -> Result:
        if row.suite != "ops" or not row.measured or row.dtype not in roofs:
            return row
        floor = roofs[row.dtype].time_floor(row.flops, row.bytes)
        share = floor.seconds / (row.time_ms / 1e3)
        assert share <= ROOF_TOLERANCE, f"{row.subject} {row.shape}: {share:.0%} of its roofline"
        return replace(row, roof_share=share, bound=floor.bound)

    return [shared(row) for row in found]


def _row(
    case: ModelCase | OpCase,
    provider: Provider,
    outcome: Outcome,
    cache_text: str,
    clock: clocks.Clock,
    facts: Environment,
) -> Result:
    model = isinstance(case, ModelCase)
    flops, moved = work_of(case)
    row = Result(
        suite="models" if model else "ops",
        subject=case.model if model else case.op,
        shape=case.shape,
        where="" if model else case.where,
        batch=case.batch,
        dtype=case.dtype,
        provider=provider.name,
        layout=outcome.layout,
        backend=outcome.backend,
        tile=outcome.tile,
        status=outcome.status,
        reason=outcome.reason,
        inputs=cache_text,
        flops=flops,
        bytes=moved,
        environment=facts,
    )
    if outcome.verdict is not None:
        v = outcome.verdict
        row = replace(row, error=v.ours, eager_error=v.eager, error_limit=v.limit)
    if outcome.status != protocol.MEASURED:
        return row
    row = replace(
        row,
        first_ms=outcome.first_ms,
        build_ms=outcome.build_ms,
        rounds=outcome.wall.rounds,
        warm_up=outcome.warm_up,
        busy=outcome.wall.busy,
        peak_memory_mb=outcome.peak_memory_mb,
        peak_how=clock.peak_how if outcome.peak_memory_mb is not None else "",
        device_how=outcome.device_how,
        **_columns("wall", outcome.wall),
        **_columns("device", outcome.device),
    )
    return replace(row, stable=row.timing.stable, **_rates(row))


def _columns(name: str, found: Timing | None) -> dict[str, float]:
    if found is None:
        return {}
    columns = {f"{name}_{part}_ms": getattr(found, part) for part in ("p20", "p80", "p99")}
    return {f"{name}_ms": found.median, **columns}


def _rates(row: Result) -> dict[str, float]:
    seconds = row.time_ms / 1e3
    return {
        "tflops": row.flops / seconds / 1e12,
        "gbs": row.bytes / seconds / 1e9,
        "images_per_s": row.batch / seconds,
    }


def work_of(case: ModelCase | OpCase) -> tuple[int, int]:
    """FLOPs and bytes at their minimum; a model's are its layers' as they run fused."""
    if isinstance(case, OpCase):
        return case.flops, case.bytes
    layers = layers_of(case.model)
    flops, weights = (sum(getattr(la, name) for la in layers) for name in ("flops", "weight_bytes"))
    activations = sum(layer.bytes for layer in layers) - weights
    size = ELEMENT_SIZE[case.dtype.replace("tf32", "float32")] / 4
    return flops * case.batch, int((activations * case.batch + weights) * size)
