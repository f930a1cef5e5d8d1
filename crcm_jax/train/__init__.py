"""Training: state, step, loop, optimiser, averages, checkpoints, logs."""
