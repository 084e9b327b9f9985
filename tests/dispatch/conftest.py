# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the extension, and a folder of measured choices for each test."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import resnet_fast.kernels
from resnet_fast.dispatch import tuning

NOT_BUILT = "the extension is not built (resnet-fast build)"


@pytest.fixture(autouse=True)
def extension(monkeypatch, tmp_path):
    """What stands for `kernels.cuda`: by default an extension that is not there."""
    binary = tmp_path / "_C.so"
    binary.write_bytes(b"kernels")
    stand_in = SimpleNamespace(
        missing=lambda: NOT_BUILT,
        architecture_refusal=lambda arch: None,
        module=lambda: SimpleNamespace(__file__=str(binary)),
        binary=binary,
    )
    monkeypatch.setitem(sys.modules, "resnet_fast.kernels.cuda", stand_in)
    monkeypatch.setattr(resnet_fast.kernels, "cuda", stand_in, raising=False)
    return stand_in


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path, extension):
    """The folder of measured choices: an empty one."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RESNET_FAST_CACHE", str(folder))

    def forget():
        tuning.versions.cache_clear()
        tuning._loaded.cache_clear()

    forget()
    yield folder
    forget()


@pytest.fixture
def gpu_is_here(monkeypatch):
    """As far as the backends ask, Triton's driver included."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("resnet_fast.kernels.launch.driver_fault", lambda: None)


@pytest.fixture
def built(monkeypatch, extension, gpu_is_here):
    """The extension is there, and so is a GPU."""
    monkeypatch.setattr(extension, "missing", lambda: None)
    tuning.versions.cache_clear()
    return extension
