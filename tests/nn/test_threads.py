# SPDX-License-Identifier: Apache-2.0
"""Threads sharing a model meet at sizes it has not seen: no exception, no wrong answer."""

from __future__ import annotations

import threading

import pytest
import torch

from resnet_fast.kernels import packed

SIZES = range(24, 72, 4)
THREADS = 4


@pytest.mark.parametrize("trial", range(3))
def test_new_sizes_in_many_threads(trial, pair, image):
    fused, plain = pair()
    images = [image(1, 3, size, size) for size in SIZES]
    with torch.inference_mode():
        expected = [plain(x) for x in images]
    packed.forget()
    begin = threading.Barrier(THREADS)
    failures: list[str] = []

    def serve(first: int) -> None:
        begin.wait()
        for turn in range(len(images)):
            i = (first + turn) % len(images)
            try:
                with torch.inference_mode():
                    y = fused(images[i])
                torch.testing.assert_close(y, expected[i], rtol=1e-3, atol=1e-3)
            except Exception as error:
                failures.append(f"size {SIZES[i]}: {error!r}")

    threads = [threading.Thread(target=serve, args=(trial * k,)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_copy_is_looked_for_while_others_are_made(monkeypatch):
    """The race itself: packing looks through the copies, and another thread adds one."""
    weight, one = torch.randn(8, 16, 3, 3), torch.ones(8)
    layout = packed._layout
    inside, failures = threading.Event(), []

    def slow(copy):
        inside.set()
        threading.Event().wait(0.002)
        return layout(copy)

    monkeypatch.setattr(packed, "_layout", slow)
    torch.ops.resnet_fast.conv_bn_act(channels_last(4), weight, one, one)

    def serve(sizes):
        for size in sizes:
            try:
                torch.ops.resnet_fast.conv_bn_act(channels_last(size), weight, one, one)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=serve, args=(range(5 + k, 40, 2),)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside.is_set()
    assert not failures


def channels_last(size: int) -> torch.Tensor:
    return torch.randn(1, 16, size, size).contiguous(memory_format=torch.channels_last)
