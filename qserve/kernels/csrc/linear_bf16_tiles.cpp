// bfloat16 and float8 weights by AMX, for any number of rows: a weight is exact in bfloat16, an input is the sum of two
// bfloat16 numbers, which are two rows of AMX. The sum over the input runs in ascending order inside one tile, or goes on
// from where it was left, so a row's result is the same whatever stands in the other rows.
#include <algorithm>

#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_BF16__)

namespace {

constexpr int kTileRows = 16;
constexpr int kStep = 32;  // inputs of one product of tiles: a tile of weights is (16 pairs of inputs, 16 channels, 2)
constexpr int kTileNumbers = kStep * kLanes, kTileBytes = 2 * kTileNumbers;

// Tiles of float8 weights, of as many bytes, as bfloat16.
template <int Type>
void widen_tiles(const uint8_t* codes, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, upper_halves((U32)load_float<Type>(codes, i)));
}

// Some steps of some tiles of channels.
struct Slab {
  Range tiles;
  int64_t first, count;
};

// Its weights, as bfloat16.
struct Columns {
  const uint8_t* first;  // of a tile of channels
  int64_t stride;        // bytes to the next tile of channels
};

// `wide` has room for a slab of weights that are float8.
Columns columns_of(const Weight& w, const Slab& slab, uint16_t* wide) {
  const int64_t all = (int64_t)w.padded_features() * kLanes, begin = slab.tiles.begin * all + slab.first * kTileNumbers;
  if (w.value_type == kBF16) return {w.codes + begin * 2, all * 2};
  const int64_t numbers = slab.count * kTileNumbers, count = slab.tiles.end - slab.tiles.begin;
  const auto widen = w.value_type == kE4M3 ? widen_tiles<kE4M3> : widen_tiles<kE5M2>;
  for (int64_t t = 0; t < count; ++t) widen(w.codes + begin + t * all, numbers, wide + t * numbers);
  return {(const uint8_t*)wide, numbers * 2};
}

uint16_t* take_wide(const Weight& w, int64_t steps, int64_t tiles) {
  return w.value_type == kBF16 ? nullptr : thread_scratch().take<uint16_t>(steps * tiles * kTileNumbers);
}

int64_t rows_per_tile(const Rows& rows) { return kTileRows / rows.planes; }

// Where the results of a tile of channels go.
class Place {
 public:
  Place(const Weight& w, const Rows& rows, const Output& output, int64_t tile)
      : rows_(&rows),
        output_(output, (int)tile),
        scale_(w.scales == nullptr ? splat(1.0f) : load_float(w.scale_type, w.scales, tile * kLanes)),
        has_row_scales_(w.activation == kFloat8) {}

  // From the sums of a row's planes, `stride` apart.
  QSERVE_INLINE void put(int64_t row, const float* sums, int64_t stride) const {
    F32 y = load<F32>(sums);
    if (rows_->planes == 2) y += load<F32>(sums + stride);
    if (has_row_scales_) y *= splat(rows_->scales[row]);
    output_.put(row, y * scale_);
  }

 private:
  const Rows* rows_;
  OutputTile output_;
  F32 scale_;
  bool has_row_scales_;
};

