# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule can fail: each test here has a result that it must not let pass."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_fast.agreement import FACTOR, Verdict, bound, compare, error
from tests.support.tolerance import assert_within

NAN, INF = math.nan, math.inf


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def test_error_is_relative_to_the_largest_magnitude():
    assert error(vector(1.0, -4.0), vector(1.0, -4.0)) == 0
    assert error(vector(1.5, -4.0), vector(1.0, -4.0)) == 0.125
    assert error(vector(1.0, -4.0, 100.0) * 1e-20, vector(1.0, -4.0, 50.0) * 1e-20) == 1.0


def test_error_where_the_reference_is_zero():
    assert error(vector(0.0), vector(0.0)) == 0
    assert error(vector(1e-3), vector(0.0)) > 1


def test_error_of_nothing_is_zero():
    assert error(vector(), vector()) == 0


def test_error_of_equal_special_values():
    special = vector(NAN, INF, -INF, 2.0)
    assert error(special.clone(), special) == 0
    assert error(vector(NAN, INF, -INF, 3.0), special) == 0.5
    assert error(vector(NAN, NAN), vector(NAN, NAN)) == 0


WRONG = {
    "nan-for-a-number": (NAN, 1.0),
    "number-for-nan": (1.0, NAN),
    "zero-for-nan": (0.0, NAN),
    "half-for-nan": (0.5, NAN),
    "infinity-for-nan": (INF, NAN),
    "nan-for-infinity": (NAN, INF),
    "infinity-of-the-other-sign": (-INF, INF),
    "number-for-infinity": (1.0, INF),
    "largest-number-for-infinity": (torch.finfo(torch.float64).max, INF),
    "smallest-number-for-infinity": (torch.finfo(torch.float64).min, -INF),
    "infinity-for-a-number": (INF, 1.0),
}


@pytest.mark.parametrize("name", WRONG)
def test_special_values_in_the_wrong_place_never_agree(name):
    y, expected = WRONG[name]
    reference = vector(1.0, expected, 3.0)
    verdict = compare(vector(1.0, y, 3.0), reference.clone(), reference)
    assert not verdict.agrees
    with pytest.raises(AssertionError):
        assert_within(vector(1.0, y, 3.0), reference.clone(), reference, k_gemm=1)


def test_swapped_special_values_do_not_agree():
    assert math.isnan(error(vector(NAN, INF), vector(INF, NAN)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k_gemm", [1, 576, 4608])
def test_bound_is_the_formula(dtype, k_gemm):
    eps = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    expected = 2 * 0.01 + eps / 2 + math.sqrt(k_gemm) * 2.0**-23
    assert bound(0.01, dtype, k_gemm) == pytest.approx(expected, rel=1e-12)


def test_bound_is_tight_enough_to_mean_something():
    """For the largest convolution of a ResNet, without an error of eager's: under one percent."""
    assert bound(0.0, torch.float32, 4608) < 1e-5
    assert bound(0.0, torch.float16, 4608) < 1e-3
    assert bound(0.0, torch.bfloat16, 4608) < 5e-3


@pytest.mark.parametrize("above", [0.999, 1.001])
def test_the_limit_is_where_it_says(above):
    reference = vector(1.0, 2.0, -8.0)
    eager = reference + vector(0.0, 0.08, 0.0)
    limit = bound(0.01, torch.float64, 64)
    ours = reference + vector(0.0, 0.0, 8.0 * limit * above)
    verdict = compare(ours, eager, reference, 64)
    assert verdict.limit == pytest.approx(limit)
    assert verdict.agrees == (above < 1)


def test_a_factor_of_two_and_no_more():
    assert FACTOR == 2
    reference = vector(1.0, 1.0)
    eager = reference + vector(0.25, 0.0)
    assert compare(reference + vector(0.49, 0.0), eager, reference).agrees
    assert not compare(reference + vector(0.51, 0.0), eager, reference).agrees


def test_half_an_ulp_of_a_narrow_dtype_is_forgiven_and_a_whole_one_is_not():
    reference = torch.ones(3, dtype=torch.float64)
    eager = torch.ones(3, dtype=torch.bfloat16)
    ours = eager.clone()
    ours[1] = 1 + 2.0**-7
    assert not compare(ours, eager, reference).agrees
    ours[1] = 1 - 2.0**-8
    assert compare(ours, eager, reference).agrees


def test_the_dtype_is_that_of_our_result():
    """An fp32 result that is only as exact as bf16 does not agree."""
    reference = torch.linspace(1, 2, 7, dtype=torch.float64)
    eager = reference.float()
    assert not compare(reference.bfloat16().float(), eager, reference).agrees
    assert compare(reference.float(), eager, reference).agrees


def test_eager_with_a_nan_of_its_own_excuses_nothing():
    reference = vector(1.0, 2.0)
    assert not compare(vector(1.0, 2.5), vector(1.0, NAN), reference).agrees


def test_a_verdict_says_what_it_weighed():
    good, bad = Verdict(0.1, 0.05, 0.2), Verdict(0.3, 0.05, 0.2)
    assert good.agrees and str(good) == "error 0.1 <= 0.2 (eager's own is 0.05)"
    assert not bad.agrees and str(bad) == "error 0.3 exceeds 0.2 (eager's own is 0.05)"


def test_assert_within_names_the_case_and_the_shape():
    reference = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"stem: error 1 exceeds"):
        assert_within(reference * 2, reference, reference, 1, "stem")
    with pytest.raises(AssertionError, match=r"stem: shape \(3,\), not \(2, 3\)"):
        assert_within(reference[0], reference, reference, 1, "stem")
    assert_within(reference, reference, reference, 1)
