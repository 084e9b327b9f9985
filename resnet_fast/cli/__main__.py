# SPDX-License-Identifier: Apache-2.0
"""`python -m resnet_fast.cli` is the command `resnet-fast`."""

import sys

from resnet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
