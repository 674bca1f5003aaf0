"""A run → the challenge's folder: artifact, self-contained evaluation code, logs, and the proof that they agree."""
