"""How a batch is cut into row tiles for the Triton kernels: no tile reaches over the end of its segment.

Must not know: what a kernel does with a tile.

Shapes: K tiles, S segments, L live segments.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from motet.kernels.segments import Int32

# 16 is the least tl.dot accepts. The other follows the tiles of vLLM and SGLang, read and not yet tuned here.
_SMALL_TILE = 16
_LARGE_TILE = 64


def tile_rows(rows_L: Int32) -> int:
    """Rows of a tile, for live segments of so many rows: a large tile wastes most of itself on decode."""
    mean_rows = rows_L.mean() if len(rows_L) else 0
    return _LARGE_TILE if mean_rows >= _LARGE_TILE // 2 else _SMALL_TILE


def row_tiles(row_start: Int32, row_stop: Int32, live: npt.NDArray[np.intp], block_t: int) -> npt.NDArray[np.int64]:
    """The row tiles of the live segments.

    Args:
        row_start: [S] first batch row of each segment.
        row_stop: [S] one past the last.
        live: [L] the segments that have work on some target.
        block_t: rows of a tile.

    Returns:
        [K, 4]: segment, first batch row, one past the segment's last, the tile's first row within its segment.
    """
    start, stop = row_start[live].astype(np.int64), row_stop[live].astype(np.int64)
    n_tiles = -(-(stop - start) // block_t)
    begin = np.cumsum(n_tiles) - n_tiles
    row_in_segment = (np.arange(n_tiles.sum()) - np.repeat(begin, n_tiles)) * block_t
    columns = (
        np.repeat(live, n_tiles),
        np.repeat(start, n_tiles) + row_in_segment,
        np.repeat(stop, n_tiles),
        row_in_segment,
    )
    return np.stack(columns, axis=1).astype(np.int64)
