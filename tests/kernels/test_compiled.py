# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the kernels, for every architecture and without a GPU.

Each test compiles in worker processes and collects what is wrong as readable lines, so that one
failure names every tile that has it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from resnet_fast import _hardware, ops
from resnet_fast.dispatch import gemm, heuristics, tiles
from resnet_fast.kernels import add_relu, conv_bn_act
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, TileConfig
from tests.support import cases, compiled, families, nvcc, sass

FP32_PARAMS = (torch.float32,) * 4


def operands_of(spec: ConvSpec) -> conv_bn_act.Operands:
    params = FP32_PARAMS if spec.norm else (*FP32_PARAMS[:2], None, None)
    return conv_bn_act.Operands((spec.h * spec.w * spec.c, spec.w * spec.c, spec.c), params, True)


def compile_conv(spec: ConvSpec, tile: TileConfig, arch: int) -> list[compiled.CompiledKernel]:
    launches = conv_bn_act.launches(spec, tile, operands_of(spec))
    return [compiled.compile_launch(launch, arch) for launch in launches]


def table_jobs(arch: int) -> list[tuple[ConvSpec, TileConfig, int]]:
    """Each tile of the table with the most demanding arithmetic that it is meant for."""
    return [(cases.demanding(tile, arch), tile, arch) for tile in cases.TILES[arch]]


def faults_of(job: tuple[ConvSpec, TileConfig, int]) -> list[str]:
    """What is wrong with one tile, as lines; runs in a worker process."""
    spec, tile, arch = job
    gpu = _hardware.GPUS[arch]
    (kernel,) = compile_conv(spec, tile, arch)
    used, codes, loops = kernel.resources(), kernel.opcodes(), sass.tensor_loops(kernel.sass())
    tensor_cores = not gemm.is_ieee(spec)
    # where a step of x or of weight has fewer vectors than there are threads, each takes less
    smaller = min(tile.BLOCK_M, tile.BLOCK_N) * tile.BLOCK_K * ELEMENT_SIZE[spec.dtype]
    vectors = spec.c % 8 == 0 and smaller >= 16 * used.threads
    faults = {
        f"spills {used.spill_bytes} bytes": used.spill_bytes > 0,
        f"{used.shared_bytes} bytes shared": used.shared_bytes > gpu.shared_per_block,
        "more shared memory than the heuristic counts": used.shared_bytes
        > gemm.shared_bytes(spec, tile) + 2048,
        "does not fit an SM": used.blocks_per_sm(gpu) < 1,
        f"{len(loops)} tensor loops": tensor_cores and len(loops) != 1,
        "divides in its main loop": any(divides(loop.opcodes) for loop in loops),
        "no 16-byte loads": vectors and not any(is_16_byte_load(code) for code in codes),
        "narrow copies to shared memory": vectors and any(is_narrow_copy(code) for code in codes),
        "no 16-byte stores": not any(re.match(r"STG.*\.128", code) for code in codes),
        "narrow stores": any(re.match(r"STG(?!.*\.128)", code) for code in codes),
    }
    return [f"{spec}, {tile}: {fault}" for fault, present in faults.items() if present]


def divides(opcodes: dict[str, int]) -> bool:
    """An integer division is a reciprocal and a conversion, whichever way it is compiled."""
    return any(re.match(r"MUFU\.RCP|I2F", code) for code in opcodes)


def is_16_byte_load(code: str) -> bool:
    return re.match(r"LDG(STS)?\b.*\.128", code) is not None or code.startswith("UTMALDG")


def is_narrow_copy(code: str) -> bool:
    return re.match(r"LDGSTS(?!.*\.128)", code) is not None


@pytest.mark.parametrize("arch", cases.TILES)
def test_every_tile_of_the_table(compile_pool, arch):
    faults = [line for lines in compile_pool.map(faults_of, table_jobs(arch)) for line in lines]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("arch", cases.TILES)
def test_every_tile_has_a_reason(arch):
    assert all(tile.reason for tile in cases.TILES[arch])


def main_loop(spec: ConvSpec, tile: TileConfig, arch: int) -> compiled.MainLoop:
    """The one main loop of a kernel; runs in a worker process."""
    return compile_conv(spec, tile, arch)[0].main_loop()


@pytest.mark.parametrize(
    "spec, at_most",
    [
        (ConvSpec(8, 14, 14, 256, 256, 3, 3, (1, 1), (1, 1), residual=True, norm=True), 2.7),
        (ConvSpec(8, 14, 14, 256, 256, 1, 1, residual=True, norm=True), 2.4),
        (ConvSpec(8, 14, 14, 256, 256, 1, 1, (2, 2), residual=True, norm=True), 2.4),
    ],
    ids=["3x3", "pointwise", "pointwise/2"],
)
def test_instructions_per_mma(compile_pool, spec, at_most):
    """On sm_80, at 128x128x64 and 4 warps; hand-written CUTLASS has 3.06 at 128x128x32."""
    loop = compile_pool.submit(main_loop, spec, TileConfig(128, 128, 64, 3, 4), 80).result()
    assert loop.mma == 128
    assert loop.loads == 32 + 16  # fragments by fours, and the copies of a later step
    assert loop.per_mma <= at_most, loop


