"""Figures, tables and pages of finished runs. The figures are listed in `cka_probe.reports.figures.catalogue`."""
