# SPDX-License-Identifier: Apache-2.0
"""Who is compared and in which form; an extra installs those that the README shows."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from resnet_fast.comparison import providers, timing

ROOT = Path(__file__).parent.parent.parent


def test_an_extra_installs_the_peers_of_the_readmes_tables(monkeypatch):
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="OpenVINO is not installed") as told:
        providers.openvino_call(nn.Identity(), torch.float32, torch.device("cpu"))
    (extra,) = re.findall(r"pip install \"resnet_fast\[(\w+)\]\"", str(told.value))
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in extras["optional-dependencies"][extra]}
    assert "openvino" in names


@pytest.fixture
def gpu(monkeypatch):
    """Models stay where they are, whatever device they are moved to."""
    to = nn.Module.to

    def stay(module, *args, **keywords):
        return to(module, *(a for a in args if not isinstance(a, torch.device)), **keywords)

    monkeypatch.setattr(nn.Module, "to", stay)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return torch.device("cuda")


class Seen(nn.Module):
    """Notes the thread of each call, and whether cuDNN searches in it."""

    log: ClassVar[list[tuple[int, bool]]] = []

    def forward(self, x):
        self.log.append((threading.get_ident(), torch.backends.cudnn.benchmark))
        return x


def test_on_a_gpu_eager_is_compared_at_its_best_too(gpu, monkeypatch):
    """It searches, in a thread of its own: what one thread's cuDNN found, others do not use."""
    monkeypatch.setattr(providers, "compiled", lambda model: model)
    calls = providers.providers(Seen(), Seen(), torch.float32, gpu, ["compile"])
    assert list(calls) == [
        providers.NCHW, providers.NHWC, providers.OURS, providers.SEARCHED, providers.COMPILED,
    ]  # fmt: skip
    x = torch.zeros(1, 3, 4, 4)
    seen: dict[str, set] = {}
    before = torch.backends.cudnn.benchmark

    def noting(name):
        def call():
            Seen.log.clear()
            calls[name](x)
            seen.setdefault(name, set()).update(Seen.log)

        return call

    timing.interleaved({name: noting(name) for name in calls}, 0.0, gpu)
    assert all(len(found) == 1 for found in seen.values())
    threads = {thread for found in seen.values() for thread, _ in found}
    assert len(threads) == len(calls) and threading.get_ident() not in threads
    searches = {name: benchmark for name, found in seen.items() for _, benchmark in found}
    assert searches == {
        providers.NCHW: False, providers.NHWC: False, providers.OURS: False,
        providers.SEARCHED: True, providers.COMPILED: True,
    }  # fmt: skip
    assert torch.backends.cudnn.benchmark == before


def test_on_a_cpu_all_run_in_the_calling_thread():
    cpu = torch.device("cpu")
    calls = providers.providers(Seen(), Seen(), torch.float32, cpu, [])
    assert list(calls) == [providers.NCHW, providers.NHWC, providers.OURS]
    threads = []
    timing.interleaved({"x": lambda: threads.append(threading.get_ident())}, 0.0, cpu)
    assert set(threads) == {threading.get_ident()}
