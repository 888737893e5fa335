"""From scratch: the labels alone. The baseline that every claim needs, and the way to train a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from cka_probe.distill.methods.method import Method, Needs


@dataclass(frozen=True, kw_only=True)
class Scratch(Method):
    """Cross-entropy with the labels."""

    name = "none"
    summary = "Labels alone, without a teacher: the baseline, and the way to train a teacher."
    needs_teacher = False
    needs = Needs()
    trains_heads = True

    @classmethod
    def report_title(cls) -> str:
        """See `Method.report_title`."""
        return "Trained from labels alone"
