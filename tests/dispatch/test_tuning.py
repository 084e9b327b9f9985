# SPDX-License-Identifier: Apache-2.0
"""Measured choices: kept, read once, refused by name where they are not for here, and obeyed."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from resnet_fast import _env
from resnet_fast.dispatch import heuristics, table, tuning
from resnet_fast.dispatch import tiles as tables
from resnet_fast.dispatch.problem import ConvProblem
from resnet_fast.dispatch.tuning import Choice
from resnet_fast.spec import ConvSpec

OP = "conv_bn_act"
GPU = "NVIDIA A100-SXM4-80GB"
SPEC = ConvSpec(8, 14, 14, 256, 256, 3, 3, (1, 1), (1, 1), norm=True)
PROBLEM = ConvProblem(
    spec=SPEC, device="cuda", arch=80, x="channels_last", weight="channels_last", residual="",
    x_strides=(14 * 14 * 256, 14 * 256, 256), vectors=True, vector_dtypes=("float16",) * 4,
    tracked=True, aligned=True, gpu=GPU,
)  # fmt: skip
SLOWEST = max(
    (row for row in heuristics.explain(SPEC, 80, tables.CUDA[ConvSpec]) if row.refusal is None),
    key=lambda row: row.microseconds,
).tile
USUAL = heuristics.choose(SPEC, 80, tables.CUDA[ConvSpec])
CHOICES = (
    Choice("aten", "", 10.0),
    Choice("cuda", str(SLOWEST), 11.5),
)


@pytest.fixture
def tiles(built, monkeypatch):
    """The tiles that the backend `cuda` was built with."""
    found = []

    def build(problem, tile=None):
        found.append(tile)
        return lambda *tensors: None

    ours = table.row_of(OP, "cuda")
    rows = (replace(row, build=build) if row is ours else row for row in table.ROWS)
    monkeypatch.setattr(table, "ROWS", tuple(rows))
    return found


def warned(call):
    """What a call returns, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in found]


def test_what_was_stored_is_read_back(cache):
    path = tuning.store(GPU, {(OP, SPEC): CHOICES})
    assert path == cache / "nvidia-a100-sxm4-80gb.tuned.json"
    assert tuning.measured(GPU, OP, SPEC) == CHOICES
    assert tuning.measured(GPU, OP, replace(SPEC, n=9)) == ()
    assert tuning.measured("another", OP, SPEC) == () == tuning.measured("", OP, SPEC)


def test_storing_adds_and_replaces(cache):
    other = replace(SPEC, n=16, stride=(2, 1))
    tuning.store(GPU, {(OP, SPEC): CHOICES, (OP, other): CHOICES[:1]})
    tuning.store(GPU, {(OP, SPEC): CHOICES[1:]})
    assert tuning.measured(GPU, OP, SPEC) == CHOICES[1:]
    assert tuning.measured(GPU, OP, other) == CHOICES[:1]


def test_two_that_store_at_the_same_time_keep_each_others_choices(monkeypatch, cache):
    read, both = tuning._read, threading.Barrier(2)

    def read_together(path, gpu):
        kept = read(path, gpu)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)  # until the other has read as well, if nothing keeps it from it
        return kept

    specs = [replace(SPEC, n=n) for n in (1, 2)]
    with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(tuning, "_read", read_together)
        list(pool.map(lambda spec: tuning.store(GPU, {(OP, spec): CHOICES}), specs))
    assert [tuning.measured(GPU, OP, spec) for spec in specs] == [CHOICES, CHOICES]


def test_a_folder_that_stays_locked_is_an_error_and_not_a_hang(monkeypatch, cache):
    tuning.store(GPU, {(OP, SPEC): CHOICES})
    monkeypatch.setattr(tuning, "LOCK_SECONDS", 0.01)
    with FileLock(cache / tuning.LOCK), pytest.raises(OSError, match="lock"):
        tuning.store(GPU, {(OP, SPEC): CHOICES})


