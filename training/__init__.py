"""The parts of a training: step, optimizer, checkpoints, log."""
