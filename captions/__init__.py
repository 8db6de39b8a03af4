"""Captions of videos, of HowTo100M and others: parsed, read, packed."""
