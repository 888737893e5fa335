"""``python -m cka_probe``: the command line, whose imports can be interrupted, too."""

from __future__ import annotations

import sys

from cka_probe.runtime.interrupts import ignore_signals, interruptible


def main() -> int:
    """Run the command line of this process and return its exit code; from then on, no signal changes it."""
    try:
        with interruptible():
            from cka_probe.cli.main import main as run

            return run()
    except KeyboardInterrupt:
        print("cka-probe: interrupted; nothing was written. The same command starts again.", file=sys.stderr)
        return 130
    finally:
        ignore_signals()


if __name__ == "__main__":
    sys.exit(main())
