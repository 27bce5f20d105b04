// Weights of 8 bits with a scale a channel times int8 inputs by AMX, for more than a few rows. Codes stand in memory as
// AMX wants them, but for the code of zero, which is taken from the sums: two tiles of channels are multiplied where they
// stand.
//
// Sums are exact, and what follows is group.h's, so this has the bits of linear_integer.cpp. Between the products the last
// results are put away, and the next weights fetched.
#include "group.h"
#include "slabs.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

// Results of up to 32 rows and two tiles of channels that wait in `sums`, (row, tile, 16).
class Results {
 public:
  Results(const Weight& w, const Rows& rows, const Output& output) : w_(w), rows_(rows), output_(output) {}

  QSERVE_INLINE void set(const int32_t* sums, int64_t tile, int64_t begin, int64_t end) {
    sums_ = sums, tile_ = (int)tile, row_ = begin, end_ = end;
    sides_ = tile + 1 < w_.tiles() ? 2 : 1;
    for (int side = 0; side < sides_; ++side) {
      scales_[side] = load_scales(w_, (tile + side) * kLanes);
      places_[side] = OutputTile(output_, (int)tile + side);
    }
  }

  QSERVE_INLINE void put(int64_t most) {
    for (; most > 0 && row_ < end_; --most, ++row_, sums_ += kRowSums)
      for (int side = 0; side < sides_; ++side) put_side(side);
  }

 private:
  QSERVE_INLINE void put_side(int side) const {
    const I32 sum = load<I32>(sums_ + side * kLanes) + splat(rows_.starts[row_]);
    const F32 y = add_group<kDynamicInputs>(F32{}, &sum, scales_[side], 1.0f, rows_.totals[row_]);
    places_[side].put(row_, finish_row<kDynamicInputs>(y, w_, rows_, row_, tile_ + side));
  }

  const Weight& w_;
  const Rows& rows_;
  const Output& output_;
  GroupScales scales_[2];
  OutputTile places_[2];
  const int32_t* sums_ = nullptr;
  int tile_ = 0, sides_ = 0;
  int64_t row_ = 0, end_ = 0;
};

// Codes where they stand. While a slab is multiplied the one that comes next is fetched, evenly: into the second level of
// the cache, for the first is full.
class Standing {
 public:
  static constexpr bool kIsSigned = false;
  static constexpr int64_t kTiles = 2, kStride = kTileBytes;

  explicit Standing(const Weight& w) : w_(w), tile_bytes_((int64_t)w.padded_features() * kLanes) {}

  const int8_t* open(int64_t tile, int64_t first, int64_t, int64_t blocks) {
    const int8_t* left = (const int8_t*)w_.codes + tile * tile_bytes_ + first * kTileBytes;
    right_ = tile + 1 < w_.tiles() ? tile_bytes_ : 0;
    next_[0] = left + kTiles * tile_bytes_, next_[1] = right(left) + kTiles * tile_bytes_;
    lines_ = share_out(kTileBytes / 64, blocks);
    return left;
  }

  QSERVE_INLINE const int8_t* right(const int8_t* left) const { return left + right_; }

  QSERVE_INLINE void amidst(int half) {
    for (int64_t line = 0; line < lines_; ++line, next_[half] += 64) __builtin_prefetch(next_[half], 0, kSecondLevel);
  }

 private:
  const Weight& w_;
  int64_t tile_bytes_, right_ = 0, lines_ = 0;
  const int8_t* next_[2] = {};
};

}  // namespace

bool uses_code_tiles(const Weight& w, int num_rows) {
  constexpr int kFewest = 9;  // measured: with fewer the vector kernel is faster
  const bool are_standing = w.form == kInt8 && w.groups == 1 && w.zeros == nullptr && w.padded_features() % kDepth == 0;
  return are_standing && w.planes == 1 && num_rows >= kFewest && allow_tiles();
}

void multiply_code_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  constexpr int64_t kMany = 64;  // as in linear_tiles.cpp, where it was measured
  const Blocks blocks = split_blocks(w, rows.count, team, kMany);
  team.run(blocks.count(), [&](int64_t task) {
    const TileScope scope(16);
    thread_scratch().reset();
    const auto multiply = are_cut(w) ? multiply_slabs<true, Standing, Results> : multiply_slabs<false, Standing, Results>;
    multiply(w, rows, blocks.rows_of(task), blocks.tiles_of(task), Standing(w), Results(w, rows, output));
  });
}

#else

bool uses_code_tiles(const Weight&, int) { return false; }
void multiply_code_tiles(const Weight&, const Rows&, const Output&, Team&) {}

#endif

}  // namespace qserve
