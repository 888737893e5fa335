"""The measures of similarity: one a file, all of them in `catalogue`."""
