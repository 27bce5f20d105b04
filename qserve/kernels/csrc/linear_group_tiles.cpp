// 4-bit weights of short groups times 16-bit inputs by AMX, for many rows, in bfloat16 and yet exact: an input is
// (256 q0 + q1) * scale with q0, q1 of 8 bits and a power of two, so 256 q0 scale and q1 scale are bfloat16 numbers, and
// so is a code. All products are multiples of the scale and a group's sum stays below 2^24 of it, so float32 holds every
// partial sum, in whatever order AMX adds. A tile then gives scale * sum of a group at once: both planes added, already
// float. That is a third of the work behind each group that integer tiles need (linear_tiles.cpp), and the same bits.
//
// A task unpacks the codes of 32 channels once, for all its rows. A tile's sums of one group go through the first cache
// into 16 registers, one a row, which stand for a whole chunk of groups.
#include "group.h"
#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_BF16__)

namespace {

constexpr int kRows = 16;   // of the batch, in a tile
constexpr int kChains = 4;   // tiles that sum independently, since one would wait for its own last product

// A group's largest sum, in units of the input's scale, is below 2^24.
bool is_exact(const Weight& w) {
  const int64_t largest_code = w.zeros == nullptr && w.code_bias == 8 ? 8 : 15;
  return w.padded_group % 32 == 0 && w.padded_group * largest_code * 127 * 256 < (1 << 24);
}

bool is_for_groups(const Weight& w, const Rows& rows) {
  constexpr int kFewest = 9;  // measured: with fewer rows the vector kernel is faster
  return w.form == kInt4 && w.planes == 2 && rows.count >= kFewest && is_exact(w) && allow_tiles();
}

// Both planes of a row as bfloat16, scales multiplied in: (2, stride).
void widen_row(const Weight& w, const Rows& rows, int64_t row, uint16_t* to) {
  for (int p = 0; p < 2; ++p) {
    const int8_t* codes = rows.codes + (row * 2 + p) * rows.stride;
    for (int g = 0; g < w.groups; ++g) {
      const F32 scale = splat(rows.scales[row * w.groups + g] * (p == 0 ? 256.0f : 1.0f));
      for (int64_t i = (int64_t)g * w.padded_group; i < (int64_t)(g + 1) * w.padded_group; i += kLanes) {
        const F32 values = to_float(widen(load<I8x16>(codes + i))) * scale;
        store(to + p * rows.stride + i, upper_halves((U32)values));
      }
    }
  }
}

// The sixteen codes as bfloat16, less the code of zero: twice, so that a fifth bit of an index does not matter.
struct CodeTable {
  uint16_t values[32];
  explicit CodeTable(int32_t zero) {
    for (int i = 0; i < 32; ++i) {
      const float value = (float)(i % 16 - zero);
      uint32_t bits;
      memcpy(&bits, &value, sizeof bits);
      values[i] = (uint16_t)(bits >> 16);
    }
  }
};

// Eight codes of 16 channels as four rows of pairs, (4, 16, 2) bfloat16, looked up in a table of 32.
QSERVE_INLINE void look_up_unit(const uint8_t* codes, __m512i table, uint16_t* to) {
  const __m512i bytes = _mm512_loadu_si512(codes);
  for (int pair = 0; pair < 2; ++pair) {
    // bytes 2 pair and 2 pair + 1 of each lane, one in each half of it
    const __m512i first = _mm512_and_si512(_mm512_srli_epi32(bytes, 16 * pair), _mm512_set1_epi32(0xff));
    const __m512i moved = pair ? _mm512_srli_epi32(bytes, 8) : _mm512_slli_epi32(bytes, 8);
    const __m512i both = _mm512_or_si512(first, _mm512_and_si512(moved, _mm512_set1_epi32(0xff0000)));
    _mm512_storeu_si512(to + pair * 32, _mm512_permutexvar_epi16(both, table));
    _mm512_storeu_si512(to + (2 + pair) * 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table));
  }
}

// The same with a zero for each channel.
void widen_unit(const uint8_t* codes, I32 zeros, uint16_t* to) {
  const U32 bytes = load<U32>(codes);
  for (int half = 0; half < 2; ++half)
    for (int pair = 0; pair < 2; ++pair) {
      const int shift = 4 * half + 16 * pair;
      const F32 even = to_float((I32)((bytes >> shift) & 15u) - zeros);
      const F32 odd = to_float((I32)((bytes >> (shift + 8)) & 15u) - zeros);
      store(to + (half * 2 + pair) * 32, ((U32)even >> 16) | ((U32)odd & 0xffff0000u));
    }
}

