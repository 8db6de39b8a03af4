"""The parts of search.py: the index's file, the search and its page."""
