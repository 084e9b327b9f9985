# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a convolution, with which tile, and why the others do not."""
