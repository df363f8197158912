"""Hand-written CPU kernels and their reference implementations."""
