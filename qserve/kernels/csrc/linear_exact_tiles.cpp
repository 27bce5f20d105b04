// Weights times exact inputs by AMX: of weights two tiles side by side. With aligned scales these are the two digits of 16
// channels (digits.h), and nothing happens between groups; codes of 8 bits with a scale a channel are multiplied where
// they stand, 32 channels at a time.
//
// All sums (exact_sums.h) are exact, so this has the bits of linear_integer.cpp. What the vector units have to do is
// strewn among the products of tiles: unpacking the next weights, putting away the last results.
#include <algorithm>
#include <type_traits>

#include "digits.h"
#include "exact_sums.h"
#include "group.h"
#include "linear.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

constexpr int kBlockRows = PlaneTiles::kRows, kTileBytes = PlaneTiles::kTileBytes;

// Results of up to 16 rows that wait in `sums`.
class Results {
 public:
  Results(const Weight& w, const Rows& rows, const Output& output) : w_(w), rows_(rows), output_(output) {}

  template <class Sums>
  void set(const int32_t* sums, int64_t tile, int64_t begin, int64_t end) {
    sums_ = sums, tile_ = (int)tile, row_ = begin, end_ = end;
    put_ = w_.units == nullptr ? &Results::put_codes<Sums> : &Results::put_digits<Sums>;
  }

  QSERVE_INLINE void put(int64_t most) {
    if (row_ < end_) (this->*put_)(std::min(most, end_ - row_));
  }

 private:
  // Not inline: their numbers would take the registers of what they stand amidst.
  template <class Sums>
  void put_digits(int64_t count) {
    const AlignedFinish finish(w_, tile_);
    const float* scales = rows_.scales + row_;
    const int32_t* sums = sums_;
    const OutputTile place(output_, tile_);
    for (int64_t i = 0; i < count; ++i)
      place.put(row_ + i, finish(Sums::total(sums + i * Sums::kRowSums), scales[i]));
    row_ += count;
    sums_ += count * Sums::kRowSums;
  }

  template <class Sums>
  void put_codes(int64_t count) {
    if constexpr (Sums::kHasSides) {
      put_side<Sums>(count, 0);
      if (tile_ + 1 < w_.tiles()) put_side<Sums>(count, 1);
    }
    row_ += count;
    sums_ += count * Sums::kRowSums;
  }

  template <class Sums>
  QSERVE_INLINE void put_side(int64_t count, int side) const {
    const int tile = tile_ + side;
    const GroupScales scales = load_scales(w_, tile * kLanes);
    const OutputTile place(output_, tile);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = row_ + i;
      I32 planes[kPlanes];
      for (int p = 0; p < kPlanes; ++p)
        planes[p] = Sums::plane(sums_ + i * Sums::kRowSums, p, side) + splat(rows_.starts[row * kPlanes + p]);
      const F32 y = add_group<kRowInputs>(F32{}, planes, scales, 1.0f, rows_.totals[row]);
      place.put(row, finish_row<kRowInputs>(y, w_, rows_, row, tile));
    }
  }

  const Weight& w_;
  const Rows& rows_;
  const Output& output_;
  void (Results::*put_)(int64_t) = nullptr;
  const int32_t* sums_ = nullptr;
  int tile_ = 0;
  int64_t row_ = 0, end_ = 0;
};

// A slab of weights: steps [first, first + count) of one tile of channels, or of two side by side.
struct Slab {
  int64_t tile, first, count;
  bool is_first, is_last;
};

// Steps of each slab, where there are several blocks of rows: then weights stay in the first cache beside a block's inputs,
// and where inputs are many, sums of all rows wait for the next slab.
int64_t slab_size(const Weight& w, Range block) {
  constexpr int64_t kMostSteps = 11;
  const int64_t steps = w.padded_features() / kStep;
  const int64_t slabs = block.end - block.begin > kBlockRows ? share_out(steps, kMostSteps) : 1;
  return share_out(steps, slabs);
}

