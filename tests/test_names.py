# SPDX-License-Identifier: Apache-2.0
"""Names as people write them: one home, the same in every function and command."""

from __future__ import annotations

import pytest
import torch

from resnet_fast import _names, cli, models, tune
from resnet_fast.benchmarking import Request
from resnet_fast.comparison import compare
from resnet_fast.measuring import photographs
from resnet_fast.profiling.command import profile_by_name

SPELLINGS = {
    "fp32": torch.float32, "f32": torch.float32, "float": torch.float32, "Float32": torch.float32,
    "single": torch.float32, "torch.float32": torch.float32, "fp16": torch.float16,
    "half": torch.float16, "torch.half": torch.float16, "bf16": torch.bfloat16,
    "BFloat16": torch.bfloat16, "torch.bfloat16": torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_dtype_by_any_of_its_names(name):
    assert getattr(torch, _names.dtype(name)) is SPELLINGS[name]


def test_the_functions_of_the_commands_take_them():
    pictures = photographs.Photographs(["noise"], torch.randn(1, 3, 224, 224), {})
    found = compare("ResNet18", pictures, batches=[1], dtypes=["fp32"], device="cpu", seconds=0.01)
    assert found.model == "resnet18" and found.settings[0].dtype == "float32"
    found = profile_by_name("ResNet18", dtype="float", device="cpu", seconds=0)
    assert (found.model, found.dtype) == ("resnet18", "float32")
    request = Request(
        models=["ResNet18"], dtypes=["bf16", "fp32"], device="cpu", providers=["ATEN"]
    )
    assert list(request.models) == ["resnet18"]
    assert list(request.dtypes) == ["bfloat16", "float32"]
    specs = tune.convolutions("ResNet18", [1], ["half"])
    assert {spec.dtype for spec in specs} == {"float16"}
    tune.check(["triton"], ["half"])


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        pytest.param(["compare", "resnt50"], "did you mean resnet50", id="compare"),
        pytest.param(["profile", "resnt50"], "did you mean resnet50", id="profile"),
        pytest.param(["tune", "resnt50", "--dry-run"], "did you mean resnet50", id="tune"),
        pytest.param(["bench", "--models", "resnt50"], "did you mean resnet50", id="bench"),
        pytest.param(["bench", "op"], "did you mean ops", id="suite"),
        pytest.param(["bench", "--providers", "aton"], "did you mean aten", id="provider"),
        pytest.param(["tune", "--backend", "tritn"], "did you mean triton", id="backend"),
        pytest.param(["compare", "resnet18", "--dtype", "bfloat1"], "mean bfloat16", id="dtype"),
        pytest.param(["compar", "resnet18"], "did you mean compare", id="command"),
        pytest.param(["compare", "resnet18", "--bach", "1"], "did you mean --batch", id="option"),
        pytest.param(["profile", "resnet18", "--compare", "torchvison"], "torchvision", id="who"),
    ],
)
def test_the_nearest_is_suggested(arguments, meant, capsys):
    assert cli.main(arguments) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("resnet-fast: unknown ") and meant in error
    assert len(error.splitlines()) == 1


def test_models_are_listed_as_people_count():
    with pytest.raises(ValueError, match="known are resnet18, resnet34, resnet50, resnet101"):
        models.get_model("vgg16")
