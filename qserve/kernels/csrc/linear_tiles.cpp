// Integer weights times integer inputs by AMX, for many rows. A task unpacks the codes of 32 channels once, as
//
//     slab[tile 0..1][input / 4][channel 0..15][input % 4]   int8, zero points already taken away
//
// which is AMX's own layout, and then runs over all rows. Codes of 8 bits whose zero is everywhere the same stand so
// already, but for this zero, and it is taken from the sums. The planes of a row are rows of AMX like any others:
// 16 rows of one plane or 8 of two make a tile. Group sums are exact, the rest is group.h's, so the results
// are those of linear_integer.cpp bit for bit.
#include "group.h"
#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

// Whether the packed codes are what AMX wants, as unsigned numbers.
bool is_direct(const Weight& w) { return w.form == kInt8 && w.zeros == nullptr; }

// Codes of one tile of channels, less their zeros.
void unpack_tile(const Weight& w, int tile, int8_t* slab) {
  const int units = w.padded_group / 8;
  for (int g = 0; g < w.groups; ++g) {
    const int64_t index = (int64_t)tile * w.groups + g;
    U32 zero = (U32)splat((int32_t)w.code_bias);
    if (w.zeros != nullptr) zero = widen(load<U8x16>(w.zeros + index * kLanes));
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

// sums[2 row tiles][2 channel tiles][16][16] of one group; the lower row tile only where there is one.
template <bool IsUnsigned>
QSERVE_INLINE void dot_group(const int8_t* upper, const int8_t* lower, int64_t stride, const int8_t* left,
                             const int8_t* right, int bytes, int depth, int32_t* sums) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int at = 0; at < bytes; at += 4 * depth) {
    tile_load<4>(upper + at, stride);
    tile_load<6>(left + at * kLanes, 64);
    tile_load<7>(right + at * kLanes, 64);
    tile_dot<IsUnsigned, 0, 4, 6>();
    tile_dot<IsUnsigned, 1, 4, 7>();
    if (lower == nullptr) continue;
    tile_load<5>(lower + at, stride);
    tile_dot<IsUnsigned, 2, 5, 6>();
    tile_dot<IsUnsigned, 3, 5, 7>();
  }
  tile_store<0>(sums);
  tile_store<1>(sums + 256);
  if (lower == nullptr) return;
  tile_store<2>(sums + 512);
  tile_store<3>(sums + 768);
}

constexpr int kBatch = 4;  // groups whose sums are stored before any is added: fewer loads and stores of y

// Codes, scales and offsets of two tiles of channels, ready for use; the second tile may be the first again.
struct Slab {
  const int8_t* codes;  // (2, padded_features, 16)
  float* scales;        // (2, groups, 16)
  float* offsets;       // the same, or null
  int64_t stride;       // of codes, from one tile to the other
};

Slab unpack(const Weight& w, int tile) {
  Scratch& scratch = thread_scratch();
  scratch.reset();
  const int64_t numbers = (int64_t)w.groups * kLanes;
  const int64_t bytes = (int64_t)w.padded_features() * kLanes;
  int8_t* codes = is_direct(w) ? nullptr : scratch.take<int8_t>(2 * bytes);
  Slab slab = {codes, scratch.take<float>(2 * numbers), nullptr, bytes};
  if (is_direct(w)) slab.codes = (const int8_t*)w.codes + tile * bytes, slab.stride = tile + 1 < w.tiles() ? bytes : 0;
  if (w.offsets != nullptr) slab.offsets = scratch.take<float>(2 * numbers);
  for (int t = 0; t < 2; ++t) {
    const int from = tile + t < w.tiles() ? tile + t : tile;
    if (!is_direct(w)) unpack_tile(w, from, codes + t * bytes);
    for (int64_t i = 0; i < numbers; i += kLanes) {
      const GroupScales group = load_scales(w, from * numbers + i);
      store(slab.scales + t * numbers + i, group.scale);
      if (slab.offsets != nullptr) store(slab.offsets + t * numbers + i, group.offset);
    }
  }
  return slab;
}

template <Inputs Kind, bool HasOffset>
struct TileKernel {
  static constexpr int Planes = num_planes(Kind);
  static constexpr int kRows = 16 / Planes;  // of the batch, in a tile

  const Weight& w;
  const Rows& rows;
  const Output& output;
  const Slab& slab;
  int tile;
  int64_t end;  // of the task's rows

  int count_rows(int64_t first_row) const {
    return (int)(end - first_row < 2 * kRows ? end - first_row : 2 * kRows);
  }

  // Group `g` of two tiles of rows by two of channels.
  QSERVE_INLINE void dot(int64_t first_row, int g, int32_t* sums) const {
    const int64_t at = (int64_t)g * w.padded_group;
    const int8_t* upper = rows.codes + first_row * Planes * rows.stride + at;
    const int8_t* lower = first_row + kRows < end ? upper + kRows * Planes * rows.stride : nullptr;
    const int8_t* left = slab.codes + at * kLanes;
    const auto dot = is_direct(w) ? dot_group<true> : dot_group<false>;
    dot(upper, lower, rows.stride, left, left + slab.stride, w.padded_group, w.padded_group % 64 == 0 ? 16 : 8, sums);
  }

  // A plane's sum of a group, with codes less their zeros.
  QSERVE_INLINE I32 plane_sum(const int32_t* sums, int64_t row, int g, int plane) const {
    const I32 sum = load<I32>(sums + plane * kLanes);
    return is_direct(w) ? sum + splat(rows.starts[(row * w.groups + g) * Planes + plane]) : sum;
  }

