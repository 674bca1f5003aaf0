"""Train, export and score a Hymba language model against the clock."""

__version__ = "0.1.0"
