"""Lightning callbacks of a run: clock, average, loss guard, checkpoints, progress, export, summary."""
