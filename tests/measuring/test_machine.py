# SPDX-License-Identifier: Apache-2.0
"""A result says what it was measured on: a processor that can be told from others, by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_fast.measuring import machine
from tests.benchmarking.fakes import ENVIRONMENT

CPUINFO = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {}\n\nmodel\t\t: 99\n"


@pytest.mark.parametrize(
    ("name", "told"),
    [("AMD EPYC", "AMD EPYC (family 25, model 17), "), ("AMD EPYC 9654", "AMD EPYC 9654, ")],
)
def test_a_processor_without_a_number_in_its_name_is_told_by_family_and_model(
    name, told, tmp_path, monkeypatch
):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(name))
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    found = machine.processor_name()
    assert found == told + torch.backends.cpu.get_cpu_capability()
    folder = machine.machine_name(replace(ENVIRONMENT, device=found))
    assert folder == "-".join(["cpu", *name.lower().split()[1:], "2-threads"])


def test_what_is_known_is_named_and_the_device_comes_first():
    assert str(ENVIRONMENT) == (
        "processor Test Processor, threads 2, clocks 2000 MHz, python 3.12, torch 2.14, "
        "resnet_fast 0.1.0, commit abc"
    )
    gpu = replace(ENVIRONMENT, kind="cuda", device="H100", processor="Test Processor")
    assert next(iter(gpu.named())) == "gpu" and gpu.named()["processor"] == "Test Processor"
