"""``cka-probe check``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cka_probe.runtime.terminal import print_result

EXIT_FAILED_CHECK = 1


@dataclass(frozen=True)
class Check:
    """Check the measures on this machine: controls with known answers, and golden values."""

    device: str = "auto"
    """Device: auto (CUDA if available), cpu, cuda, cuda:1, ..."""

    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32"
    """Data type of the features."""

    def run(self, command: str) -> int:
        from cka_probe.check import run_checks

        failed, checks = 0, run_checks(device=self.device, dtype=self.dtype)
        print_result(f"{'check':52} {'expected':>12} {'found':>12} {'tolerance':>10}")
        for check in checks:
            verdict = "pass" if check.passed else "FAIL"
            print_result(
                f"{check.name:52} {check.expected:12.9f} {check.found:12.9f} {check.tolerance:10.1e}  {verdict}"
            )
            failed += not check.passed
        print_result(f"{failed} failed" if failed else "All hold.")
        return EXIT_FAILED_CHECK if failed else 0
