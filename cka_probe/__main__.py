"""``python -m cka_probe``: the command line."""

import sys

from cka_probe.cli import main

sys.exit(main())
