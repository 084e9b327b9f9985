# SPDX-License-Identifier: Apache-2.0
"""Where a model's time goes: its layers, what bounds them, and how close to the bound they run."""
