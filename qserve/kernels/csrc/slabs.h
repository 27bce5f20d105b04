// Rows of int8 inputs times two tiles of weights that stand side by side, by AMX: blocks of 32 rows, slab by slab.
//
// A slab of weights stays in the first cache for all rows of a task. Where inputs are many, they are cut, and sums of all
// rows wait for the next slab. Inputs then go past that cache, for with them there would be no room for the slab; few
// inputs are better off in it.
#pragma once
#include <algorithm>

#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_INT8__)

constexpr int kDepth = 64;  // inputs of one product of tiles, a step
constexpr int kTileBytes = kDepth * kLanes;
constexpr int kBlockRows = 32;        // two tiles
constexpr int kRowSums = 2 * kLanes;  // of a row: those of the left tile, then those of the right one
constexpr int64_t kMostSlabSteps = 16;  // of 2 KiB

inline bool are_cut(const Weight& w) { return w.padded_features() > kMostSlabSteps * kDepth; }

// Adds one step of the upper 16 rows to the sums in tiles, and of the lower ones, for which the weights stay. Left weights
// may be signed, right ones are not.
template <bool IsSigned, bool IsStream>
QSERVE_INLINE void multiply_upper(const int8_t* inputs, int64_t stride, const int8_t* left, const int8_t* right) {
  tile_load<6>(left, 64);
  tile_load_inputs<IsStream, 4>(inputs, stride);
  tile_dot<!IsSigned, 0, 4, 6>();
  tile_load<7>(right, 64);
  tile_dot<true, 1, 4, 7>();
}

template <bool IsSigned, bool IsStream>
QSERVE_INLINE void multiply_lower(const int8_t* inputs, int64_t stride) {
  tile_load_inputs<IsStream, 5>(inputs + 16 * stride, stride);
  tile_dot<!IsSigned, 2, 5, 6>();
  tile_dot<true, 3, 5, 7>();
}

// How many slabs of weights take turns with one of the inputs: as many as leave it the second cache beside their sums.
inline int64_t count_together(int64_t num_rows) {
  constexpr int64_t kSumBytes = 512 * 1024;
  return std::max<int64_t>(kSumBytes / (num_rows * kRowSums * (int64_t)sizeof(int32_t)), 1);
}

// All rows of a block times these tiles of channels. `source` gives their slabs: open(tile, first step, steps, blocks of
// rows) where the left tile of weights begins, its steps kStride bytes apart, and right(left) what stands beside it. It has
// something to do between the products: amidst(half of a step). `results` puts sums away. Both by value: so their numbers
// can stay in registers.
template <bool IsCut, class Source, class Results>
void multiply_slabs(const Weight& w, const Rows& rows, Range block, Range tiles, Source source, Results results) {
  constexpr bool kIsSigned = Source::kIsSigned;
  constexpr int64_t kTiles = Source::kTiles;  // of channels, in a slab
  const int64_t steps = w.padded_features() / kDepth, size = IsCut ? share_out(steps, share_out(steps, kMostSlabSteps)) : steps;
  const int64_t blocks = share_out(block.end - block.begin, kBlockRows), num_rows = blocks * kBlockRows;
  const int64_t together = IsCut ? count_together(num_rows) : 1;
  int32_t* all_sums = thread_scratch().take<int32_t>((IsCut ? together * num_rows : kBlockRows) * kRowSums);
  for (int64_t begin = tiles.begin; begin < tiles.end; begin += together * kTiles)
    for (int64_t first = 0; first < steps; first += size) {
      const int64_t count = std::min(size, steps - first), some_rows = share_out(kBlockRows, 2 * count);
      for (int64_t turn = 0; turn < together && begin + turn * kTiles < tiles.end; ++turn) {
        const int64_t tile = begin + turn * kTiles;
        const int8_t* slab = source.open(tile, first, count, blocks);
        for (int64_t row = block.begin; row < block.end; row += kBlockRows) {
          // Sums that need not wait for another slab share a place: the last ones are put away before the next come.
          int32_t* sums = all_sums + (IsCut ? turn * num_rows + row - block.begin : 0) * kRowSums;
          const int8_t *inputs = rows.codes + row * rows.stride + first * kDepth, *left = slab;
          first == 0 ? clear_sums() : load_sums(sums);
          for (int64_t step = 0; step < count; ++step, inputs += kDepth, left += Source::kStride) {
            multiply_upper<kIsSigned, IsCut>(inputs, rows.stride, left, source.right(left));
            source.amidst(0);
            results.put(some_rows);
            if (block.end - row > 16) multiply_lower<kIsSigned, IsCut>(inputs, rows.stride);
            source.amidst(1);
            results.put(some_rows);
          }
          store_sums(sums);
          if (first + count == steps) results.set(sums, tile, row, std::min(row + kBlockRows, block.end));
        }
      }
    }
  results.put(kBlockRows);
}

#endif

}  // namespace qserve
