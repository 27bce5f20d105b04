// Integer weights times integer inputs by AMX, for many rows. A task unpacks the codes of 32 channels once, as
//
//     slab[tile 0..1][input / 4][channel 0..15][input % 4]   int8, zero points already taken away
//
// which is AMX's own layout, and then runs over all rows. The planes of a row are rows of AMX like any others:
// 16 rows of one plane, 8 of two or 5 of three make a tile. Group sums are exact, the rest is group.h's, so the results
// are those of linear_integer.cpp bit for bit.
#include "group.h"
#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

constexpr int kTileBytes = 1024;

// Codes of one tile of channels, less their zeros.
void unpack_tile(const Weight& w, int tile, int8_t* slab) {
  const int units = w.padded_group / 8;
  for (int g = 0; g < w.groups; ++g) {
    const int64_t index = (int64_t)tile * w.groups + g;
    U32 zero = (U32)splat((int32_t)w.code_bias);
    if (w.zeros != nullptr) zero = __builtin_convertvector(load<U8x16>(w.zeros + index * kLanes), U32);
    const Bytes zeros = (Bytes)(zero * 0x01010101u);
    for (int unit = 0; unit < units; ++unit, slab += 128) {
      const int64_t at = index * units + unit;
      if (w.form == kInt8) {
        store(slab, load<Bytes>(w.codes + at * 128) - zeros);
        store(slab + 64, load<Bytes>(w.codes + at * 128 + 64) - zeros);
        continue;
      }
      const U32 pairs = load<U32>(w.codes + at * 64);
      store(slab, (Bytes)(pairs & 0x0f0f0f0fu) - zeros);
      store(slab + 64, (Bytes)((pairs >> 4) & 0x0f0f0f0fu) - zeros);
    }
  }
}

// sums[2 row tiles][2 channel tiles][16][16] of one group.
QSERVE_INLINE void dot_group(const int8_t* upper, const int8_t* lower, int64_t stride, const int8_t* left,
                             const int8_t* right, int bytes, int depth, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int at = 0; at < bytes; at += 4 * depth) {
    _tile_loadd(4, upper + at, stride);
    _tile_loadd(6, left + at * kLanes, 64);
    _tile_loadd(7, right + at * kLanes, 64);
    _tile_loadd(5, lower + at, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

template <int Planes>
struct TileKernel {
  static constexpr int kRows = 16 / Planes;  // of the batch, in a tile

  const Weight& w;
  const Rows& rows;
  const Output& output;
  const int8_t* slab;
  int tile;

  // Two tiles of rows by two of channels.
  void multiply(int64_t first_row) const {
    alignas(64) int32_t sums[2 * 2 * 256];
    F32 y[2 * kRows][2] = {};
    const int64_t stride = rows.features, slab_bytes = stride * kLanes;
    const int depth = w.padded_group % 64 == 0 ? 16 : 8;
    const int8_t* upper = rows.codes + first_row * Planes * stride;
    const int8_t* lower = upper + (first_row + kRows < rows.count ? kRows * Planes * stride : 0);
    for (int g = 0; g < w.groups; ++g) {
      const int64_t at = (int64_t)g * w.padded_group;
      const int8_t* left = slab + at * kLanes;
      dot_group(upper + at, lower + at, stride, left, left + slab_bytes, w.padded_group, depth, sums);
      add_sums(g, first_row, sums, y);
    }
    for (int r = 0; r < 2 * kRows && first_row + r < rows.count; ++r)
      for (int t = 0; t < 2 && tile + t < w.tiles(); ++t)
        output.put(first_row + r, tile + t, finish_row<Planes>(y[r][t], w, rows, first_row + r, tile + t));
  }

  QSERVE_INLINE void add_sums(int g, int64_t first_row, const int32_t* sums, F32 (*y)[2]) const {
    const int last = tile + 1 < w.tiles() ? tile + 1 : tile;
    const GroupScales scales[2] = {load_scales(w, ((int64_t)tile * w.groups + g) * kLanes),
                                   load_scales(w, ((int64_t)last * w.groups + g) * kLanes)};
    for (int r = 0; r < 2 * kRows && first_row + r < rows.count; ++r) {
      const float scale = input_scale<Planes>(w, rows, first_row + r, g);
      const float total = rows.totals[(first_row + r) * w.groups + g];
      const int32_t* row = sums + r / kRows * 512 + r % kRows * Planes * kLanes;
      for (int t = 0; t < 2; ++t) {
        I32 planes[Planes];
        for (int p = 0; p < Planes; ++p) planes[p] = load<I32>(row + t * 256 + p * kLanes);
        y[r][t] = add_group<Planes>(y[r][t], planes, scales[t], scale, total);
      }
    }
  }
};

template <int Planes>
void multiply_piece(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t begin, int64_t end) {
  Scratch& scratch = thread_scratch();
  scratch.reset();
  const int64_t slab_bytes = rows.features * kLanes;
  int8_t* slab = scratch.take<int8_t>(2 * slab_bytes);
  unpack_tile(w, tile, slab);
  if (tile + 1 < w.tiles()) unpack_tile(w, tile + 1, slab + slab_bytes);
  const TileKernel<Planes> kernel = {w, rows, output, slab, tile};
  const TileScope scope(w.padded_group % 64 == 0 ? 16 : 8);
  for (int64_t row = begin; row < end; row += 2 * kernel.kRows) kernel.multiply(row);
}

// Measured: below this many rows the vector kernel is as fast.
bool is_for_tiles(const Weight& w, const Rows& rows) {
  const bool fits = w.padded_group % 32 == 0 && (w.zeros == nullptr || w.form == kInt4);
  return fits && rows.count >= 8 && allow_tiles();
}

}  // namespace

bool multiply_integer_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  if (!is_for_tiles(w, rows)) return false;
  constexpr void (*kernels[])(const Weight&, const Rows&, const Output&, int, int64_t, int64_t) = {
      multiply_piece<1>, multiply_piece<2>, multiply_piece<3>};
  const int64_t pairs = (w.tiles() + 1) / 2, rows_per_block = 480;  // a multiple of 2 x 16, 2 x 8 and 2 x 5
  const Pieces blocks = {rows.count, rows_per_block};
  team.run(pairs * blocks.count(), [&](int64_t task) {
    const int64_t block = task / pairs;
    kernels[w.planes - 1](w, rows, output, (int)(task % pairs) * 2, blocks.begin(block), blocks.end(block));
  });
  return true;
}

#else

bool multiply_integer_tiles(const Weight&, const Rows&, const Output&, Team&) { return false; }

#endif

}  // namespace qserve
