"""The scheduled chunks of one step as flat tensors. Knows requests only as lists of token ids."""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qserve.engine.request import Chunk
from qserve.kernels.ops import Batch

_NUM_ROWS = 64  # to begin with; as all buffers, they grow


def make_batch(chunks: Sequence[Chunk], *, block_size: int, device: torch.device) -> Batch:
    """Rows in the order of the chunks; sampled is what follows a request's last token, and each of its guesses."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    sample_rows: list[int] = []
    for chunk in chunks:
        span = range(chunk.start, chunk.stored_end)
        token_ids += chunk.request.token_ids[chunk.start : chunk.end]
        token_ids += chunk.draft_ids
        positions += span
        slots += [chunk.block_ids[p // block_size] * block_size + p % block_size for p in span]
        starts.append(len(token_ids))
        if chunk.is_last:
            sample_rows += range(len(token_ids) - 1 - len(chunk.draft_ids), len(token_ids))

    def tensor(values: Sequence[int], dtype: type[np.signedinteger] = np.int64) -> Tensor:
        # By numpy: it reads a list of numbers four times as fast as torch.
        return torch.from_numpy(np.array(values, dtype=dtype)).to(device, non_blocking=True)

    width = _width(chunks, block_size)
    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        slots=tensor(slots),
        query_starts=tensor(starts, np.int32),
        context_lens=tensor([chunk.stored_end for chunk in chunks], np.int32),
        block_tables=tensor(_tables(chunks, block_size, width=width), np.int32).view(len(chunks), width),
        sample_rows=tensor(sample_rows),
        chunk_tokens=tuple(chunk.num_tokens for chunk in chunks),
        chunk_ends=tuple(chunk.stored_end for chunk in chunks),
    )


class DecodeBatches:
    """The batches of steps in which every request computes its newest token and guesses, on the CPU: as `make_batch`.

    The numbers of the next step are written over those of the last, and no tensor is made. A small model's step leaves
    nothing of the interpreter in the processor's caches, and so a call of torch takes 50 µs there and not 2.
    """

    def __init__(self, *, block_size: int) -> None:
        self._block_size = block_size
        self._reserve(_NUM_ROWS)
        self._tables = array("i")
        self._table_view = torch.empty(0, 0, dtype=torch.int32)

    def make(self, chunks: Sequence[Chunk]) -> Batch:
        """Stands until the next call."""
        chunk_tokens = tuple(chunk.num_tokens for chunk in chunks)
        num_rows = sum(chunk_tokens)
        if num_rows > self._num_rows:
            self._reserve(2 * num_rows)
        self._write(chunks)
        token_ids, positions, slots, sample_rows = self._view_rows(num_rows)
        query_starts, context_lens = self._view_chunks(len(chunks))
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=self._write_tables(chunks),
            sample_rows=sample_rows,
            chunk_tokens=chunk_tokens,
            chunk_ends=tuple(chunk.stored_end for chunk in chunks),
        )

    def _write(self, chunks: Sequence[Chunk]) -> None:
        size, row = self._block_size, 0
        for index, chunk in enumerate(chunks):
            for position, token_id in enumerate((chunk.request.token_ids[-1], *chunk.draft_ids), start=chunk.start):
                self._token_ids[row] = token_id
                self._positions[row] = position
                self._slots[row] = chunk.block_ids[position // size] * size + position % size
                row += 1
            self._context_lens[index] = chunk.stored_end
            self._query_starts[index + 1] = row

    def _reserve(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._token_ids, self._positions, self._slots = (array("q", bytes(8 * num_rows)) for _ in range(3))
        self._context_lens, self._query_starts = (array("i", bytes(4 * (num_rows + 1))) for _ in range(2))
        self._counting = torch.arange(num_rows)
        self._rows: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._chunks: dict[int, tuple[Tensor, Tensor]] = {}

    def _view_rows(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token ids, positions, slots, and the numbers of the rows."""
        if count not in self._rows:
            token_ids, positions, slots = (
                torch.frombuffer(column, dtype=torch.int64, count=count)
                for column in (self._token_ids, self._positions, self._slots)
            )
            self._rows[count] = token_ids, positions, slots, self._counting[:count]
        return self._rows[count]

    def _view_chunks(self, count: int) -> tuple[Tensor, Tensor]:
        """Where chunks start, and the lengths of their contexts."""
        if count not in self._chunks:
            query_starts = torch.frombuffer(self._query_starts, dtype=torch.int32, count=count + 1)
            context_lens = torch.frombuffer(self._context_lens, dtype=torch.int32, count=count)
            self._chunks[count] = query_starts, context_lens
        return self._chunks[count]

    def _write_tables(self, chunks: Sequence[Chunk]) -> Tensor:
        """Every row whole; the tensor stays for many steps."""
        width = _width(chunks, self._block_size)
        if self._table_view.shape != (len(chunks), width):
            self._tables = array("i", bytes(4 * len(chunks) * width))
            self._table_view = torch.frombuffer(self._tables, dtype=torch.int32).view(len(chunks), width)
        self._tables[:] = array("i", _tables(chunks, self._block_size, width=width))
        return self._table_view


def _num_blocks(chunk: Chunk, block_size: int) -> int:
    return -(-chunk.stored_end // block_size)


def _width(chunks: Sequence[Chunk], block_size: int) -> int:
    """The longest context's blocks, to the next power of two: whoever records a step has few widths to record."""
    longest = max((_num_blocks(chunk, block_size) for chunk in chunks), default=0)
    return 1 << (longest - 1).bit_length() if longest else 0


def _tables(chunks: Sequence[Chunk], block_size: int, *, width: int) -> list[int]:
    """The blocks up to each chunk's end, zeros behind."""
    numbers: list[int] = []
    for row, chunk in enumerate(chunks, start=1):
        numbers += chunk.block_ids[: _num_blocks(chunk, block_size)]
        numbers += [0] * (row * width - len(numbers))
    return numbers
