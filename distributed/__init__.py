"""Start the processes of a run, watch them, and read samples in worker processes."""
