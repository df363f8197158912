"""Hand-written kernels, each next to its plain reference."""