def test_precision_makes_no_difference_to_half(cache):
    single = replace(SPEC, dtype="float32")
    tuning.store(GPU, {(OP, SPEC): CHOICES, (OP, single): CHOICES})
    assert tuning.measured(GPU, OP, replace(SPEC, precision="ieee")) == CHOICES
    assert tuning.measured(GPU, OP, replace(single, precision="ieee")) == ()


DAMAGED = {
    "empty": "",
    "cut": '{"format": 1, "gp',
    "list": "[]",
    "no-versions": json.dumps({"format": 1, "gpu": GPU}),
    "spec": json.dumps({"format": 1, "gpu": GPU, "versions": None, "choices": []}),
    "binary": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_name_once_and_does_no_harm(name, cache, tiles):
    content = DAMAGED[name]
    cache.mkdir()
    file = tuning.path_of(GPU)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    plan, said = warned(lambda: table.plan(PROBLEM))
    assert plan.backend == "cuda" and tiles == [USUAL]
    assert len(said) == 1 and str(file) in said[0]
    assert "damaged" in said[0] or "cannot be read" in said[0]
    assert warned(lambda: table.plan(PROBLEM))[1] == []
    tuning.store(GPU, {(OP, SPEC): CHOICES})  # and is written over
    assert tuning.measured(GPU, OP, SPEC) == CHOICES


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))
    tuning._loaded.cache_clear()


@pytest.mark.parametrize("name", ["torch", "triton", "resnet_fast", "extension"])
def test_a_file_of_other_versions_is_refused_by_name(name, cache):
    file = tuning.store(GPU, {(OP, SPEC): CHOICES})
    edit(file, versions={**tuning.versions(), name: "0.0.1"})
    found, said = warned(lambda: tuning.measured(GPU, OP, SPEC))
    assert found == () and len(said) == 1
    assert all(word in said[0] for word in (str(file), f"{name} 0.0.1", "resnet-fast tune"))


def test_another_format_or_gpu_is_refused(cache):
    file = tuning.store(GPU, {(OP, SPEC): CHOICES})
    for other in (1, 99):  # 1: by convolution alone, without its op
        edit(file, format=other)
        found, said = warned(lambda: tuning.measured(GPU, OP, SPEC))
        assert found == () and f"format {other}" in said[0] and "resnet-fast tune" in said[0]
        tuning._loaded.cache_clear()
    edit(file, format=tuning.FORMAT, gpu="NVIDIA A100 SXM4 80GB")  # whose file has the same name
    assert "measured on" in warned(lambda: tuning.measured(GPU, OP, SPEC))[1][0]


def test_a_damaged_choice_is_no_choice(cache):
    file = tuning.store(GPU, {(OP, SPEC): CHOICES})
    content = json.loads(file.read_text())
    (choices,) = content["choices"].values()
    choices[1]["microseconds"] = "quick"
    edit(file, choices=content["choices"])
    found, said = warned(lambda: tuning.measured(GPU, OP, SPEC))
    assert found == () and "damaged" in said[0]


def test_a_rebuilt_extension_is_another(built):
    before = tuning.versions()["extension"]
    tuning.versions.cache_clear()
    built.binary.write_bytes(b"other kernels")
    assert tuning.versions()["extension"] != before
    assert len(before) == 12


def test_a_write_that_fails_leaves_what_was(cache, monkeypatch):
    tuning.store(GPU, {(OP, SPEC): CHOICES})

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="no space"):
        tuning.store(GPU, {(OP, SPEC): CHOICES[:1]})
    assert tuning.measured(GPU, OP, SPEC) == CHOICES
    assert {file.name for file in cache.iterdir()} == {tuning.path_of(GPU).name, tuning.LOCK}


def test_clear_removes_the_files_and_nothing_else(cache):
    tuning.store(GPU, {(OP, SPEC): CHOICES})
    (cache / "notes.json").write_text("{}")
    assert [file.name for file in tuning.clear()] == ["nvidia-a100-sxm4-80gb.tuned.json"]
    assert tuning.measured(GPU, OP, SPEC) == () and tuning.clear() == []
    assert {file.name for file in cache.iterdir()} == {"notes.json", tuning.LOCK}


# ---- the folder


