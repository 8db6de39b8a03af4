"""The captions of HowTo100M: read, packed, listed."""
