"""A run: one folder, one record of what was trained and scored, one end."""

from hymba_lightning.run.folder import RunFolder
from hymba_lightning.run.record import RunRecord, ScoreRecord
from hymba_lightning.run.run import Run

__all__ = ["Run", "RunFolder", "RunRecord", "ScoreRecord"]
