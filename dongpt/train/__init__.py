"""Data files to weights: batches, one update, optimizers, losses, cost."""
