# SPDX-License-Identifier: Apache-2.0
"""Where the command `resnet-fast` starts.

It is outside the package because importing that, with torch, takes a second or more: Ctrl-C during
the import must end the command in the same way as later.
"""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from resnet_fast.cli import main as run
    except KeyboardInterrupt:
        print("resnet-fast: interrupted", file=sys.stderr)
        return 130
    return run()