void unpack_group(const Weight& w, int64_t index, uint16_t* to) {
  const int units = w.padded_group / 8;
  const uint8_t* codes = w.codes + index * units * 64;
  if (w.zeros == nullptr) {
    const __m512i table = _mm512_loadu_si512(CodeTable(w.code_bias).values);
    for (int unit = 0; unit < units; ++unit) look_up_unit(codes + unit * 64, table, to + unit * 128);
    return;
  }
  const I32 zeros = (I32)widen(load<U8x16>(w.zeros + index * kLanes));
  for (int unit = 0; unit < units; ++unit) widen_unit(codes + unit * 64, zeros, to + unit * 128);
}

// Codes, scales and offsets of two tiles of channels; the second tile may be a copy of the first.
struct Slab {
  uint16_t* codes;  // (2, padded_features / 2, 16, 2)
  float* scales;    // (2, groups, 16)
  float* offsets;   // the same; zeros where there are none
  int64_t stride;   // of codes, from one tile to the other
};

void unpack(const Weight& w, int tile, const Slab& slab) {
  const int64_t numbers = (int64_t)w.groups * kLanes;
  for (int t = 0; t < 2; ++t) {
    const int64_t from = tile + t < w.tiles() ? tile + t : tile;
    for (int g = 0; g < w.groups; ++g) {
      const int64_t index = from * w.groups + g;
      unpack_group(w, index, slab.codes + t * slab.stride + (int64_t)g * w.padded_group * kLanes);
      const GroupScales group = load_scales(w, index * kLanes);
      store(slab.scales + t * numbers + (int64_t)g * kLanes, group.scale);
      store(slab.offsets + t * numbers + (int64_t)g * kLanes, group.offset);
    }
  }
}

template <bool HasOffset>
struct GroupKernel {
  const Weight& w;
  const Rows& rows;
  const uint16_t* inputs;  // (count, 2, stride)
  const Output& output;
  const Slab& slab;

  struct Sums {
    alignas(64) float of[kChains][kRows][kLanes];
  };

  template <int Chain>
  QSERVE_INLINE void dot_group(const uint16_t* x, const uint16_t* codes, Sums& sums) const {
    constexpr int kInputs = 4 + Chain % 2, kCodes = 6 + Chain % 2, kStep = 32;
    const int64_t row_bytes = rows.stride * 4;
    tile_zero<Chain>();
    for (int at = 0; at < w.padded_group; at += kStep) {
      tile_load<kCodes>(codes + at * kLanes, 64);
      tile_load<kInputs>(x + at, row_bytes);
      tile_dot_bf16<Chain, kInputs, kCodes>();
      tile_load<kInputs>(x + at + rows.stride, row_bytes);
      tile_dot_bf16<Chain, kInputs, kCodes>();
    }
    tile_store<Chain>(sums.of[Chain]);
  }

  // Up to four groups from g on.
  QSERVE_INLINE void dot_groups(int count, const uint16_t* x, const uint16_t* codes, Sums& sums) const {
    const int64_t size = w.padded_group;
    dot_group<0>(x, codes, sums);
    if (count > 1) dot_group<1>(x + size, codes + size * kLanes, sums);
    if (count > 2) dot_group<2>(x + 2 * size, codes + 2 * size * kLanes, sums);
    if (count > 3) dot_group<3>(x + 3 * size, codes + 3 * size * kLanes, sums);
  }

