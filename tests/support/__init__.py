# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: cases, tolerances, kernels compiled for any GPU."""
