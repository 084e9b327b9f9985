# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit status, and the error for input that it cannot use."""

AGREES, DISAGREES, BAD_INPUT, SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130


class BadInput(Exception):
    """The command cannot do what its options say; the text says why."""
