"""Scoring a validation stream, and score-first test-time training."""

from hymba_lightning.evaluation.config import TTTConfig
from hymba_lightning.evaluation.score import Score, score_tokens
from hymba_lightning.evaluation.ttt import ChunkScore, ScoreFirstTTT, score_first_ttt

__all__ = [
    "ChunkScore",
    "Score",
    "ScoreFirstTTT",
    "TTTConfig",
    "score_first_ttt",
    "score_tokens",
]