// One block of rows times a slab, whose steps `weights` gives one after the other. `amidst` is what else is to be done; by
// value, so that its numbers stay in registers, and given back.
template <class Sums, class Weights, class Amidst>
QSERVE_INLINE Amidst multiply_block(const Slab& slab, const int8_t* inputs, int32_t* sums, Weights weights, Amidst amidst,
                                    Results& results) {
  constexpr int64_t kSomeRows = 8;  // put away at once: fewer cost too many calls, more do not pass beside the products
  slab.is_first ? Sums::clear() : Sums::read(sums);
  inputs += slab.first * Sums::kTiles * kTileBytes;
  for (int64_t count = slab.count; count > 0; --count, inputs += Sums::kTiles * kTileBytes) {
    Sums::multiply(inputs, weights.next(), amidst);
    results.put(kSomeRows);
  }
  results.put(kBlockRows);  // of few steps
  Sums::write(sums);
  return amidst;
}

struct Nothing {
  QSERVE_INLINE void operator()(int) const {}
};

// What all blocks of a task share.
class Task {
 public:
  Task(const Weight& w, const Rows& rows, const Output& output, Range block)
      : w_(w), rows_(rows), block_(block), results_(w, rows, output) {
    sums_ = thread_scratch().take<int32_t>((block.end - block.begin + kBlockRows + 1) * kMostRowSums);
  }

  // All rows times a slab, `amidst` the first ones.
  template <class Weights, class Amidst>
  void multiply(const Slab& slab, const Weights& weights, Amidst& amidst) {
    if (block_.end - block_.begin <= kBlockRows) return choose<false>(slab, block_.begin, weights, amidst);
    choose<true>(slab, block_.begin, weights, amidst);
    Nothing nothing;
    for (int64_t row = block_.begin + kBlockRows; row < block_.end; row += kBlockRows)
      choose<true>(slab, row, weights, nothing);
  }

  void finish() { results_.put(kBlockRows); }

 private:
  static constexpr int kMostRowSums = kPlanes * 2 * kLanes;

  template <bool IsStream, class Weights, class Amidst>
  void choose(const Slab& slab, int64_t row, const Weights& weights, Amidst& amidst) {
    constexpr bool kAreCodes = Weights::kAreCodes;
    using Both = std::conditional_t<kAreCodes, Apart<true, 2, IsStream>, ByPower<IsStream>>;
    if (PlaneTiles::count(rows_.count - row) == 2)
      multiply_rows<Both>(slab, row, weights, amidst);
    else
      multiply_rows<Apart<kAreCodes, 1>>(slab, row, weights, amidst);
  }

  template <class Sums, class Weights, class Amidst>
  void multiply_rows(const Slab& slab, int64_t row, const Weights& weights, Amidst& amidst) {
    // Sums that need not wait for another slab share a place: the last ones are put away before the next come.
    const bool is_kept = !(slab.is_first && slab.is_last);
    int32_t* sums = sums_ + (is_kept ? row - block_.begin : 0) * kMostRowSums;
    const int8_t* inputs = rows_.codes + PlaneTiles::place(w_, row);
    amidst = multiply_block<Sums>(slab, inputs, sums, weights, amidst, results_);
    if (slab.is_last) results_.set<Sums>(sums, slab.tile, row, std::min(row + kBlockRows, block_.end));
  }

  const Weight& w_;
  const Rows& rows_;
  const Range block_;
  int32_t* sums_;
  Results results_;
};

// Steps of unpacked weights, in a ring that stays in the first cache.
class Ring {
 public:
  static constexpr bool kAreCodes = false;

  Ring(int8_t* begin, int64_t count) : begin_(begin), end_(begin + count * kStepBytes), at_(begin) {}

  int8_t* step() const { return at_; }

  QSERVE_INLINE void go_on() {
    at_ += kStepBytes;
    if (at_ == end_) at_ = begin_;
  }

  QSERVE_INLINE Pair next() {
    const Pair pair = {at_, at_ + kDigitBytes};
    go_on();
    return pair;
  }

 private:
  int8_t *begin_, *end_, *at_;
};

// Unpacks one step after the other of these tiles of channels.
template <class Unpacker>
class Unpacking {
 public:
  Unpacking(const Weight& w, Range tiles, const Ring& ring)
      : unpack_(w, tiles.begin), ring_(ring), steps_left_((tiles.end - tiles.begin) * (w.padded_features() / kStep)) {}

  QSERVE_INLINE void operator()(int half) {
    if (steps_left_ == 0) return;
    unpack_(half, ring_.step());
    if (half == 0) return;
    ring_.go_on();
    --steps_left_;
  }

