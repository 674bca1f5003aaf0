"""The state-space dual recurrence as matrix products over chunks (Mamba-2, arXiv:2405.21060, section 6), on any device.

Inside a chunk every token reads every earlier one through one masked matrix, as attention does; between chunks only
states pass, and which share of a state reaches which later chunk is a small matrix too. There is no loop over tokens,
and all shapes are fixed, so that a compiler sees a handful of products. With documents the masks leave out what is of
an earlier one, and running sums begin anew with each, so that no rounding of one gets into the next.

B batch, T sequence, H heads, P channels of a head, G groups, R heads of a group, N states, C chunks, L tokens of a
chunk, M = P·N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_lightning.ops.registry import Backend

# Tokens of a chunk: what is done within grows with it, the number of states to be passed on falls.
CHUNK = 64
# Chunks whose states are passed on in one product; more are passed on group by group.
SPAN = 32


def ssd_chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    initial_state_BHPN: Tensor,
    doc_position_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `ssd_naive` computes; products are of x's dtype, decays and states float32."""
    batch, length, heads, channels = x_BTHP.shape
    groups, states = B_BTGN.shape[2:]
    chunk = min(CHUNK, length)
    n_chunks = -(-length // chunk)
    missing = n_chunks * chunk - length

    def cut(operand: Tensor) -> Tensor:
        """(B, T, X, …) → (B, C, X, L, …), padded with zeros: a step of 0 changes no state."""
        padded = F.pad(operand, (*[0, 0] * (operand.ndim - 2), 0, missing)) if missing else operand
        return padded.unflatten(1, (n_chunks, chunk)).transpose(2, 3)

    x_BCGRLP = cut(x_BTHP).unflatten(2, (groups, -1))
    step_BTH = F.softplus(dt_BTH.float() + dt_bias_H.float())
    step_BCGRL = cut(step_BTH).unflatten(2, (groups, -1))
    B_BCGLN, C_BCGLN = cut(B_BTGN), cut(C_BTGN)
    # Sums of decays are differences of running ones: float64, since those get large.
    rates_BCGRL = step_BCGRL.double() * A_H.double().view(groups, -1, 1)
    if doc_position_BT is None:
        seen = seen_from_end = from_before = kept = None
        passed_BCGRL = rates_BCGRL.cumsum(-1)
    else:
        position_BCL = cut_positions(doc_position_BT, n_chunks, chunk)
        index_L = torch.arange(chunk, device=position_BCL.device)
        distance_LL = index_L[:, None] - index_L
        seen_BCLL = (distance_LL >= 0) & (distance_LL <= position_BCL[..., None])
        seen, seen_from_end = seen_BCLL[:, :, None, None], seen_BCLL[:, :, None, None, -1]
        from_before = (position_BCL > index_L)[:, :, None, None]
        kept = from_before[..., 0, 0, -1][:, None]
        passed_BCGRL = (rates_BCGRL.flatten(2, 3) @ seen_BCLL.mT.double()).view_as(rates_BCGRL)

    weights_BCGRLL = decays(passed_BCGRL, passed_BCGRL, seen) * step_BCGRL[..., None, :]
    scores_BCGLL = C_BCGLN @ B_BCGLN.mT
    y_BCGRLP = (weights_BCGRLL * scores_BCGLL[:, :, :, None]).to(x_BTHP.dtype) @ x_BCGRLP

    # A chunk's own contribution to the state after it.
    left_BCGRL = exp_where(passed_BCGRL[..., -1:] - passed_BCGRL, seen_from_end) * step_BCGRL
    inflow_BCGRLP = (x_BCGRLP * left_BCGRL[..., None]).to(x_BTHP.dtype)
    ends_BCGRPN = inflow_BCGRLP.mT @ B_BCGLN[:, :, :, None]
    before_BHCM, final_BHM = pass_on(
        passed_BCGRL[..., -1].flatten(2).transpose(1, 2),
        ends_BCGRPN.float().flatten(2, 3).transpose(1, 2).flatten(-2),
        initial_state_BHPN.float().flatten(-2),
        kept,
    )
    before_BCGRPN = before_BHCM.transpose(1, 2).unflatten(2, (groups, -1)).unflatten(-1, (channels, states))
    read_BCGRLP = C_BCGLN[:, :, :, None] @ before_BCGRPN.to(x_BTHP.dtype).mT
    y_BCGRLP = y_BCGRLP.float() + read_BCGRLP.float() * exp_where(passed_BCGRL, from_before)[..., None]
    y_BTHP = y_BCGRLP.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]
    y_BTHP = y_BTHP + x_BTHP.float() * D_H.float()[:, None]
    return y_BTHP.to(x_BTHP.dtype), final_BHM.view(batch, heads, channels, states)


