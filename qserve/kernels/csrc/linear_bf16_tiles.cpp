// bfloat16 and float8 weights by AMX, for any number of rows: a weight is exact in bfloat16, an input is the sum of two
// bfloat16 numbers, which are two rows of AMX. The sum over the input runs inside one tile in ascending order, so a
// row's result is the same whatever stands in the other rows.
#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_BF16__)

namespace {

constexpr int kPairsPerTile = 16;  // of inputs: a tile of weights is (16 pairs, 16 channels, 2)
constexpr int kTileBytes = 1024;

// A tile of float8 weights, (16 pairs, 16 channels, 2) bytes, as bfloat16.
template <int Type>
void widen_tiles(const uint8_t* codes, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, upper_halves((U32)load_float<Type>(codes, i)));
}

struct Columns {
  const uint8_t* first;  // of a tile of channels, as bfloat16
  int64_t stride;        // bytes to the next tile of channels
};

struct BlockKernel {
  const Weight& w;
  const Rows& rows;
  const Output& output;
  int tile;
  int num_tiles;

  int rows_per_tile() const { return 16 / rows.planes; }

  // One tile of rows by up to four of channels: every weight is read once.
  void multiply_few(const Columns& columns, int64_t row) const {
    alignas(64) float sums[4 * 256];
    const int64_t stride = rows.stride * 2;
    const uint16_t* inputs = rows.halves + row * rows.planes * rows.stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < w.padded_features() / 32; ++at) {
      const uint8_t* weights = columns.first + at * kTileBytes;
      _tile_loadd(4, inputs + at * 32, stride);
      for (int i = 0; i < 16; ++i)
        for (int t = 0; t < num_tiles; ++t) __builtin_prefetch(weights + t * columns.stride + 4 * kTileBytes + i * 64);
      _tile_loadd(6, weights, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (num_tiles > 1) {
        _tile_loadd(7, weights + columns.stride, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (num_tiles > 2) {
        _tile_loadd(6, weights + 2 * columns.stride, 64);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (num_tiles > 3) {
        _tile_loadd(7, weights + 3 * columns.stride, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    for (int t = 0; t < num_tiles; ++t) put(row, t, sums + t * 256);
  }

  // Two tiles of rows by two of channels, twice.
  void multiply_many(const Columns& columns, int64_t row, int first) const {
    alignas(64) float sums[4 * 256];
    const int64_t stride = rows.stride * 2;
    const uint16_t* upper = rows.halves + row * rows.planes * rows.stride;
    const uint16_t* lower = upper + 16 * rows.stride;
    const uint8_t* left = columns.first + first * columns.stride;
    const uint8_t* right = first + 1 < num_tiles ? left + columns.stride : left;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < w.padded_features() / 32; ++at) {
      _tile_loadd(4, upper + at * 32, stride);
      _tile_loadd(6, left + at * kTileBytes, 64);
      _tile_loadd(7, right + at * kTileBytes, 64);
      _tile_loadd(5, lower + at * 32, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    for (int i = 0; i < 4; ++i)
      if (first + i % 2 < num_tiles) put(row + i / 2 * rows_per_tile(), first + i % 2, sums + i * 256);
  }

  QSERVE_INLINE void put(int64_t first_row, int t, const float* sums) const {
    const F32 scale = w.scales == nullptr ? splat(1.0f) : load_float(w.scale_type, w.scales, (tile + t) * kLanes);
    for (int r = 0; r < rows_per_tile() && first_row + r < rows.count; ++r) {
      F32 y = load<F32>(sums + r * rows.planes * kLanes);
      if (rows.planes == 2) y += load<F32>(sums + (2 * r + 1) * kLanes);
      if (w.activation == kFloat8) y *= splat(rows.scales[first_row + r]);
      output.put(first_row + r, tile + t, y * scale);
    }
  }

  void multiply(const Columns& columns, int64_t begin, int64_t end) const {
    int64_t row = begin;
    for (; end - row > rows_per_tile(); row += 2 * rows_per_tile())
      for (int first = 0; first < num_tiles; first += 2) multiply_many(columns, row, first);
    if (row < end) multiply_few(columns, row);
  }
};

Columns columns_of(const Weight& w, int tile, int num_tiles) {
  const int64_t count = (int64_t)w.padded_features() * kLanes;
  if (w.value_type == kBF16) return {w.codes + tile * count * 2, count * 2};
  Scratch& scratch = thread_scratch();
  scratch.reset();
  uint16_t* wide = scratch.take<uint16_t>(count * num_tiles);
  const auto widen = w.value_type == kE4M3 ? widen_tiles<kE4M3> : widen_tiles<kE5M2>;
  widen(w.codes + tile * count, count * num_tiles, wide);
  return {(const uint8_t*)wide, count * 2};
}

}  // namespace

bool uses_bf16_tiles(const Weight& w) {
  return w.value_type != kF16 && w.value_type != kF32 && w.groups == 1 && allow_tiles();
}

void multiply_bf16_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  const Pieces pieces = {w.tiles(), 4};
  const Pieces blocks = split_rows(rows.count, rows.stride * 2 * rows.planes, 32 / rows.planes);
  team.run(pieces.count() * blocks.count(), [&](int64_t task) {
    const int64_t piece = task % pieces.count(), block = task / pieces.count();
    const int tile = (int)pieces.begin(piece), num_tiles = (int)(pieces.end(piece) - tile);
    const Columns columns = columns_of(w, tile, num_tiles);
    const TileScope scope(16);
    BlockKernel{w, rows, output, tile, num_tiles}.multiply(columns, blocks.begin(block), blocks.end(block));
  });
}

#else

bool uses_bf16_tiles(const Weight&) { return false; }
void multiply_bf16_tiles(const Weight&, const Rows&, const Output&, Team&) {}

#endif

}  // namespace qserve
