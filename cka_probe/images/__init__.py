"""Images: found, read, sampled, and turned into what a network sees."""
