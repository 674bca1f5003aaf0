"""Scoring a validation stream, and score-first test-time training."""

from hymba_lightning.evaluation.score import Score, score_batches, score_tokens
from hymba_lightning.evaluation.ttt import ScoreFirstTTT, TTTConfig, score_first_ttt

__all__ = ["Score", "ScoreFirstTTT", "TTTConfig", "score_batches", "score_first_ttt", "score_tokens"]