  void multiply(int64_t first_row) const {
    if (w.groups == 1) return multiply_one_group(first_row);
    alignas(64) int32_t sums[kBatch][2 * 2 * 256];
    F32 y[2][2 * kRows] = {};
    const int num_rows = count_rows(first_row);
    for (int g = 0; g < w.groups; g += kBatch) {
      const int count = w.groups - g < kBatch ? w.groups - g : kBatch;
      for (int i = 0; i < count; ++i) dot(first_row, g + i, sums[i]);
      for (int t = 0; t < 2; ++t) {
        if (count == kBatch) add_sums<kBatch>(g, first_row, num_rows, t, sums, y[t]);
        for (int i = 0; count < kBatch && i < count; ++i) add_sums<1>(g + i, first_row, num_rows, t, sums + i, y[t]);
      }
    }
    for (int r = 0; r < num_rows; ++r)
      for (int t = 0; t < 2 && tile + t < w.tiles(); ++t)
        output.put(first_row + r, tile + t, finish_row<Kind>(y[t][r], w, rows, first_row + r, tile + t));
  }

  // Its sums are the results, but for what add_sums does to them.
  void multiply_one_group(int64_t first_row) const {
    alignas(64) int32_t sums[2 * 2 * 256];
    dot(first_row, 0, sums);
    const int num_rows = count_rows(first_row);
    const Output to = output;
    for (int t = 0; t < 2 && tile + t < w.tiles(); ++t) {
      const GroupScales scales = scales_of(t, 0);
      for (int r = 0; r < num_rows; ++r) {
        const int64_t row = first_row + r;
        I32 planes[Planes];
        for (int p = 0; p < Planes; ++p)
          planes[p] = plane_sum(sums + r / kRows * 512 + t * 256 + r % kRows * Planes * kLanes, row, 0, p);
        const F32 y = add_group<Kind>(F32{}, planes, scales, input_scale<Kind>(w, rows, row, 0),
                                      HasOffset ? rows.totals[row] : 0.0f);
        to.put(row, tile + t, finish_row<Kind>(y, w, rows, row, tile + t));
      }
    }
  }

  GroupScales scales_of(int t, int g) const {
    const int64_t at = ((int64_t)t * w.groups + g) * kLanes;
    return {load<F32>(slab.scales + at), HasOffset ? load<F32>(slab.offsets + at) : F32{}, HasOffset};
  }

  // Adds the sums of Count groups from g on to one tile of channels.
  template <int Count>
  QSERVE_INLINE void add_sums(int g, int64_t first_row, int num_rows, int t, const int32_t (*sums)[1024], F32* y) const {
    GroupScales scales[Count];
    for (int i = 0; i < Count; ++i) scales[i] = scales_of(t, g + i);
    for (int half = 0; half < 2; ++half) {
      const int32_t* from = sums[0] + half * 512 + t * 256;
      for (int r = half * kRows; r < num_rows && r < (half + 1) * kRows; ++r, from += Planes * kLanes) {
        const int64_t row = first_row + r;
        F32 total = y[r];
        for (int i = 0; i < Count; ++i) {
          I32 planes[Planes];
          for (int p = 0; p < Planes; ++p) planes[p] = plane_sum(from + i * 1024, row, g + i, p);
          total = add_group<Kind>(total, planes, scales[i], input_scale<Kind>(w, rows, row, g + i),
                                  HasOffset ? rows.totals[row * w.groups + g + i] : 0.0f);
        }
        y[r] = total;
      }
    }
  }
};

template <Inputs Kind, bool HasOffset>
void multiply_piece(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t begin, int64_t end) {
  const Slab slab = unpack(w, tile);
  const TileKernel<Kind, HasOffset> kernel = {w, rows, output, slab, tile, end};
  const TileScope scope(w.padded_group % 64 == 0 ? 16 : 8);
  for (int64_t row = begin; row < end; row += 2 * kernel.kRows) kernel.multiply(row);
}

bool is_for_tiles(const Weight& w, const Rows& rows) {
  constexpr int kFewest[] = {16, 10};  // rows, by planes; measured: with fewer the vector kernel is faster
  const bool fits = w.padded_group % 32 == 0 && (w.zeros == nullptr || w.form == kInt4);
  return fits && rows.count >= kFewest[w.planes - 1] && allow_tiles();
}

}  // namespace

bool multiply_integer_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  if (!is_for_tiles(w, rows)) return false;
  constexpr void (*kernels[2][3])(const Weight&, const Rows&, const Output&, int, int64_t, int64_t) = {
      {multiply_piece<kDynamicInputs, false>, multiply_piece<kGroupInputs, false>, multiply_piece<kRowInputs, false>},
      {multiply_piece<kDynamicInputs, true>, multiply_piece<kGroupInputs, true>, multiply_piece<kRowInputs, true>},
  };
  const auto kernel = kernels[w.offsets != nullptr][inputs_of(w)];
  constexpr int64_t kMany = 64;  // measured
  const Blocks blocks = split_blocks(w, rows.count, team, kMany);
  team.run(blocks.count(), [&](int64_t task) {
    const Range block = blocks.rows_of(task), tiles = blocks.tiles_of(task);
    for (int64_t tile = tiles.begin; tile < tiles.end; tile += 2)
      kernel(w, rows, output, (int)tile, block.begin, block.end);
  });
  return true;
}

#else

bool multiply_integer_tiles(const Weight&, const Rows&, const Output&, Team&) { return false; }

#endif

}  // namespace qserve
