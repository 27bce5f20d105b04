// Weights times exact inputs by AMX: three planes of int8 a row (rows.h), and of weights two tiles side by side. With
// aligned scales these are the two digits of 16 channels (digits.h), and nothing happens between groups; codes of 8 bits
// with a scale a channel are multiplied where they stand, 32 channels at a time. So a step of 64 inputs is
//
//     planes  0    1    2         times    left, right        six sums: (row, plane, side, 16 channels)
//
// All sums are exact, so this has the bits of linear_integer.cpp. What the vector units have to do is strewn among the
// products of tiles: unpacking the next weights, putting away the last results.
#include <algorithm>
#include <type_traits>

#include "aligned.h"
#include "digits.h"
#include "group.h"
#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

constexpr int kPlanes = 3, kBlockRows = PlaneTiles::kRows;
constexpr int kTileBytes = kStep * kLanes;

// Two tiles of weights.
struct Pair {
  const int8_t *left, *right;
};

// Sums of each plane and side apart: (row, plane, side, 16 channels). Of one tile of inputs (or two) all planes of five rows
// follow each other, of three each is a plane: tiles 0 and 1 of sums are the first one's, 2 and 3 the second's, 4 and 5 the
// third's. The sixteenth row of a tile of five is nobody's, and stands where the next tile's first belongs.
template <bool IsLeftUnsigned, int Tiles, bool IsStream = false>  // of several blocks of rows, inputs are a stream
struct Apart {
  static constexpr int kTiles = Tiles, kRowSums = kPlanes * 2 * kLanes;
  static constexpr int64_t kNextTile = Tiles == 3 ? 2 * kLanes : PlaneTiles::kFewRows * kRowSums;
  static constexpr int64_t kNextRow = (Tiles == 3 ? kRowSums : 2 * kLanes) * 4;  // bytes

  // `amidst` is what else is to be done, in two parts.
  template <class Amidst>
  static QSERVE_INLINE void multiply(const int8_t* inputs, const Pair& weights, Amidst& amidst) {
    tile_load<6>(weights.left, 64);
    tile_load_inputs<IsStream, 7>(inputs, 64);
    tile_dot<IsLeftUnsigned, 0, 7, 6>();
    tile_load<6>(weights.right, 64);
    tile_dot<true, 1, 7, 6>();
    amidst(0);
    if constexpr (Tiles > 1) {
      tile_load_inputs<IsStream, 7>(inputs + kTileBytes, 64);
      tile_dot<true, 3, 7, 6>();
      tile_load<6>(weights.left, 64);
      tile_dot<IsLeftUnsigned, 2, 7, 6>();
    }
    amidst(1);
    if constexpr (Tiles > 2) {
      tile_load_inputs<IsStream, 7>(inputs + 2 * kTileBytes, 64);
      tile_dot<IsLeftUnsigned, 4, 7, 6>();
      tile_load<6>(weights.right, 64);
      tile_dot<true, 5, 7, 6>();
    }
  }

  static void clear() {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (Tiles > 1) tile_zero<2>(), tile_zero<3>();
    if constexpr (Tiles > 2) tile_zero<4>(), tile_zero<5>();
  }

  static void read(const int32_t* sums) {
    tile_load<0>(sums, kNextRow), tile_load<1>(sums + kLanes, kNextRow);
    sums += kNextTile;
    if constexpr (Tiles > 1) tile_load<2>(sums, kNextRow), tile_load<3>(sums + kLanes, kNextRow);
    sums += kNextTile;
    if constexpr (Tiles > 2) tile_load<4>(sums, kNextRow), tile_load<5>(sums + kLanes, kNextRow);
  }

  static void write(int32_t* sums) {
    tile_store<0>(sums, kNextRow), tile_store<1>(sums + kLanes, kNextRow);
    sums += kNextTile;
    if constexpr (Tiles > 1) tile_store<2>(sums, kNextRow), tile_store<3>(sums + kLanes, kNextRow);
    sums += kNextTile;
    if constexpr (Tiles > 2) tile_store<4>(sums, kNextRow), tile_store<5>(sums + kLanes, kNextRow);
  }

