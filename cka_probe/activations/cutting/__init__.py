"""How a network is cut: its forward pass is recorded, the graph split, and each part run by a module of its own."""
