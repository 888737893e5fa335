"""What a network computes, layer by layer: hooks, dry runs, layers, layouts, features."""
