"""DTW distances between many items at once: the mean angle between frames along the cheapest path.

A frame distance is arccos of the dot product / pi, 0 to 1; a null frame is 1 from all others and 0 from its like.  The
distances of all frames of a group of items to those they meet are one matrix product.  The dynamic programme then runs
over all pairs of like lengths together, one diagonal of their tables at a time.
Legend: N items, F frames, D dimensions, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

# Distinct frames up to which all their pairs are measured once, in a table: features that are tokens' vectors. Equal
# frames then have equal distances to the bit, and triplets of equal tokens tie, as they should.
CODEBOOK = 4096
CELLS = 1 << 26  # frame distances held at once (256 MiB): enough pairs of items of each pair of lengths
WAVE = 1 << 16  # cells of a diagonal over all pairs of a batch, so that three diagonals fit a core's cache


class ItemFrames:
    """Items' frames, (T, D) float32 each, in groups of items that are compared with the same others.

    Items are numbered through in that order.
    """

    def __init__(self, groups: Sequence[Sequence[np.ndarray]]):
        items = [x_TD for group in groups for x_TD in group]
        self.n = len(items)
        self.size_N = np.array([len(x_TD) for x_TD in items])
        self.first_N = np.cumsum(self.size_N) - self.size_N
        self.edges = np.cumsum([0, *map(len, groups)])
        x_FD = np.concatenate(items)
        self.code_F = None
        if len(_distinct(x_FD[:, :8])[0]) <= CODEBOOK:  # eight dimensions rule a codebook out at little cost
            distinct_KD, code_F = _distinct(x_FD)
            self.code_F = torch.from_numpy(code_F) if len(distinct_KD) <= CODEBOOK else None
        if self.code_F is not None:
            # float64, then rounded: arccos near 1 amplifies the rounding of the product
            unit_KD = _unit(torch.from_numpy(distinct_KD).double())
            table = _angles(unit_KD, unit_KD)
            self.table = ((table + table.T) / 2).fill_diagonal_(0.0).float()
        else:
            self.x_FD = _unit(torch.from_numpy(x_FD))

    def _block(self, rows: slice, columns_F: torch.Tensor) -> torch.Tensor:
        """Distances of a group's frames to the frames that it meets."""
        if self.code_F is not None:
            return self.table[self.code_F[rows]][:, self.code_F[columns_F]]
        return _angles(self.x_FD[rows], self.x_FD[columns_F])

    @torch.no_grad()
    def dtw(self, x_P: np.ndarray, y_P: np.ndarray) -> np.ndarray:
        """Distances (float32) of items x to items y; pairs sorted by x."""
        out = np.empty(len(x_P), np.float32)
        origin_P, stride_P = np.empty((2, len(x_P)), np.int64)  # offset of a pair's first cell, and from row to row
        held, total, begin = [], 0, 0
        bounds = np.searchsorted(x_P, self.edges).tolist()
        for first, last, lo, hi in zip(self.edges[:-1], self.edges[1:], bounds[:-1], bounds[1:], strict=True):
            if hi == lo:
                continue
            # The group's frames by the frames of all items that it meets, side by side: one product.
            met, where = np.unique(y_P[lo:hi], return_inverse=True)
            size, begins = self.size_N[met], np.cumsum(self.size_N[met]) - self.size_N[met]
            width = int(size.sum())
            columns_F = np.arange(width) + np.repeat(self.first_N[met] - begins, size)
            rows = slice(int(self.first_N[first]), int(self.first_N[last - 1] + self.size_N[last - 1]))
            held.append(self._block(rows, torch.from_numpy(columns_F)).flatten())
            origin_P[lo:hi] = total + (self.first_N[x_P[lo:hi]] - rows.start) * width + begins[where]
            stride_P[lo:hi] = width
            total += len(held[-1])
            # Enough cells are held, or no pair is left: run the dynamic programme, then free them.
            if total >= CELLS or hi == len(x_P):
                here = slice(begin, hi)
                pairs = (origin_P[here], stride_P[here], self.size_N[x_P[here]], self.size_N[y_P[here]])
                out[here] = _dtw(held, *map(torch.from_numpy, pairs))
                held, total, begin = [], 0, hi
        return out


