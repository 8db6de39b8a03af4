"""The parts of the evaluations: features, metrics, reports."""