  static QSERVE_INLINE I32 plane(const int32_t* sums, int p, int side) {
    return load<I32>(sums + (p * 2 + side) * kLanes);
  }

  // Of both digits of all planes.
  static QSERVE_INLINE Doubles total(const int32_t* sums) {
    Doubles total = {};
    for (int p = 0; p < kPlanes; ++p)
      total = total * 256.0 + (to_doubles(plane(sums, p, 0)) * 256.0 + to_doubles(plane(sums, p, 1)));
    return total;
  }
};

// Three planes of 16 rows times two digits, where products that count alike add up: (row, power of 256, 16 channels),
//
//     power       3        2              1              0
//     products    0 high   0 low, 1 high  1 low, 2 high  2 low
template <bool IsStream>
struct ByPower {
  static constexpr int kTiles = 3, kRowSums = 4 * kLanes;
  static constexpr int64_t kNextRow = 4 * kRowSums;  // bytes

  // A sum's two products stand as far apart as they can, for the second waits for the first.
  template <class Amidst>
  static QSERVE_INLINE void multiply(const int8_t* inputs, const Pair& weights, Amidst& amidst) {
    tile_load<7>(weights.right, 64);
    tile_load_inputs<IsStream, 4>(inputs, 64);
    tile_dot<true, 1, 4, 7>();
    tile_load_inputs<IsStream, 5>(inputs + kTileBytes, 64);
    tile_dot<true, 2, 5, 7>();
    amidst(0);
    tile_load<6>(weights.left, 64);
    tile_dot<false, 0, 4, 6>();
    tile_dot<false, 1, 5, 6>();
    amidst(1);
    tile_load_inputs<IsStream, 4>(inputs + 2 * kTileBytes, 64);
    tile_dot<false, 2, 4, 6>();
    tile_dot<true, 3, 4, 7>();
  }

  static void clear() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }

  static void read(const int32_t* sums) {
    tile_load<0>(sums, kNextRow);
    tile_load<1>(sums + kLanes, kNextRow);
    tile_load<2>(sums + 2 * kLanes, kNextRow);
    tile_load<3>(sums + 3 * kLanes, kNextRow);
  }

  static void write(int32_t* sums) {
    tile_store<0>(sums, kNextRow);
    tile_store<1>(sums + kLanes, kNextRow);
    tile_store<2>(sums + 2 * kLanes, kNextRow);
    tile_store<3>(sums + 3 * kLanes, kNextRow);
  }

  static QSERVE_INLINE Doubles total(const int32_t* sums) {
    Doubles total = load_doubles(sums);
    for (int power = 1; power < 4; ++power) total = fused(total, 256.0, load_doubles(sums + power * kLanes));
    return total;
  }
};

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
    output_.put_rows(row_, count, tile_, [=](int64_t i) { return finish(Sums::total(sums + i * Sums::kRowSums), scales[i]); });
    row_ += count;
    sums_ += count * Sums::kRowSums;
  }

  template <class Sums>
  void put_codes(int64_t count) {
    if constexpr (Sums::kRowSums == kPlanes * 2 * kLanes) {
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
    output_.put_rows(row_, count, tile, [&](int64_t i) {
      const int64_t row = row_ + i;
      I32 planes[kPlanes];
      for (int p = 0; p < kPlanes; ++p)
        planes[p] = Sums::plane(sums_ + i * Sums::kRowSums, p, side) + splat(rows_.starts[row * kPlanes + p]);
      const F32 y = add_group<kPlanes>(F32{}, planes, scales, 1.0f, rows_.totals[row]);
      return finish_row<kPlanes>(y, w_, rows_, row, tile);
    });
  }

  const Weight& w_;
  const Rows& rows_;
  const Output& output_;
  void (Results::*put_)(int64_t) = nullptr;
  const int32_t* sums_ = nullptr;
  int tile_ = 0;
  int64_t row_ = 0, end_ = 0;
};

struct Range {
  int64_t begin, end;
};