  // As add_group<2> does; the input's scale is in the sums, and being a power of two it rounds nothing there or here.
  QSERVE_INLINE void add(const float (*sums)[kLanes], int64_t row, int t, int g, F32* y) const {
    const int64_t at = ((int64_t)t * w.groups + g) * kLanes;
    const F32 scale = load<F32>(slab.scales + at), offset = load<F32>(slab.offsets + at);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      y[r] = fused(scale, load<F32>(sums[r]), y[r]);
      if (HasOffset) y[r] = fused(offset, splat(rows.totals[(row + r) * w.groups + g]), y[r]);
    }
  }

  // Groups [begin, end) of kRows rows and 16 channels, added to `to`, (kRows, 16).
  void take_chunk(int64_t row, int t, int begin, int end, float* to) const {
    Sums sums;
    F32 y[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) y[r] = load<F32>(to + r * kLanes);
    const int64_t size = w.padded_group;
    const uint16_t* x = inputs + row * 2 * rows.stride + begin * size;
    const uint16_t* codes = slab.codes + t * slab.stride + begin * size * kLanes;
    int g = begin;
    for (; g + kChains <= end; g += kChains, x += kChains * size, codes += kChains * size * kLanes) {
      dot_groups(kChains, x, codes, sums);
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) add(sums.of[i], row, t, g + i, y);
    }
    if (g < end) dot_groups(end - g, x, codes, sums);
    for (int i = 0; g + i < end; ++i) add(sums.of[i], row, t, g + i, y);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(to + r * kLanes, y[r]);
  }

  void put(int64_t row, int tile, const float* y) const {
    for (int64_t r = row; r < rows.count && r < row + kRows; ++r, y += kLanes)
      output.put(r, tile, finish_row<2>(load<F32>(y), w, rows, r, tile));
  }

  // Rows [begin, end) of a pair of tiles; the codes of a chunk of groups stay in the first cache while rows pass.
  void multiply(int tile, int64_t begin, int64_t end, float* y) const {
    constexpr int kChunk = 512;  // inputs
    const int chunk = w.padded_group < kChunk ? kChunk / w.padded_group : 1;
    const int num_tiles = tile + 1 < w.tiles() ? 2 : 1;
    memset(y, 0, (end - begin + kRows - 1) / kRows * kRows * 2 * kLanes * sizeof(float));
    for (int g = 0; g < w.groups; g += chunk) {
      const int stop = g + chunk < w.groups ? g + chunk : w.groups;
      for (int64_t row = begin; row < end; row += kRows)
        for (int t = 0; t < num_tiles; ++t) {
          float* to = y + ((row - begin) * 2 + t * kRows) * kLanes;
          take_chunk(row, t, g, stop, to);
          if (stop == w.groups) put(row, tile + t, to);
        }
    }
  }
};

template <bool HasOffset>
void multiply_block(const Weight& w, const Rows& rows, const uint16_t* inputs, const Output& output, const Blocks& blocks,
                    int64_t task) {
  const int64_t block = task / blocks.tiles.count(), piece = task % blocks.tiles.count();
  const int64_t begin = blocks.rows.begin(block), end = blocks.rows.end(block);
  Scratch& scratch = thread_scratch();
  scratch.reset();
  const int64_t numbers = (int64_t)w.groups * kLanes, stride = (int64_t)w.padded_features() * kLanes;
  float* y = scratch.take<float>((end - begin + kRows) * 2 * kLanes);
  const Slab slab = {scratch.take<uint16_t>(2 * stride), scratch.take<float>(2 * numbers),
                     scratch.take<float>(2 * numbers), stride};
  const TileScope scope(16);
  const GroupKernel<HasOffset> kernel = {w, rows, inputs, output, slab};
  for (int64_t tile = blocks.tiles.begin(piece); tile < blocks.tiles.end(piece); tile += 2) {
    unpack(w, (int)tile, slab);
    kernel.multiply((int)tile, begin, end, y);
  }
}

}  // namespace

bool multiply_group_tiles(const Weight& w, const Rows& rows, const Output& output, Scratch& scratch, Team& team) {
  if (!is_for_groups(w, rows)) return false;
  uint16_t* inputs = scratch.take<uint16_t>((rows.count + 16) * 2 * rows.stride);
  const Pieces few = {rows.count, 4};
  team.run(few.count(), [&](int64_t piece) {
    for (int64_t row = few.begin(piece); row < few.end(piece); ++row)
      widen_row(w, rows, row, inputs + row * 2 * rows.stride);
  });
  const auto multiply = w.offsets == nullptr ? multiply_block<false> : multiply_block<true>;
  const Blocks blocks = split_blocks(w, rows.count, team);
  team.run(blocks.count(), [&](int64_t task) { multiply(w, rows, inputs, output, blocks, task); });
  return true;
}

#else

bool multiply_group_tiles(const Weight&, const Rows&, const Output&, Scratch&, Team&) { return false; }

#endif

}  // namespace qserve
