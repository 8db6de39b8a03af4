"""The annotations of the evaluation data sets: tables that users give, and official files."""
