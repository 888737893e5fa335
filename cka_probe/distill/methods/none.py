"""From scratch: the labels alone. The baseline that every claim needs, and the way to train a teacher."""

from __future__ import annotations

from cka_probe.distill.methods.method import Method, Needs


class Scratch(Method):
    """Cross-entropy with the labels."""

    summary = "Labels alone, without a teacher: the baseline, and the way to train a teacher."

    needs_teacher = False
    needs = Needs()
