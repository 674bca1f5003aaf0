"""Muon's passes in Triton: three kernels for the matrices of a bank that are stored alike, wherever they lie.

A step of momentum and decay is rounded as torch's operators round it; norms differ from theirs in the last digit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hymba_lightning.ops.muon_passes import Bank, Update
from hymba_lightning.ops.muon_passes.backend_torch import EPS
from hymba_lightning.ops.muon_passes.triton_kernels import add_gradients, fill_bank, move_parameters

# Elements of a turn of a program that sums rows, and rows and columns of a block.
TURN, LONGEST_TURN = 2048, 512
BLOCK = 64
SUMS = 512
# Products are rounded before they are added, as torch does in two operators; what it fuses is fused by name.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@functools.lru_cache(maxsize=4)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """(3, matrices), kept as long as gradients stay where they are."""
    return torch.tensor(addresses, dtype=torch.int64).view(3, -1).to(device, non_blocking=True)


def _power(size: int, largest: int) -> int:
    return min(largest, triton.next_power_of_2(size))


@dataclass(frozen=True)
class _Part:
    """Consecutive matrices of a bank that are stored alike."""

    slot: int
    """Place of the first one in its bank."""
    count: int
    rows: int
    """Of the parameter, as `columns`."""
    columns: int
    turned: bool
    entry: int
    """Place of the first one in the table of addresses."""
    first_sum: int
    """Place of its first row among all rows."""

    def within(self, first: int, last: int) -> _Part:
        """Those of them that are members `first` to `last` of the bank."""
        skipped = max(first - self.slot, 0)
        count = max(min(last - self.slot, self.count) - skipped, 0)
        return _Part(
            self.slot + skipped,
            count,
            self.rows,
            self.columns,
            self.turned,
            self.entry + skipped,
            self.first_sum + skipped * self.rows,
        )

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_R": _power(self.rows, BLOCK), "BLOCK_C": _power(self.columns, BLOCK)}

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.blocks.values()
        return triton.cdiv(self.rows, rows) * triton.cdiv(self.columns, columns), self.count


class TritonPasses:
    """See `Passes`."""

    def __init__(self, update: Update, banks: Sequence[Bank]) -> None:
        self._update = update
        self._device = update.params[0].device
        self._parts: dict[Bank, list[_Part]] = {}
        entry = first_sum = 0
        for bank in banks:
            self._parts[bank] = []
            for turned in (False, True):
                count = len(bank.members) - bank.n_upright if turned else bank.n_upright
                rows, columns = (bank.columns, bank.rows) if turned else (bank.rows, bank.columns)
                if count:
                    slot = bank.n_upright if turned else 0
                    self._parts[bank].append(_Part(slot, count, rows, columns, turned, entry, first_sum))
                entry, first_sum = entry + count, first_sum + count * rows
        members = [i for bank in banks for i in bank.members]
        # Kept until the launches are in the stream.
        self._grads = [update.grads[i].contiguous() for i in members]
        tensors = (*self._grads, *(update.momenta[i] for i in members), *(update.params[i] for i in members))
        addresses = tuple(x.data_ptr() for x in tensors)
        self._aligned = all(address % 16 == 0 for address in addresses)
        self._table = _table(addresses, self._device)
        self._squares = torch.empty(first_sum, dtype=torch.float32, device=self._device)

    def _shared(self, part: _Part) -> dict[str, Any]:
        """Arguments of all three kernels."""
        return {
            "MATRICES": len(self._grads),
            "entry": part.entry,
            "ROWS": part.rows,
            "COLUMNS": part.columns,
            "ALIGNED": self._aligned,
        } | OPTIONS

    def momentum(self) -> None:
        u = self._update
        with torch.cuda.device_of(self._squares):
            for part in (part for parts in self._parts.values() for part in parts):
                block_c = _power(part.columns, LONGEST_TURN)
                block_r = _power(part.rows, TURN // block_c)
                add_gradients[(triton.cdiv(part.rows, block_r), part.count)](
                    table=self._table,
                    squares=self._squares,
                    first_sum=part.first_sum,
                    mu=float(u.momentum),
                    NESTEROV=u.nesterov,
                    BLOCK_R=block_r,
                    BLOCK_C=block_c,
                    **self._shared(part),
                )
        torch.autograd.graph.increment_version(u.momenta)

    def bank(self, bank: Bank, first: int, last: int, dtype: torch.dtype) -> Tensor:
        u = self._update
        bank_nRC = torch.empty(last - first, bank.rows, bank.columns, dtype=dtype, device=self._device)
        with torch.cuda.device_of(bank_nRC):
            for part in (whole.within(first, last) for whole in self._parts[bank]):
                if part.count:
                    fill_bank[part.grid](
                        table=self._table,
                        squares=self._squares,
                        bank=bank_nRC,
                        first_sum=part.first_sum,
                        slot=part.slot - first,
                        mu=float(u.momentum),
                        EPS=EPS,
                        NESTEROV=u.nesterov,
                        NORMALIZED=u.row_normalize,
                        TURNED=part.turned,
                        BLOCK_SUMS=_power(part.rows, SUMS),
                        **self._shared(part),
                        **part.blocks,
                    )
        return bank_nRC

    def apply(self, bank: Bank, shares_WX: Tensor) -> None:
        u = self._update
        with torch.cuda.device_of(shares_WX):
            for part in self._parts[bank]:
                move_parameters[part.grid](
                    table=self._table,
                    updates=shares_WX,
                    slot=part.slot,
                    share=bank.share,
                    SHARES_APART=shares_WX.stride(0),
                    kept=1.0 - u.lr * u.weight_decay,
                    decay=-float(u.lr * u.weight_decay),
                    rate=-u.lr * max(1.0, part.rows / part.columns) ** 0.5,
                    CAUTIOUS=u.cautious,
                    TURNED=part.turned,
                    **self._shared(part),
                    **part.blocks,
                )
        # The kernels write where torch does not see it.
        torch.autograd.graph.increment_version([u.params[i] for i in bank.members])
