# SPDX-License-Identifier: Apache-2.0
"""What is known of a GPU by what its driver says, with properties as torch gives them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fast import _hardware, ops
from resnet_fast.dispatch import gemm, heuristics, table, tiles
from resnet_fast.profiling.roofline import roofline_of
from resnet_fast.spec import ConvSpec, JoinSpec, StemSpec
from tests.support import join_cases

op_module = importlib.import_module("resnet_fast.ops.conv_bn_act")  # ops.conv_bn_act is the op

# name: capability, SMs, the memory's clock in MHz, its bus in bits; then GB/s and fp16 TFLOP/s
DEVICES = {
    "NVIDIA A100-SXM4-40GB": (80, 108, 1215, 5120, 1555, 312),
    "NVIDIA A100-PCIE-40GB": (80, 108, 1215, 5120, 1555, 312),
    "NVIDIA A100 80GB PCIe": (80, 108, 1512, 5120, 1935, 312),
    "NVIDIA A100-SXM4-80GB": (80, 108, 1593, 5120, 2039, 312),
    "NVIDIA A10": (86, 72, 6251, 384, 600, 125),
    "NVIDIA L4": (89, 58, 6251, 192, 300, 121),
    "NVIDIA L40S": (89, 142, 9001, 384, 864, 362),
    "NVIDIA GeForce RTX 4090": (89, 128, 10501, 384, 1008, 165),
    "NVIDIA H100 80GB HBM3": (90, 132, 2619, 5120, 3350, 989),
    "NVIDIA H100 PCIe": (90, 114, 1593, 5120, 2039, 756),
    "NVIDIA H200": (90, 132, 3201, 6144, 4800, 989),
    "NVIDIA B200": (100, 148, 3996, 8192, 8000, 2250),
    "NVIDIA GeForce RTX 5090": (120, 170, 14001, 512, 1792, 210),
}


def properties(name: str, capability: int, sms: int, clock: float = 0, bus: int = 0):
    return SimpleNamespace(
        name=name, major=capability // 10, minor=capability % 10, multi_processor_count=sms,
        memory_clock_rate=int(clock * 1000), memory_bus_width=bus,
    )  # fmt: skip


def device(name: str) -> SimpleNamespace:
    return properties(name, *DEVICES[name][:4])


@pytest.fixture
def present(monkeypatch):
    """present(properties): that GPU is the one of this machine."""

    def present(facts):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
        capability = (facts.major, facts.minor)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        _hardware._gpu_at.cache_clear()

    yield present
    _hardware._gpu_at.cache_clear()


@pytest.mark.parametrize("name", DEVICES)
def test_each_product_has_its_own_roofline(present, name):
    """Of one architecture an A100 has 1555 or 2039 GB/s, and a 4090 is no L4."""
    bandwidth, tflops = DEVICES[name][4:]
    present(device(name))
    roof = roofline_of("cuda:0", "float16")
    assert roof.name == f"{name}, float16" and roof.notes == ()
    assert roof.tflops == pytest.approx(tflops)
    assert roof.bandwidth_gbs == pytest.approx(bandwidth, rel=0.03)


@pytest.mark.parametrize("name", DEVICES)
def test_a_driver_that_tells_no_clock_leaves_the_data_sheets_bandwidth(name):
    capability, sms, *_, bandwidth, _ = DEVICES[name]
    assert _hardware.gpu_from(properties(name, capability, sms)).bandwidth_gbs == bandwidth


def test_an_unknown_product_is_its_architectures_by_size_and_says_so(present):
    present(properties("NVIDIA X1", 89, 29, 5000, 256))
    roof = roofline_of("cuda:0", "bfloat16")
    assert roof.tflops == pytest.approx(121 / 2)
    assert roof.bandwidth_gbs == pytest.approx(320)
    assert roof.notes == (
        "no data sheet of NVIDIA X1 is known here: its peaks are L4's, by the number of SMs",
    )


def test_a_part_of_a_gpu_has_a_part_of_its_peak():
    part = _hardware.gpu_from(properties("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 80, 42))
    assert part.tflops_fp16 == pytest.approx(312 * 42 / 108)
    assert part.note == "its peaks are A100 40GB's, by the number of SMs"


def test_an_old_gpu_is_none(present):
    present(properties("Tesla T4", 75, 40, 5001, 256))
    assert _hardware.gpu_of(torch.device("cuda:0")) is None
    with pytest.raises(ValueError, match=r"no roofline for compute capability 7\.5"):
        roofline_of("cuda:0", "float16")


def test_each_row_is_found_by_its_words_and_no_earlier_row_hides_it():
    for words, gpu in _hardware.PRODUCTS.items():
        facts = properties(f"NVIDIA {words}", gpu.capability, gpu.sms)
        assert _hardware.gpu_from(facts) == replace(gpu, name=f"NVIDIA {words}")


# ---- what is chosen for it

L4, RTX_4090 = (_hardware.gpu_from(device(n)) for n in ("NVIDIA L4", "NVIDIA GeForce RTX 4090"))
LAYER = ConvSpec(8, 14, 14, 256, 256, 3, 3, (1, 1), (1, 1), norm=True)


@pytest.mark.parametrize(
    "family", [tiles.TRITON[ConvSpec], tiles.CUDA[ConvSpec]], ids=["triton", "cuda"]
)
def test_tiles_are_chosen_for_the_device_and_not_for_its_architecture(family):
    """A split that fills an L4's 58 SMs leaves half of a 4090's 128 idle."""
    small, large = (heuristics.choose(LAYER, gpu, family) for gpu in (L4, RTX_4090))
    assert small == heuristics.choose(LAYER, 89, family)
    assert gemm.blocks(LAYER, small) <= 58 < gemm.blocks(LAYER, large)
    scores = [family.cost(LAYER, t, RTX_4090).microseconds for t in (small, large)]
    assert scores[1] < scores[0]


def test_joins_and_stems_too():
    spec = join_cases.resnet_joins(50, n=1)["layer2"]
    for family in (tiles.CUDA[JoinSpec], tiles.TRITON[JoinSpec]):
        small, large = (heuristics.choose(spec, gpu, family) for gpu in (L4, RTX_4090))
        assert small == heuristics.choose(spec, 89, family)
        assert small.BLOCK_M * small.BLOCK_N > large.BLOCK_M * large.BLOCK_N
    images = StemSpec(ConvSpec(2, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), norm=True))
    large, small = tiles.CUDA_TILES[StemSpec]
    assert large.blocks(images) == 112
    chosen = [heuristics.choose(images, g, tiles.CUDA[StemSpec]) for g in (L4, RTX_4090)]
    assert chosen == [large, small]


def test_the_op_tells_its_backends_which_device_it_is(present, monkeypatch):
    present(device("NVIDIA GeForce RTX 4090"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "")
    monkeypatch.setattr(op_module, "_addresses", lambda call: 0)
    with FakeTensorMode():
        x, weight, vector = (torch.empty(shape, device="cuda:0", dtype=torch.float16)
                             for shape in ((8, 14, 14, 256), (256, 3, 3, 256), (256,)))  # fmt: skip
        x, weight = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
        call = ops.Call(x, weight, vector, vector, padding=(1, 1), mean=vector, var=vector)
        problem = op_module.problem_of(call)
    assert problem.target == RTX_4090 and problem.spec == LAYER
    row = table.row_of("conv_bn_act", "triton")
    assert row.choose(problem) == heuristics.choose(LAYER, RTX_4090, row.family)