int64_t share_out(int64_t count, int64_t among) { return (count + among - 1) / among; }

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
    using Widest = std::conditional_t<kAreCodes, Apart<true, 3, IsStream>, ByPower<IsStream>>;
    const int tiles = PlaneTiles::count(rows_.count - row);
    if (tiles == 3) multiply_rows<Widest>(slab, row, weights, amidst);
    if (tiles == 2) multiply_rows<Apart<kAreCodes, 2>>(slab, row, weights, amidst);
    if (tiles == 1) multiply_rows<Apart<kAreCodes, 1>>(slab, row, weights, amidst);
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
template <class Unpack>
class Unpacking {
 public:
  Unpacking(const Weight& w, Range tiles, const Ring& ring) : w_(&w), ring_(ring), tile_(tiles.begin), end_(tiles.end) {}

  QSERVE_INLINE void operator()(int half) {
    if (tile_ == end_) return;
    Unpack::half(*w_, tile_, step_, half, ring_.step());
    if (half == 0) return;
    ring_.go_on();
    if (++step_ * kStep == w_->padded_features()) step_ = 0, ++tile_;
  }

 private:
  const Weight* w_;
  Ring ring_;
  int64_t tile_, end_, step_ = 0;
};

// Weights are unpacked amidst the products of the first rows, some steps before their turn.
template <class Unpack>
void multiply_digits(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  constexpr int kAhead = 3;
  const int64_t steps = w.padded_features() / kStep, size = slab_size(w, block);
  const int64_t kept = block.end - block.begin > kBlockRows ? size : 1;  // others come for them too
  thread_scratch().reset();
  Ring ring(thread_scratch().take<int8_t>((kept + kAhead) * kStepBytes), kept + kAhead);
  Unpacking<Unpack> unpacking(w, tiles, ring);
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

void multiply_codes(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  const int64_t tile_bytes = (int64_t)w.padded_features() * kLanes;
  const int64_t steps = w.padded_features() / kStep, size = slab_size(w, block);
  thread_scratch().reset();
  Task task(w, rows, output, block);
  Nothing nothing;
  for (int64_t tile = tiles.begin; tile < tiles.end; tile += 2)
    for (int64_t first = 0; first < steps; first += size) {
      const Slab slab = {tile, first, std::min(size, steps - first), first == 0, first + size >= steps};
      const int8_t* left = (const int8_t*)w.codes + tile * tile_bytes + first * kTileBytes;
      const int8_t* right = tile + 1 < w.tiles() ? left + tile_bytes : left;
      task.multiply(slab, Standing{left, right}, nothing);
    }
  task.finish();
}

using Multiply = void (*)(const Weight&, const Rows&, const Output&, Range block, Range tiles);

Multiply choose_multiply(const Weight& w) {
  static constexpr Multiply ways[2][2] = {
      {multiply_digits<Unpack<Moved, 16>>, multiply_digits<Unpack<Moved, 32>>},
      {multiply_digits<Unpack<Symmetric, 16>>, multiply_digits<Unpack<Symmetric, 32>>},
  };
  if (w.units == nullptr) return multiply_codes;
  return ways[w.offsets == nullptr][w.padded_group % 32 == 0];
}

}  // namespace

bool uses_exact_tiles(const Weight& w, int num_rows) {
  constexpr int kFewest = 3, kFewestOfCodes = 2;  // measured: with fewer the vector kernel is faster
  if (w.planes != kPlanes || !allow_tiles()) return false;
  if (w.units != nullptr) return num_rows >= kFewest;
  return w.form == kInt8 && w.groups == 1 && w.zeros == nullptr && num_rows >= kFewestOfCodes;
}

void multiply_exact_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  const Blocks blocks = split_blocks(w, rows.count, team);
  const Multiply multiply = choose_multiply(w);
  team.run(blocks.count(), [&](int64_t task) {
    const int64_t block = task / blocks.tiles.count(), piece = task % blocks.tiles.count();
    const TileScope scope(16);
    multiply(w, rows, output, {blocks.rows.begin(block), blocks.rows.end(block)},
             {blocks.tiles.begin(piece), blocks.tiles.end(piece)});
  });
}

#else

bool uses_exact_tiles(const Weight&, int) { return false; }
void multiply_exact_tiles(const Weight&, const Rows&, const Output&, Team&) {}

#endif

}  // namespace qserve
