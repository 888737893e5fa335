"""FBT's assistant: a network fused from the early stages of one network and the last of another (arXiv 2410.12342)."""
