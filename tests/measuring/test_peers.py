# SPDX-License-Identifier: Apache-2.0
"""What is compared and in which form; an extra installs what the README shows."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from resnet_fast.measuring import peers, protocol
from resnet_fast.measuring.clock import Clock

ROOT = Path(__file__).parent.parent.parent


def test_an_extra_installs_the_peers_of_the_readmes_tables(monkeypatch):
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="OpenVINO is not installed") as told:
        peers.openvino_call(nn.Identity(), torch.float32, torch.device("cpu"))
    (extra,) = re.findall(r"pip install \"resnet_fast\[(\w+)\]\"", str(told.value))
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in extras["optional-dependencies"][extra]}
    assert "openvino" in names


class Seen(nn.Module):
    """Notes the thread of each call, and whether cuDNN searches in it."""

    log: ClassVar[list[tuple[int, bool]]] = []

    def forward(self, x):
        self.log.append((threading.get_ident(), torch.backends.cudnn.benchmark))
        return x.clone()


@pytest.fixture
def gpu(monkeypatch):
    """Models stay where they are, whatever device they are moved to."""
    to = nn.Module.to

    def stay(module, *args, **keywords):
        return to(module, *(a for a in args if not isinstance(a, torch.device)), **keywords)

    monkeypatch.setattr(nn.Module, "to", stay)
    return torch.device("cuda")


def called(kind: str, device: torch.device, named=()) -> dict[str, set]:
    """Who is compared, and the threads and flags of all calls that the protocol makes of each."""
    x, found = torch.ones(1, 3, 4, 4), {}

    class Work(peers.ModelWork):
        def placed(self, model):
            return Seen()

    class Place:
        """A tensor that says it is on the device."""

        dtype, is_cuda = x.dtype, device.type == "cuda"

    Place.device = device
    case = protocol.Case([(x,), (x,)], x.double(), x)
    for provider in peers.compared(kind, named):
        Seen.log.clear()
        builders = {provider.name: lambda p=provider: p.build(Work(None, None, Place()))}
        with peers.searching():
            outcomes, _ = protocol.measure(builders, case, Clock(), seconds=0.0)
        assert outcomes[provider.name].status == protocol.MEASURED, outcomes[provider.name].reason
        found[provider.name] = set(Seen.log)
    return found


def test_on_a_gpu_eager_is_compared_at_its_best_too(gpu, monkeypatch):
    """It searches; what does not search has a thread of its own, where it finds nothing of that."""
    monkeypatch.setattr(peers, "compiled", lambda model, mode: model)
    before = torch.backends.cudnn.benchmark
    seen = called("cuda", gpu, ["compile"])
    assert list(seen) == [peers.NCHW, peers.NHWC, peers.SEARCHED, "compile", peers.OURS]
    assert all(len(calls) == 1 for calls in seen.values())
    searches = {name: benchmark for name, calls in seen.items() for _, benchmark in calls}
    assert searches == {
        peers.NCHW: False, peers.NHWC: False, peers.SEARCHED: True, "compile": True,
        peers.OURS: True,
    }  # fmt: skip
    here = threading.get_ident()
    apart = {name for name, calls in seen.items() for thread, _ in calls if thread != here}
    assert apart == {peers.NCHW, peers.NHWC}
    assert torch.backends.cudnn.benchmark == before


def test_on_a_cpu_all_run_in_the_calling_thread():
    seen = called("cpu", torch.device("cpu"))
    assert list(seen) == [peers.NCHW, peers.NHWC, peers.OURS]
    assert {thread for calls in seen.values() for thread, _ in calls} == {threading.get_ident()}


def test_a_peer_that_is_not_known_or_of_another_device_is_refused():
    with pytest.raises(ValueError, match="unknown peer 'openvin'; did you mean openvino"):
        peers.compared("cpu", ["openvin"])
    with pytest.raises(ValueError, match="OpenVINO runs on cpu, not on cuda"):
        peers.compared("cuda", ["openvino"])


def test_every_provider_has_one_name():
    names = [provider.name for provider in peers.model_providers()]
    assert len(names) == len(set(names)) and not any(" " in name for name in names)
    assert {*peers.EAGER, *peers.NAMED, peers.OURS} <= set(names)