def _unit(x_FD: torch.Tensor) -> torch.Tensor:
    """Frames of length 1. A further dimension separates null frames: -2 against others and +4e12 among them, clamped."""
    norm_F1 = x_FD.norm(dim=1, keepdim=True)
    x_FD = x_FD / norm_F1.clamp_min(torch.finfo(x_FD.dtype).tiny)
    null_F1 = norm_F1 == 0
    return torch.cat([x_FD, torch.where(null_F1, -2e6, 1e-6).to(x_FD)], 1) if null_F1.any() else x_FD


def _angles(a_FD: torch.Tensor, b_FD: torch.Tensor) -> torch.Tensor:
    return (a_FD @ b_FD.T).clamp_(-1, 1).acos_().div_(math.pi)


def _distinct(x_FD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows, the distinct row that each row equals); +0 and -0 are equal."""
    x_FD = np.ascontiguousarray(x_FD) + np.float32(0.0)
    rows, code_F = np.unique(x_FD.view(f"V{x_FD.shape[1] * 4}")[:, 0], return_inverse=True)
    return rows.view(np.float32).reshape(len(rows), -1), code_F


def _dtw(blocks: list[torch.Tensor], origin_P: torch.Tensor, stride_P: torch.Tensor, n_P: torch.Tensor,
         m_P: torch.Tensor) -> np.ndarray:
    """(P,) mean distance on each pair's cheapest path, in batches of pairs of like lengths.

    Cell (i, j) of a pair is cells[origin + i * stride + j], i < n, j < m.
    """
    grain = 1 + int(n_P.double().mean()) // 6  # lengths that differ by less share a batch
    # zeros at the end, which shorter pairs of a batch read past their last row
    cells = torch.cat([*blocks, torch.zeros(int((grain + 1) * (stride_P.max() + 1)))])
    bucket_P = (n_P // grain) * 65_536 + m_P // grain
    order = torch.argsort(bucket_P, stable=True)
    cuts = torch.unique_consecutive(bucket_P[order], return_counts=True)[1].tolist()
    out = torch.empty(len(order))
    for same in order.split(cuts):
        n, m = int(n_P[same].max()), int(m_P[same].max())
        for part in same.split(max(WAVE // min(n, m), 1)):
            out[part] = _wave(cells, origin_P[part], stride_P[part], n_P[part], m_P[part], n, m)
    return out.numpy()


def _wave(cells: torch.Tensor, origin_P: torch.Tensor, stride_P: torch.Tensor, n_P: torch.Tensor, m_P: torch.Tensor, n: int,
          m: int) -> torch.Tensor:
    """The dynamic programme of a batch, diagonal k = i + j after diagonal k - 1, all pairs at once.

    cost(i, j) = cell + the least of cost(i - 1, j - 1), cost(i, j - 1), cost(i - 1, j); steps counts the path's cells.
    Where costs tie, the diagonal step wins, then the one from j - 1, as in libri-light.
    """
    shape = (n + 1, len(origin_P))  # row 0 stands for i = -1
    # A diagonal needs the two before it: three buffers in turn.
    costs, steps = [torch.full(shape, math.inf) for _ in range(3)], [torch.zeros(shape) for _ in range(3)]
    costs[1][0] = 0.0  # the predecessor of (0, 0)
    out = torch.empty(len(origin_P))
    down_1P, end_P = (stride_P - 1)[None], n_P + m_P - 2
    earliest = int(end_P.min())
    for k in range(n + m - 1):
        lo, hi = max(0, k - m + 1), min(n, k + 1)
        (new, before, last), (new_n, before_n, last_n) = ((c[k % 3], c[(k + 1) % 3], c[(k + 2) % 3]) for c in (costs, steps))
        new[0] = math.inf
        here = slice(lo + 1, hi + 1)
        cell = cells[torch.arange(lo, hi)[:, None] * down_1P + (origin_P + k)]
        left, up, corner = last[here], last[lo:hi], before[lo:hi]
        best_n = torch.where(left <= up, last_n[here], last_n[lo:hi])
        best = torch.minimum(left, up)
        torch.where(corner <= best, before_n[lo:hi], best_n, out=new_n[here]).add_(1)
        torch.add(cell, torch.minimum(corner, best), out=new[here])
        if k >= earliest:  # pairs whose last cell lies on this diagonal are finished
            done = (end_P == k).nonzero()[:, 0]
            out[done] = new[n_P[done], done] / new_n[n_P[done], done]
    return out
