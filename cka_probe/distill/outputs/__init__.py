"""The files of a distillation: records, curves, exported student, report."""
