"""Bridges to other programs' networks and files."""

from hymba_lightning.interop.checkpoint import ReferenceFileError, read_reference_checkpoint
from hymba_lightning.interop.reference import from_reference, import_reference, to_reference

__all__ = ["ReferenceFileError", "from_reference", "import_reference", "read_reference_checkpoint", "to_reference"]
