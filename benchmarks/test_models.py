# SPDX-License-Identifier: Apache-2.0
"""Whole models on real photographs, each provider in its strongest form.

    pytest benchmarks -n 0          (-n 0: in one process, or pytest-benchmark times nothing)

Answers come first: a provider whose logits are less exact than the rule allows gets no time. Times
of one group (model, dtype, batch) belong together; absolute ones are of one machine at one hour.
"""

from __future__ import annotations

import copy

import pytest
import torch

from resnet_fast import agreement
from resnet_fast.comparison import photographs
from resnet_fast.comparison.measure import build_pair, pick_device
from resnet_fast.comparison.providers import NHWC, PEERS, providers

MODELS = ("resnet18", "resnet50")
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8)


@pytest.fixture(scope="session")
def pictures():
    return photographs.load()


@pytest.fixture(scope="session", params=MODELS)
def pair(request, pictures):
    """The two models of one name, and float64's logits."""
    theirs, ours = build_pair(request.param, None, pictures.pixels)
    with torch.inference_mode():
        exact = copy.deepcopy(theirs).double()(pictures.pixels.double())
    return request.param, theirs, ours, exact


@pytest.fixture(scope="session", params=DTYPES)
def calls(request, pair):
    """What is timed, by name; a peer that is not here is left out."""
    _, theirs, ours, _ = pair
    dtype, place = getattr(torch, request.param), pick_device("auto")
    found = providers(theirs, ours, dtype, place, [])
    for peer in PEERS:
        try:
            found |= providers(theirs, ours, dtype, place, [peer])
        except ValueError as error:
            print(f"{peer} is left out: {error}")
    return request.param, found, place


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("index", range(3 + len(PEERS)))
def test_model(benchmark, pictures, pair, calls, index, batch):
    name, _, _, exact = pair
    dtype, found, place = calls
    if index >= len(found):
        pytest.skip("this peer is not installed")
    provider, call = list(found.items())[index]
    x = pictures.pixels.to(place, getattr(torch, dtype))
    verdict = agreement.compare(call(x).cpu(), found[NHWC](x).cpu(), exact)
    if not verdict.agrees:
        pytest.fail(f"{provider} gets no time: {verdict}")
    benchmark.group = f"{name}, {dtype}, batch {batch}"
    benchmark.name = provider
    benchmark.extra_info |= {"error": verdict.ours, "eager_error": verdict.eager}
    x = pictures.batch(batch).to(place, getattr(torch, dtype))
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        call(x)
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    benchmark.pedantic(run, warmup_rounds=3, rounds=15)
