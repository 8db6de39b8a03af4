"""Read the annotations of the evaluation data sets: CSV tables and the official files."""
