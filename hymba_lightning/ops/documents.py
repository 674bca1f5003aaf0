"""Documents packed into one sequence: their positions, in the form that scan, convolution and attention take.

B batch, T sequence. A token's document position is the number of tokens before it in its own document. It sees the
token j places back only if j <= position: convolution and attention leave out what is further back, and the scan resets
its state at position 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(ids_BT: Tensor, bos_id: int, earlier_B: Tensor | None = None) -> Tensor:
    """Document positions (B, T) int32 of ids (B, T), in which `bos_id` starts a document.

    `earlier_B` (B,) is how many tokens of a row's first document came before the row; None for none.
    """
    index_T = torch.arange(ids_BT.size(1), dtype=torch.int32, device=ids_BT.device)
    before_B1 = index_T.new_zeros(()) if earlier_B is None else -earlier_B.to(torch.int32)[:, None]
    start_BT = torch.where(ids_BT == bos_id, index_T, before_B1)
    return index_T - start_BT.cummax(1).values


def check_doc_position(op: str, doc_position_BT: Tensor | None, like_BTX: Tensor) -> None:
    """Raises ValueError unless there is none, or one int32 number for each token of a sequence (B, T, …)."""
    if doc_position_BT is None:
        return
    if doc_position_BT.shape != like_BTX.shape[:2] or doc_position_BT.dtype != torch.int32:
        raise ValueError(
            f"{op}: doc_position_BT must be int32 {tuple(like_BTX.shape[:2])}, not {doc_position_BT.dtype} "
            f"{tuple(doc_position_BT.shape)}"
        )
