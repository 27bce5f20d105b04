// 4-bit weights with aligned scales times int8 inputs by AMX, for more than a few rows. A code times its scale's multiple
// is a whole number of 16 bits, the same unit for a whole channel: two digits of 8 bits, so a weight is two tiles of int8,
// and sums run over all groups without being touched between them:
//
//     w = multiple * (code - zero) = 256 high + low,    sum w x = 256 sum high x + sum low x
//
// Everything is exact, so it has the bits of linear_integer.cpp. The products of tiles leave the vector units free, so
// what these have to do is strewn among them: putting away the last results, and with few rows unpacking the next weights.
#include <type_traits>

#include "aligned.h"
#include "digits.h"
#include "slabs.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

// Results of up to 32 rows and 16 channels that wait in `sums`, (row, digit, 16). Two rows at a time between products of
// tiles cost little more than those alone; many at a time cost what they cost without them.
template <bool IsNarrow>
class Results {
 public:
  Results(const Weight& w, const Rows& rows, const Output& output) : w_(w), rows_(rows), output_(output) {}

  QSERVE_INLINE void set(const int32_t* sums, int64_t tile, int64_t begin, int64_t end) {
    sums_ = sums, row_ = begin, end_ = end;
    finish_ = Finish(w_, (int)tile);
    place_ = OutputTile(output_, (int)tile);
    scales_ = rows_.scales, zeros_ = rows_.zeros;
  }

  QSERVE_INLINE void put(int64_t most) {
    for (; most > 0 && row_ < end_; --most, ++row_, sums_ += kRowSums)
      place_.put(row_, finish_(total(), scales_[row_], zeros_[row_]));
  }

 private:
  using Finish = std::conditional_t<IsNarrow, NarrowFinish, AlignedFinish>;

  QSERVE_INLINE auto total() const {
    if constexpr (IsNarrow) return shift_byte(load<U32>(sums_)) + load<U32>(sums_ + kLanes);
    if constexpr (!IsNarrow) return fused(load_doubles(sums_), 256.0, load_doubles(sums_ + kLanes));
  }

  const Weight& w_;
  const Rows& rows_;
  const Output& output_;
  Finish finish_;
  OutputTile place_;
  const float* scales_ = nullptr;
  const int32_t *sums_ = nullptr, *zeros_ = nullptr;
  int64_t row_ = 0, end_ = 0;
};

// A block of up to 32 rows: unpacking takes longer than the products. A step of weights is unpacked some steps before its
// turn, into a ring that stays in the first cache.
template <class Unpacker, bool IsNarrow>
void multiply_few(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  constexpr int kAhead = 3, kRing = 4;
  Scratch& scratch = thread_scratch();
  scratch.reset();
  int8_t* ring = scratch.take<int8_t>(kRing * kStepBytes);
  int32_t* sums = scratch.take<int32_t>(kBlockRows * kRowSums);
  const int64_t steps = w.padded_features() / kStep, some_rows = share_out(kBlockRows, 2 * steps);
  Results<IsNarrow> results(w, rows, output);
  Unpacker unpack(w, tiles.begin);
  const int64_t total = (tiles.end - tiles.begin) * steps;
  const auto place = [&](int64_t step) { return ring + (uint64_t)step % kRing * kStepBytes; };
  const auto unpack_half = [&](int half, int64_t step) {
    if (step < total) unpack(half, place(step));
  };
  for (int64_t step = 0; step < kAhead; ++step) unpack_half(0, step), unpack_half(1, step);
  int64_t now = 0;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    clear_sums();
    const int8_t* inputs = rows.codes + block.begin * rows.stride;
    for (const int64_t end = now + steps; now < end; ++now, inputs += kStep) {
      multiply_upper<true, false>(inputs, rows.stride, place(now), place(now) + kDigitBytes);
      unpack_half(0, now + kAhead);
      results.put(some_rows);
      if (block.end - block.begin > 16) multiply_lower<true, false>(inputs, rows.stride);
      unpack_half(1, now + kAhead);
      results.put(some_rows);
    }
    store_sums(sums);
    results.set(sums, tile, block.begin, block.end);
  }
  results.put(kBlockRows);
}

// More rows: weights are unpacked a slab at a time, for all rows of the task.
template <class Unpacker>
class Unpacked {
 public:
  static constexpr bool kIsSigned = true;
  static constexpr int64_t kTiles = 1, kStride = kStepBytes;

  explicit Unpacked(const Weight& w) : w_(w), digits_(thread_scratch().take<int8_t>(kMostSlabSteps * kStepBytes)) {}

  const int8_t* open(int64_t tile, int64_t first, int64_t count, int64_t) {
    Unpacker unpack(w_, tile, first);
    for (int64_t step = 0; step < count; ++step)
      for (int half = 0; half < 2; ++half) unpack(half, digits_ + step * kStepBytes);
    return digits_;
  }

  const int8_t* right(const int8_t* left) const { return left + kDigitBytes; }
  void amidst(int) {}

 private:
  const Weight& w_;
  int8_t* digits_;
};

template <class Unpacker, bool IsNarrow>
void multiply_many(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  using Digits = Unpacked<Unpacker>;
  using Puts = Results<IsNarrow>;
  thread_scratch().reset();
  const auto multiply = are_cut(w) ? multiply_slabs<true, Digits, Puts> : multiply_slabs<false, Digits, Puts>;
  multiply(w, rows, block, tiles, Digits(w), Puts(w, rows, output));
}

template <class Unpacker, bool IsNarrow>
void multiply_block(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  const TileScope scope(16);
  const bool are_few = block.end - block.begin <= kBlockRows;
  const auto multiply = are_few ? multiply_few<Unpacker, IsNarrow> : multiply_many<Unpacker, IsNarrow>;
  multiply(w, rows, output, block, tiles);
}

using Multiply = void (*)(const Weight&, const Rows&, const Output&, Range block, Range tiles);

template <class Unpacker>
Multiply choose_width(const Weight& w) {
  return w.is_narrow ? multiply_block<Unpacker, true> : multiply_block<Unpacker, false>;
}

Multiply choose_multiply(const Weight& w) {
  const bool is_long = w.padded_group % 32 == 0;
  if (w.zeros == nullptr && w.code_bias == 8)
    return is_long ? choose_width<Unpacker<Symmetric, 32>>(w) : choose_width<Unpacker<Symmetric, 16>>(w);
  return is_long ? choose_width<Unpacker<Shifted, 32>>(w) : choose_width<Unpacker<Shifted, 16>>(w);
}

}  // namespace

bool uses_aligned_tiles(const Weight& w, int num_rows) {
  constexpr int kFewest = 6;  // measured: with fewer the vector kernel is faster
  return w.units != nullptr && w.planes == 1 && num_rows >= kFewest && allow_tiles();
}

void multiply_aligned_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  constexpr int64_t kMany = 25;  // measured: two tiles, the second half full
  const Blocks blocks = split_blocks(w, rows.count, team, kMany);
  const Multiply multiply = choose_multiply(w);
  team.run(blocks.count(), [&](int64_t task) { multiply(w, rows, output, blocks.rows_of(task), blocks.tiles_of(task)); });
}

#else

bool uses_aligned_tiles(const Weight&, int) { return false; }
void multiply_aligned_tiles(const Weight&, const Rows&, const Output&, Team&) {}

#endif

}  // namespace qserve
