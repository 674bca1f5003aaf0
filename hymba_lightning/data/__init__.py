"""Text to batches: shards on disk, spans of tokens, bytes per target, the LightningDataModule."""
