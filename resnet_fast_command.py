# SPDX-License-Identifier: Apache-2.0
"""Where the command `resnet-fast` starts: outside the package, whose import may be interrupted.

torch comes with the package and takes a second or more; Ctrl-C then ends as it does later.
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
