# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a process that interprets the kernels, and processes that compile them."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.support import interpreted, nvcc

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def interpret():
    """interpret(check, *args): run a function of `checks` where kernels are interpreted."""
    with interpreted.pool(1) as pool:
        yield lambda check, *args, **options: pool.submit(check, *args, **options).result()


@pytest.fixture(scope="session")
def compile_pool(tmp_path_factory):
    """Processes that compile, into a cache of this test run: what passes was compiled just now."""
    root, processes = tmp_path_factory.getbasetemp(), 2
    if "PYTEST_XDIST_WORKER" in os.environ:
        root, processes = root.parent, 1  # the run's own folder, which its workers share
    cache = str(root / "triton_cache")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, compile_here, (cache,)) as pool:
        yield pool


def compile_here(cache: str) -> None:
    """Make this process compile into `cache`."""
    os.environ["TRITON_CACHE_DIR"] = cache
    nvcc.cache_folder = Path(cache) / "nvcc"
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are the other processes'