def stem_faults(arch: int) -> list[str]:
    """What is wrong with the 7x7 stem, at the tile that is chosen for it."""
    stem = ConvSpec(8, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), norm=True)
    specs = [replace(stem, dtype=dtype) for dtype in ("float16", "float32")]
    chosen = [(s, heuristics.choose(s, arch, cases.TRITON), arch) for s in specs]
    return [line for job in chosen for line in faults_of(job)]


@pytest.mark.parametrize("arch", cases.TILES)
def test_stem(compile_pool, arch):
    faults = compile_pool.submit(stem_faults, arch).result()
    assert not faults, "\n".join(faults)


def split_resources(arch: int) -> list[compiled.Resources]:
    spec = replace(cases.DEMANDING[0], n=1, h=7, w=7, c=512, dtype="bfloat16")
    kernels = compile_conv(spec, TileConfig(64, 64, 64, 3, 4, SPLIT_K=4), arch)
    return [kernel.resources() for kernel in kernels]


def wide_index_resources(arch: int) -> list[compiled.Resources]:
    spec = replace(cases.DEMANDING[0], n=2**14)
    return [kernel.resources() for kernel in compile_conv(spec, TileConfig(64, 64, 64, 3, 4), arch)]


def half_params_resources(arch: int) -> list[compiled.Resources]:
    spec = replace(cases.DEMANDING[0], dtype="bfloat16")
    operands = operands_of(spec)._replace(params=(torch.bfloat16,) * 4, aligned=False)
    launches = conv_bn_act.launches(spec, TileConfig(64, 64, 64, 3, 4), operands)
    return [compiled.compile_launch(launch, arch).resources() for launch in launches]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("form", [split_resources, wide_index_resources, half_params_resources])
def test_other_forms_compile(compile_pool, form, arch):
    """Split products, 64-bit offsets, half-precision parameters at unaligned addresses."""
    for used in compile_pool.submit(form, arch).result():
        assert used.spill_bytes == 0


def families_here() -> list[str]:
    """The names of those that can be compiled on this machine."""
    return [name for name in families.FAMILIES if name.startswith("triton") or not nvcc.missing()]


# where a family's kernel is not called by its op's name
KERNELS = {
    "triton stem_pool": "max_pool_3x3_2_kernel",
    "cuda add_relu": "elementwise",
}


def kernel_of(family: str) -> str:
    """What the machine code calls the first kernel of a family."""
    backend, op = family.split()
    return KERNELS.get(family, f"{op}_kernel" if backend == "triton" else op)


def first_of(family: str, arch: int) -> tuple:
    kernel = next(compiled.cases((arch,), (family,)))
    used = kernel.resources()
    return kernel.name, kernel.arch, len(kernel.args), used.registers, used.spill_bytes


@pytest.mark.parametrize("arch", compiled.MACHINE_ARCHS)
def test_cases_have_every_family(compile_pool, arch):
    both = {f"{backend} {op}" for backend in ("triton", "cuda") for op in ops.OPS}
    assert families.FAMILIES.keys() == both
    found = compile_pool.map(first_of, families_here(), [arch] * len(both))
    for family, (name, compiled_for, args, registers, spills) in zip(
        families_here(), found, strict=True
    ):
        assert kernel_of(family) in name and compiled_for == arch
        assert args > 0 and registers > 0 and spills == 0, family


def test_cases_are_all_families_unless_some_are_named(monkeypatch):
    def family(name, arch):
        return [families.Work(name, None, "", lambda: [(name, arch)])]

    made = {name: partial(family, name) for name in families.FAMILIES}
    monkeypatch.setattr(families, "FAMILIES", made)
    everything = [(name, arch) for arch in compiled.MACHINE_ARCHS for name in made]
    assert list(compiled.cases()) == everything
    assert list(compiled.cases((90,), ("cuda stem_pool",))) == [("cuda stem_pool", 90)]


@pytest.mark.parametrize("arch", compiled.MACHINE_ARCHS)
def test_cases_have_every_tile_of_every_table(arch):
    op_of = {type(op.typical("float16")): op.name for op in ops.OPS.values()}
    tables = {
        **{f"triton {op_of[kind]}": table[arch] for kind, table in tiles.TRITON_TILES.items()},
        **{f"cuda {op_of[kind]}": table for kind, table in tiles.CUDA_TILES.items()},
    }
    for family, table in tables.items():
        works = list(families.FAMILIES[family](arch))
        found = {work.tile for work in works}
        assert found.issuperset(table), family
        assert {work.dtype for work in works} == {"float16", "bfloat16", "float32"}, family


@pytest.mark.skipif(not nvcc.missing(), reason="nvcc is installed")
def test_without_nvcc_the_reason_is_given():
    with pytest.raises(RuntimeError, match="nvcc is not installed"):
        next(compiled.cases((80,), ("cuda conv_bn_act",)))


def add_relu_kernel(arch: int, dtype: torch.dtype) -> compiled.CompiledKernel:
    (launch,) = add_relu.launches(2**20, dtype, True)
    return compiled.compile_launch(launch, arch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", cases.TILES)
def test_add_relu_moves_16_bytes_at_a_time(compile_pool, arch, dtype):
    kernel = compile_pool.submit(add_relu_kernel, arch, dtype).result()
    assert kernel.main_loop() is None
    memory = {code for code in kernel.opcodes() if re.match(r"LDG|STG", code)}
    assert memory and all(".128" in code or ".256" in code for code in memory), memory
    assert kernel.resources().spill_bytes == 0
