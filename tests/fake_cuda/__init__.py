"""The GPU paths on fake CUDA tensors, which need no GPU."""
