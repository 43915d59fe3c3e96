"""A training run: its config, loop, tasks, folder, log and checkpoints."""
