"""From a model spec to a network, its preprocessing and its classes."""