 private:
  Unpacker unpack_;
  Ring ring_;
  int64_t steps_left_;
};

// Weights are unpacked amidst the products of the first rows, some steps before their turn.
template <class Unpacker>
void multiply_digits(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  constexpr int kAhead = 3;
  const int64_t steps = w.padded_features() / kStep, size = slab_size(w, block);
  const int64_t kept = block.end - block.begin > kBlockRows ? size : 1;  // others come for them too
  thread_scratch().reset();
  Ring ring(thread_scratch().take<int8_t>((kept + kAhead) * kStepBytes), kept + kAhead);
  Unpacking<Unpacker> unpacking(w, tiles, ring);
  for (int i = 0; i < kAhead; ++i) unpacking(0), unpacking(1);
  Task task(w, rows, output, block);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
    for (int64_t first = 0; first < steps; first += size) {
      const Slab slab = {tile, first, std::min(size, steps - first), first == 0, first + size >= steps};
      task.multiply(slab, ring, unpacking);
      for (int64_t step = 0; step < slab.count; ++step) ring.go_on();
    }
  task.finish();
}

// Codes of 8 bits stand as AMX wants them.
struct Standing {
  static constexpr bool kAreCodes = true;

  const int8_t *left, *right;

  QSERVE_INLINE Pair next() {
    const Pair pair = {left, right};
    left += kTileBytes, right += kTileBytes;
    return pair;
  }
};

// Those of the next pair of tiles are fetched while one is multiplied.
struct Fetching {
  const int8_t* next[2];

  QSERVE_INLINE void operator()(int side) {
    for (int line = 0; line < kTileBytes; line += 64) __builtin_prefetch(next[side] + line, 0, kSecondLevel);
    next[side] += kTileBytes;
  }
};

void multiply_codes(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  const int64_t tile_bytes = (int64_t)w.padded_features() * kLanes;
  const int64_t steps = w.padded_features() / kStep, size = slab_size(w, block);
  thread_scratch().reset();
  Task task(w, rows, output, block);
  for (int64_t tile = tiles.begin; tile < tiles.end; tile += 2)
    for (int64_t first = 0; first < steps; first += size) {
      const Slab slab = {tile, first, std::min(size, steps - first), first == 0, first + size >= steps};
      const int8_t* left = (const int8_t*)w.codes + tile * tile_bytes + first * kTileBytes;
      const int8_t* right = tile + 1 < w.tiles() ? left + tile_bytes : left;
      Fetching fetching = {{left + 2 * tile_bytes, right + 2 * tile_bytes}};
      task.multiply(slab, Standing{left, right}, fetching);
    }
  task.finish();
}

using Multiply = void (*)(const Weight&, const Rows&, const Output&, Range block, Range tiles);

Multiply choose_multiply(const Weight& w) {
  static constexpr Multiply ways[2][2] = {
      {multiply_digits<Unpacker<Moved, 16>>, multiply_digits<Unpacker<Moved, 32>>},
      {multiply_digits<Unpacker<Symmetric, 16>>, multiply_digits<Unpacker<Symmetric, 32>>},
  };
  if (w.units == nullptr) return multiply_codes;
  return ways[w.offsets == nullptr][w.padded_group % 32 == 0];
}

}  // namespace

bool uses_exact_tiles(const Weight& w, int num_rows) {
  constexpr int kFewest = 5, kFewestOfCodes = 2;  // measured: with fewer the vector kernel is faster
  if (w.planes != kPlanes || !allow_tiles()) return false;
  if (w.units != nullptr) return num_rows >= kFewest;
  return w.form == kInt8 && w.groups == 1 && w.zeros == nullptr && num_rows >= kFewestOfCodes;
}

void multiply_exact_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  constexpr int64_t kMany = 32;  // measured
  const Blocks blocks = split_blocks(w, rows.count, team, kMany);
  const Multiply multiply = choose_multiply(w);
  team.run(blocks.count(), [&](int64_t task) {
    const TileScope scope(16);
    multiply(w, rows, output, blocks.rows_of(task), blocks.tiles_of(task));
  });
}

#else

bool uses_exact_tiles(const Weight&, int) { return false; }
void multiply_exact_tiles(const Weight&, const Rows&, const Output&, Team&) {}

#endif

}  // namespace qserve