// One tile of rows, all there are, by up to four of channels: every weight is read once.
void multiply_few(const Weight& w, const Rows& rows, const Output& output, Range, Range tiles) {
  thread_scratch().reset();
  const int64_t stride = rows.stride * 2, steps = w.padded_features() / kStep, count = tiles.end - tiles.begin;
  const Columns columns = columns_of(w, {tiles, 0, steps}, take_wide(w, steps, count));
  alignas(64) float sums[4][kTileRows * kLanes];
  clear_sums();
  for (int64_t step = 0; step < steps; ++step) {
    const uint8_t* weights = columns.first + step * kTileBytes;
    tile_load<4>(rows.halves + step * kStep, stride);
    for (int i = 0; i < kTileRows; ++i)
      for (int t = 0; t < count; ++t) __builtin_prefetch(weights + t * columns.stride + 4 * kTileBytes + i * 64);
    tile_load<6>(weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (count > 1) {
      tile_load<7>(weights + columns.stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (count > 2) {
      tile_load<6>(weights + 2 * columns.stride, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (count > 3) {
      tile_load<7>(weights + 3 * columns.stride, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  tile_store<0>(sums[0]);
  tile_store<1>(sums[1]);
  tile_store<2>(sums[2]);
  tile_store<3>(sums[3]);
  for (int t = 0; t < count; ++t) {
    const Place place(w, rows, output, tiles.begin + t);
    for (int64_t row = 0; row < rows.count; ++row) place.put(row, sums[t] + row * rows.planes * kLanes, kLanes);
  }
}

constexpr int kRowSums = 2 * kLanes;  // of a row and plane: those of two tiles of channels
constexpr int64_t kLower = kTileRows * kRowSums;

// Adds a slab's products to the sums in tiles: two tiles of rows by two of channels. Inputs come from the second cache and
// go past the first, where the weights stay for other rows.
template <bool HasLower>
void add_products(const uint16_t* inputs, int64_t row_stride, const Columns& columns, int64_t count) {
  const uint8_t *left = columns.first, *right = columns.first + columns.stride;
  for (; count > 0; --count, inputs += kStep, left += kTileBytes, right += kTileBytes) {
    tile_stream<4>(inputs, row_stride * 2);
    tile_load<6>(left, 64);
    _tile_dpbf16ps(0, 4, 6);
    tile_load<7>(right, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (!HasLower) continue;
    tile_stream<5>(inputs + kTileRows * row_stride, row_stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// All rows of a block times a slab of two tiles of channels; where it is the last one, results are put away.
void multiply_slab(const Weight& w, const Rows& rows, const Output& output, Range block, const Slab& slab,
                   const Columns& columns, float* sums) {
  const bool is_last = (slab.first + slab.count) * kStep == w.padded_features();
  const bool has_right = slab.tiles.end - slab.tiles.begin > 1;
  const Place left(w, rows, output, slab.tiles.begin), right(w, rows, output, slab.tiles.end - 1);
  const int64_t together = 2 * rows_per_tile(rows);
  for (int64_t row = block.begin; row < block.end; row += together, sums += 2 * kLower) {
    const int64_t end = std::min(row + together, block.end);
    const uint16_t* inputs = rows.halves + row * rows.planes * rows.stride + slab.first * kStep;
    slab.first == 0 ? clear_sums() : load_sums(sums);
    const auto add = end - row > rows_per_tile(rows) ? add_products<true> : add_products<false>;
    add(inputs, rows.stride, {columns.first, has_right ? columns.stride : 0}, slab.count);
    store_sums(sums);
    if (!is_last) continue;
    const float* from = sums;
    for (int64_t r = row; r < end; ++r, from += rows.planes * kRowSums) {
      left.put(r, from, kRowSums);
      if (has_right) right.put(r, from + kLanes, kRowSums);
    }
  }
}

// More rows. A slab of all rows' inputs stays in the second cache while some pairs of tiles of channels pass by, 28 KiB of
// weights each; their sums wait there for the next slab. Sizes are measured.
void multiply_many(const Weight& w, const Rows& rows, const Output& output, Range block, Range tiles) {
  constexpr int64_t kMostSteps = 14, kInputBytes = 512 * 1024, kSumBytes = 512 * 1024;
  const int64_t steps = w.padded_features() / kStep, input_bytes = (block.end - block.begin) * rows.planes * rows.stride * 2;
  const int64_t size = input_bytes <= kInputBytes ? steps : share_out(steps, share_out(steps, kMostSteps));
  const int64_t together = 2 * rows_per_tile(rows), pair_sums = share_out(block.end - block.begin, together) * 2 * kLower;
  const int64_t fitting = kSumBytes / (pair_sums * (int64_t)sizeof(float));
  const int64_t group = 2 * (size == steps ? 1 : std::max<int64_t>(fitting, 1));
  thread_scratch().reset();
  float* sums = thread_scratch().take<float>(group / 2 * pair_sums);
  uint16_t* wide = take_wide(w, size, 2);
  for (int64_t begin = tiles.begin; begin < tiles.end; begin += group)
    for (int64_t first = 0; first < steps; first += size)
      for (int64_t tile = begin; tile < std::min(begin + group, tiles.end); tile += 2) {
        const Slab slab = {{tile, std::min(tile + 2, tiles.end)}, first, std::min(size, steps - first)};
        multiply_slab(w, rows, output, block, slab, columns_of(w, slab, wide), sums + (tile - begin) / 2 * pair_sums);
      }
}

}  // namespace

bool uses_bf16_tiles(const Weight& w) {
  return w.value_type != kF16 && w.value_type != kF32 && w.groups == 1 && allow_tiles();
}

void multiply_bf16_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  constexpr int64_t kMany = 64;
  const bool is_few = rows.count <= rows_per_tile(rows);
  const Pieces all = {rows.count, rows.count};
  const Blocks blocks = is_few ? Blocks{all, w.tiles(), share_out(w.tiles(), 4)} : split_blocks(w, rows.count, team, kMany);
  const auto multiply = is_few ? multiply_few : multiply_many;
  team.run(blocks.count(), [&](int64_t task) {
    const TileScope scope(16);
    multiply(w, rows, output, blocks.rows_of(task), blocks.tiles_of(task));
  });
}

#else

bool uses_bf16_tiles(const Weight&) { return false; }
void multiply_bf16_tiles(const Weight&, const Rows&, const Output&, Team&) {}

#endif

}  // namespace qserve
