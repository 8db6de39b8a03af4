"""Parse, read and pack the captions of videos, from HowTo100M and other sources."""
