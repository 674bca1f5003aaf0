"""What the context is worth in a trained network: measured by taking parts of its memory away."""
