"""The figures of a report: a file a figure, all of them in `catalogue`."""
