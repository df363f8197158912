"""Training: batches, update steps, optimizers, evaluation, reports and benchmarks."""
