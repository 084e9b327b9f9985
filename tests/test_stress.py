# SPDX-License-Identifier: Apache-2.0
"""Many threads, many image sizes, many models: no error, no wrong answer, no memory kept."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
import torchvision

import resnet_fast
import resnet_fast.models.resnet as ours
from resnet_fast import agreement
from tests.nn.conftest import build

K_GEMM = 512 * 9
THREADS = 8
SIZES = [(32 + i // 2, 32 + (7 * i) % 25) for i in range(50)]


@pytest.fixture(scope="module")
def known():
    """The plain model, and for each size: an image, the float64 answer, the largest error."""
    plain = build(torchvision.models.resnet, "BasicBlock", (2, 1))
    exact = copy.deepcopy(plain).double()
    cases = []
    with torch.inference_mode():
        for seed, size in enumerate(SIZES):
            x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
            y = exact(x.double())
            last = x.contiguous(memory_format=torch.channels_last)
            eager = max(agreement.error(plain(t), y) for t in (x, last))
            cases.append((x, y, agreement.bound(eager, x.dtype, K_GEMM)))
    return plain, cases


def hammer(model, cases, seed: int) -> list[BaseException]:
    """All threads call one model, each with all sizes in an order of its own; what went wrong."""
    failures = []
    start = threading.Barrier(THREADS)

    def work(number: int) -> None:
        mine = random.Random(seed * THREADS + number).sample(cases, len(cases))
        start.wait()
        try:
            for x, exact, limit in mine:
                with torch.inference_mode():
                    error = agreement.error(model(x), exact)
                assert error <= limit, f"wrong by {error:.3g} on {tuple(x.shape)}"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def hammered(kind: str, plain, cases, seconds: float) -> None:
    """Rounds until the time is over, each with a model that has met no size yet."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads meet more often
    try:
        end, seed = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            if kind == "ours":
                model = build(ours, "BasicBlock", (2, 1))
            else:
                model = resnet_fast.optimize(plain, strict=True)
            assert hammer(model, cases, seed) == []
            seed += 1
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("kind", ["ours", "optimized"])
def test_threads_that_meet_at_new_sizes(kind, known, pytestconfig):
    hammered(kind, *known, pytestconfig.getoption("--stress-seconds") or 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "optimized"])
def test_threads_for_minutes(kind, known, pytestconfig):
    hammered(kind, *known, pytestconfig.getoption("--stress-seconds") or 300)


# ---- memory, each in a process of its own

MEASURE = """
import gc, json, sys, torch, torchvision, resnet_fast

def kibibytes(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))

def model():
    plain = torchvision.models.resnet18().eval().to(memory_format=torch.channels_last)
    return resnet_fast.optimize(plain, inplace=True) if sys.argv[1] == "optimized" else plain

torch.set_num_threads(1)
torch.set_grad_enabled(False)
gc.disable()
images = [torch.randn(1, 3, 96 + i, 96 + 7 * i % 64) for i in range(50)]
"""
GROWTH = """
m = model()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kibibytes("VmRSS")
for x in images:
    m(x)
packed = resnet_fast.report(m).packed_bytes
weights = [p.nbytes for p in m.parameters() if p.dim() == 4]
print(json.dumps([(kibibytes("VmHWM") - before) * 1024, packed, sum(weights), max(weights)]))
"""
DELETED = """
def life():
    m = model()
    m(images[0])
    del m

life()
before = kibibytes("VmRSS")
for _ in range(4):
    life()
print(json.dumps([(kibibytes("VmRSS") - before) * 1024]))
"""


def measured(script: str, kind: str) -> list[int]:
    if not sys.platform.startswith("linux"):
        pytest.skip("no /proc, which tells a process's memory")
    # glibc gives large blocks back when they are freed: the peak is what was held at one time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE + script, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


NOISE = 32 * 2**20  # small blocks, and code that is made for each size


def test_fifty_sizes_keep_one_packed_copy():
    """Beside it a process grows by what the plain model's activations take.

    And while a weight is packed, by three of its kind: scaled, laid out anew, made positive.
    """
    plain, nothing, _, _ = measured(GROWTH, "plain")
    grown, packed, weights, largest = measured(GROWTH, "optimized")
    assert nothing == 0
    # AVX2's blocks are of 16, 24 or 32 channels, AVX-512's mostly of 64.
    layouts = 2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
    assert weights <= packed <= layouts * weights
    assert grown <= plain + packed + 3 * largest + NOISE


def test_del_gives_a_models_memory_back_without_the_collector():
    (grown,) = measured(DELETED, "optimized")
    assert grown < NOISE, f"four models left {grown / 2**20:.0f} MiB"


@pytest.mark.parametrize("kind", ["ours", "optimized"])
def test_del_frees_every_module_and_weight(kind):
    plain = build(torchvision.models.resnet, "BasicBlock", (2, 1))
    model = build(ours, "BasicBlock", (2, 1)) if kind == "ours" else resnet_fast.optimize(plain)
    with torch.no_grad():
        for size in SIZES[:3]:
            model(torch.randn(1, 3, *size))
    gc.collect()
    gc.disable()
    try:
        weights = [weakref.ref(p) for p in model.parameters()]
        modules = [weakref.ref(m) for m in model.modules()]
        del model
        assert [kept for kept in modules if kept() is not None] == []
        assert [kept for kept in weights if kept() is not None] == []
    finally:
        gc.enable()
