"""Several runs compared: the same command with one switch changed, over seeds."""
