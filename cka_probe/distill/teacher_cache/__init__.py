"""A teacher's outputs in training, stored once and used again by other runs (``--teacher-cache``)."""