def test_the_folder_is_the_variables_or_the_users(monkeypatch, tmp_path):
    assert _env.cache_folder() == Path(os.environ["RESNET_FAST_CACHE"])
    monkeypatch.delenv("RESNET_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _env.cache_folder() == tmp_path / "resnet_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _env.cache_folder() == Path.home() / ".cache" / "resnet_fast"


def test_without_any_folder_nothing_is_measured_or_kept(monkeypatch):
    monkeypatch.setattr(_env, "cache_folder", lambda: None)
    assert tuning.measured(GPU, OP, SPEC) == () and tuning.clear() == []
    with pytest.raises(OSError, match="RESNET_FAST_CACHE"):
        tuning.store(GPU, {(OP, SPEC): CHOICES})


# ---- what is done with them


def test_the_measured_backend_is_taken_and_says_so(tiles):
    assert table.plan(PROBLEM).backend == "cuda"
    tuning.store(GPU, {(OP, SPEC): CHOICES})
    plan = table.plan(PROBLEM)
    assert plan.backend == "aten" and plan.why == "measured: 10.0 us"
    assert table.explain(PROBLEM)[1]["cuda"] == "aten comes first: measured: 10.0 us"


def test_the_measured_tile_is_taken(tiles):
    assert USUAL != SLOWEST
    tuning.store(GPU, {(OP, SPEC): CHOICES[::-1]})
    plan = table.plan(PROBLEM)
    assert plan.backend == "cuda" and plan.tile == SLOWEST
    assert tiles == [SLOWEST]  # as the table has it, its reason included


def test_who_asks_for_a_backend_gets_it_with_its_measured_tile(tiles, monkeypatch):
    tuning.store(GPU, {(OP, SPEC): CHOICES})
    assert table.plan(PROBLEM, "cuda").backend == "cuda"
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cuda")
    assert table.plan(PROBLEM).why == "asked for"
    assert tiles == [SLOWEST] * 2


REFUSED = next(
    row for row in heuristics.explain(SPEC, 80, tables.CUDA[ConvSpec])
    if row.refusal and row.tile.SPLIT_K > 1
).tile  # fmt: skip


@pytest.mark.parametrize("tile", [replace(SLOWEST, BLOCK_M=96), REFUSED], ids=["gone", "refused"])
def test_a_tile_that_may_not_be_used_now_is_left_to_the_heuristics(tile, tiles):
    tuning.store(GPU, {(OP, SPEC): (Choice("cuda", str(tile), 1.0),)})
    assert table.plan(PROBLEM).backend == "cuda" and tiles == [USUAL]


def test_a_measured_backend_that_refuses_is_passed_over(tiles):
    tuning.store(GPU, {(OP, SPEC): (Choice("cuda", "", 1.0), Choice("aten", "", 2.0))})
    plan = table.plan(replace(PROBLEM, aligned=False))
    assert plan.backend == "aten" and "16 bytes" in plan.refusals["cuda"]


def test_a_backend_that_is_unknown_here_is_passed_over(tiles):
    tuning.store(GPU, {(OP, SPEC): (Choice("wonder", "", 0.1), Choice("aten", "", 2.0))})
    assert table.plan(PROBLEM).backend == "aten"


def test_the_file_is_read_once(tiles, monkeypatch):
    tuning.store(GPU, {(OP, SPEC): CHOICES})
    reads = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: reads.append(a) or read(*a, **k))
    for n in (8, 9, 8):
        table.plan(replace(PROBLEM, spec=replace(SPEC, n=n)))
    assert len(reads) == 1


def test_no_file_is_looked_for_on_a_cpu(monkeypatch):
    monkeypatch.setattr(tuning, "path_of", lambda gpu: pytest.fail("looked for a file"))
    spec = replace(SPEC, dtype="float32", precision="ieee")
    assert table.plan(replace(PROBLEM, spec=spec, device="cpu", gpu="")).backend == "cpu"


def test_the_op_names_no_gpu_on_a_cpu():

    from resnet_fast import ops

    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    call = ops.Call(x, torch.randn(8, 8, 1, 1), torch.ones(8), torch.zeros(8))
    with torch.no_grad():
        assert ops.CONV_BN_ACT.plan_of(call).problem.gpu == ""
