"""Results -> pictures and pages: a file a figure, all of them listed in `cka_probe.reports.figures`."""
