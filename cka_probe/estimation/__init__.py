"""What measures share: kernels, Gram matrices, sums, kept features, resampling."""
