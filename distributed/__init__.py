"""Start the processes of a run, and keep them together."""
