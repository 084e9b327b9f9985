# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of ordinary CUDA C++, for sm_80 and sm_90, against float64."""

import pathlib
import shutil
import struct
import subprocess

import numpy as np
import pytest

from softgpu import ptx
from softgpu.ptx.values import bf16_to_f32, f32_to_bf16


@pytest.fixture(scope="module", params=["80", "90"], ids=["sm_80", "sm_90"])
def module(request, tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    source = pathlib.Path(__file__).with_name("cuda_kernels.cu")
    out = tmp_path_factory.mktemp("cuda") / "kernels.ptx"
    command = ["nvcc", "-std=c++17", "-w", f"-arch=sm_{request.param}", "-ptx", source, "-o", out]
    subprocess.run(command, check=True, capture_output=True)
    return ptx.Module(out.read_text())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_struct_parameter_shuffles_and_atomics(module, rng):
    x, y = rng.standard_normal(5000).astype(np.float16), np.zeros(3, np.float32)
    finished = np.zeros(1, np.int32)
    addresses = ptx.address_of(x), ptx.address_of(y)
    problem = struct.pack("<QQif5s3x", *addresses, len(x), 2.0, b"")
    module.kernel("block_sums").launch(3, 256, [problem, finished])
    total = 2 * (x.astype(np.float64) * (np.arange(5000) % 8 + 1)).sum()
    np.testing.assert_allclose(y.sum(), total, rtol=1e-5)
    assert finished[0] == 3


def test_local_memory(module, rng):
    rows = rng.integers(0, 100, (64, 16)).astype(np.int32)
    want = np.sort(rows, axis=1)
    run = module.kernel("sort_rows").launch(1, 64, [rows, 16])
    np.testing.assert_array_equal(rows, want)
    assert run.counters.local_bytes > 0


def test_library_functions(module, rng):
    x, y = rng.random(40) * 3, np.zeros(40, np.float32)
    module.kernel("library").launch(1, 64, [y, x, 40])
    f, i = x.astype(np.float32), np.arange(40)
    want = np.exp(x) + np.sqrt(x) / (1 + x) + np.exp(f) + np.sin(f) + np.fmod(f, np.float32(0.7))
    np.testing.assert_allclose(y, want + 1 / (f + 2) + i // 3 % 5, rtol=1e-6, atol=1e-5)


def test_a_pipeline_and_its_missing_wait(module, rng):
    x = rng.standard_normal((4, 64, 4)).astype(np.float32)
    y = np.zeros_like(x)
    module.kernel("pipeline").launch(1, 64, [x, y])
    np.testing.assert_array_equal(y, x[:, ::-1])
    broken = ptx.Module(module.text.replace("cp.async.wait_group 1;", "cp.async.wait_group 2;"))
    with pytest.raises(ptx.PtxError, match="its wait is missing"):
        broken.kernel("pipeline").launch(1, 64, [x, y])


def test_an_arrive_wait_barrier(module):
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    module.kernel("barrier").launch(1, 128, [x, y])
    np.testing.assert_array_equal(y, x[::-1])


def test_packed_bfloat16(module, rng):
    x, y = f32_to_bf16(rng.standard_normal(64).astype(np.float32)), np.zeros(64, np.uint16)
    module.kernel("packed").launch(1, 32, [x, y])
    wide = bf16_to_f32(x).astype(np.float64)
    rounded = bf16_to_f32(f32_to_bf16((wide * wide + 0.5).astype(np.float32)))
    np.testing.assert_array_equal(bf16_to_f32(y), np.maximum(rounded, 1))


def test_one_lane_adds_for_all_that_are_together(module, rng):
    x, y = rng.integers(-9, 9, 200).astype(np.int32), np.zeros(200, np.int32)
    count = np.zeros(1, np.int32)
    module.kernel("compact").launch(2, 128, [x, y, count, 200])
    positive = np.sort(x[x > 0])
    assert count[0] == len(positive)
    np.testing.assert_array_equal(np.sort(y[: count[0]]), positive)


def test_half_warps_vote_and_reduce_by_themselves(module):
    x, y = np.arange(64, dtype=np.int32) % 33, np.zeros((64, 4), np.int32)
    module.kernel("tiles").launch(1, 64, [x, y])
    for rows, got in zip(x.reshape(4, 16), y.reshape(4, 16, 4), strict=True):
        votes = (rows == 1).any() + 2 * (rows < 30).all()
        ballot = sum(1 << i for i in range(16) if rows[i] == 1)
        labels = [(rows & 3 == row & 3).sum() for row in rows]
        np.testing.assert_array_equal(got[:, :3], [[votes, ballot, rows.sum()]] * 16)
        np.testing.assert_array_equal(got[:, 3], labels)


@pytest.mark.parametrize("n", [100, 64])
def test_threads_leave_before_a_barrier(module, n):
    x, y = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    module.kernel("reverse").launch(1, 128, [x, y, n])
    np.testing.assert_array_equal(y, x[::-1])


def test_printf(module, capsys):
    module.kernel("report").launch(1, 32, [3])
    of = f"of {3 << 33} x:  0.38%"
    assert capsys.readouterr().out.splitlines() == [f" 1 {of}", f" 2 {of}", "done: 1"]
