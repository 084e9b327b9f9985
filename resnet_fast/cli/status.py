# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit status, and the words where it could not begin."""

AGREES, DISAGREES, BAD_INPUT, SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130


class BadInput(Exception):
    """What the user asked for cannot be done; the text says why."""
