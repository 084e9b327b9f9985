# SPDX-License-Identifier: Apache-2.0
"""Who is compared and in which form; an extra installs those that the README shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fast.comparison import providers

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