def cut_positions(doc_position_BT: Tensor, n_chunks: int, chunk: int) -> Tensor:
    """Document positions cut into whole chunks (B, C, L); padding at the end goes on with the last document."""
    missing = n_chunks * chunk - doc_position_BT.size(1)
    behind_X = torch.arange(1, missing + 1, dtype=torch.int32, device=doc_position_BT.device)
    return torch.cat([doc_position_BT, doc_position_BT[:, -1:] + behind_X], dim=1).unflatten(1, (n_chunks, chunk))


def exp_where(exponent: Tensor, wanted: Tensor | None) -> Tensor:
    """exp in float32, 0 where it is not wanted; None wants all."""
    if wanted is not None:
        exponent = exponent.masked_fill(~wanted, float("-inf"))
    return exponent.float().exp()


def decays(after: Tensor, before: Tensor, seen: Tensor | None = None) -> Tensor:
    """exp(after_i − before_j) (…, I, J) float32 of running sums (…, I) and (…, J), 0 where j comes after i, or where j
    is not `seen` (…, I, J)."""
    difference = after[..., :, None] - before[..., None, :]
    if seen is None:
        seen = torch.ones(difference.shape[-2:], dtype=torch.bool, device=after.device).tril()
    return exp_where(difference, seen)


def pass_on(
    total_BHC: Tensor, ends_BHCM: Tensor, initial_BHM: Tensor, kept_B1C: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The states before each of C chunks (B, H, C, M), and after the last (B, H, M).

    total: each chunk's sum of dt·A, float64; ends: the state after it if the one before were 0; initial: the state
    before the first. kept: whether something of the state before a chunk is left after it; None: of each.
    """
    count = total_BHC.size(-1)
    if count > SPAN:
        missing = -count % SPAN
        grouped_BHKS = F.pad(total_BHC, (0, missing)).unflatten(-1, (-1, SPAN))
        ends_BHKSM = F.pad(ends_BHCM, (0, 0, 0, missing)).unflatten(2, (-1, SPAN))
        kept_B1KS = kept_B1K = from_start_B1KS = None
        if kept_B1C is not None:
            kept_B1KS = F.pad(kept_B1C, (0, missing), value=True).unflatten(-1, (-1, SPAN))
            kept_B1K, lost_B1KS = kept_B1KS.all(-1), ~kept_B1KS
            from_start_B1KS = lost_B1KS.cumsum(-1) == lost_B1KS
        # Each group from a state of 0, then what the groups before hand it.
        nothing_BHKM = torch.zeros_like(ends_BHKSM[..., 0, :])
        inside_BHKSM, after_BHKM = pass_on_few(grouped_BHKS, ends_BHKSM, nothing_BHKM, kept_B1KS)
        start_BHKM, final_BHM = pass_on(grouped_BHKS.sum(-1), after_BHKM, initial_BHM, kept_B1K)
        reached_BHKS = exp_where(grouped_BHKS.cumsum(-1) - grouped_BHKS, from_start_B1KS)
        before = inside_BHKSM + reached_BHKS[..., None] * start_BHKM[..., None, :]
        return before.flatten(2, 3)[:, :, :count], final_BHM
    return pass_on_few(total_BHC, ends_BHCM, initial_BHM, kept_B1C)


def pass_on_few(total: Tensor, ends: Tensor, initial: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """`pass_on` in one product: total (…, C), ends (…, C, M), initial (…, M), kept (…, C)."""
    seen = None
    if kept is None:
        passed = F.pad(total.cumsum(-1), (1, 0))
    else:
        losses = F.pad((~kept).cumsum(-1), (1, 0))
        seen = (losses[..., :, None] == losses[..., None, :]).tril()
        passed = (total.masked_fill(~kept, 0)[..., None, :] * seen[..., 1:]).sum(-1)
    reached = decays(passed, passed, seen) @ torch.cat([initial[..., None, :], ends], dim=-2)
    return reached[..., :-1, :], reached[..., -1, :]


BACKEND = Backend("plain PyTorch, products over chunks", lambda: ssd_chunked, auto={"any": 10})
