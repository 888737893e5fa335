"""Bags of visual words (OBoW, Gidaris et al. 2021, arXiv 2012.11552): vocabulary, codes, bags and their prediction."""
