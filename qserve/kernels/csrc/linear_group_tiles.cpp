// 4-bit weights of short groups times 16-bit inputs by AMX, for many rows, in bfloat16 and yet exact: an input is
// (256 q0 + q1) * scale with q0, q1 of 8 bits and a power of two, so 256 q0 scale and q1 scale are bfloat16 numbers, and
// so is a code. All products are multiples of the scale and a group's sum stays below 2^24 of it, so float32 holds every
// partial sum, in whatever order AMX adds. A tile then gives scale * sum of a group at once: both planes added, already
// float. That is a third of the work behind each group that integer tiles need (linear_tiles.cpp), and the same bits.
#include "group.h"
#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_BF16__)

namespace {

constexpr int kBatch = 4;  // groups whose sums are stored before any is added: fewer loads and stores of y
constexpr int kBlockRows = 32;

// A group's largest sum, in units of the input's scale, is below 2^24.
bool is_exact(const Weight& w) {
  const int64_t largest_code = w.zeros == nullptr && w.code_bias == 8 ? 8 : 15;
  return w.padded_group % 32 == 0 && w.padded_group * largest_code * 127 * 256 < (1 << 24);
}

bool is_for_groups(const Weight& w, const Rows& rows) {
  constexpr int kFewest = 10;  // measured: with fewer rows the vector kernel is faster
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

void unpack_group(const Weight& w, int64_t index, __m512i table, uint16_t* to) {
  const int units = w.padded_group / 8;
  const uint8_t* codes = w.codes + index * units * 64;
  if (w.zeros == nullptr) {
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

Slab unpack(const Weight& w, int tile) {
  Scratch& scratch = thread_scratch();
  scratch.reset();
  const int64_t numbers = (int64_t)w.groups * kLanes, stride = (int64_t)w.padded_features() * kLanes;
  const Slab slab = {scratch.take<uint16_t>(2 * stride), scratch.take<float>(2 * numbers),
                     scratch.take<float>(2 * numbers), stride};
  const __m512i table = _mm512_loadu_si512(CodeTable(w.code_bias).values);
  for (int t = 0; t < 2; ++t) {
    const int64_t from = tile + t < w.tiles() ? tile + t : tile;
    for (int g = 0; g < w.groups; ++g) {
      const int64_t index = from * w.groups + g;
      unpack_group(w, index, table, slab.codes + t * stride + (int64_t)g * w.padded_group * kLanes);
      const GroupScales group = load_scales(w, index * kLanes);
      store(slab.scales + t * numbers + (int64_t)g * kLanes, group.scale);
      store(slab.offsets + t * numbers + (int64_t)g * kLanes, group.offset);
    }
  }
  return slab;
}

template <bool HasOffset>
struct GroupKernel {
  const Weight& w;
  const Rows& rows;
  const uint16_t* inputs;  // (count, 2, stride)
  const Output& output;
  const Slab& slab;
  int tile;

  // sums[2 row tiles][2 channel tiles][16][16] of one group.
  QSERVE_INLINE void dot_group(int64_t first_row, bool has_lower, int64_t at, float* sums) const {
    const int64_t row_bytes = rows.stride * 4;
    const uint16_t* upper = inputs + first_row * 2 * rows.stride;
    const uint16_t* lower = upper + 16 * 2 * rows.stride;
    const uint16_t* left = slab.codes + at * kLanes;
    const uint16_t* right = left + slab.stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = at; k < at + w.padded_group; k += 32, left += 512, right += 512) {
      _tile_loadd(6, left, 64);
      _tile_loadd(7, right, 64);
      for (int64_t plane = 0; plane < 2; ++plane) {
        _tile_loadd(4, upper + plane * rows.stride + k, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!has_lower) continue;
        _tile_loadd(5, lower + plane * rows.stride + k, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (!has_lower) return;
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }

  // As add_group<2> does: the input's scale is in the sums, and being a power of two it rounds nothing there or here.
  template <int Count>
  QSERVE_INLINE void add_sums(int g, int64_t first_row, int num_rows, int t, const float (*sums)[1024], F32* y) const {
    F32 scales[Count], offsets[Count];
    for (int i = 0; i < Count; ++i) {
      const int64_t at = ((int64_t)t * w.groups + g + i) * kLanes;
      scales[i] = load<F32>(slab.scales + at), offsets[i] = load<F32>(slab.offsets + at);
    }
    const float* totals = rows.totals + first_row * w.groups + g;
    for (int r = 0; r < num_rows; ++r, totals += w.groups) {
      const float* from = sums[0] + r / 16 * 512 + t * 256 + r % 16 * kLanes;
      F32 total = y[r];
      for (int i = 0; i < Count; ++i) {
        total = fused(scales[i], load<F32>(from + i * 1024), total);
        if (HasOffset) total = fused(offsets[i], splat(totals[i]), total);
      }
      y[r] = total;
    }
  }

  // Two tiles of rows by two of channels.
  void multiply(int64_t first_row) const {
    alignas(64) float sums[kBatch][1024];
    F32 y[2][kBlockRows] = {};
    const int num_rows = (int)(rows.count - first_row < kBlockRows ? rows.count - first_row : kBlockRows);
    for (int g = 0; g < w.groups; g += kBatch) {
      const int count = w.groups - g < kBatch ? w.groups - g : kBatch;
      for (int i = 0; i < count; ++i) dot_group(first_row, num_rows > 16, (int64_t)(g + i) * w.padded_group, sums[i]);
      for (int t = 0; t < 2; ++t) {
        if (count == kBatch) add_sums<kBatch>(g, first_row, num_rows, t, sums, y[t]);
        for (int i = 0; count < kBatch && i < count; ++i) add_sums<1>(g + i, first_row, num_rows, t, sums + i, y[t]);
      }
    }
    for (int r = 0; r < num_rows; ++r)
      for (int t = 0; t < 2 && tile + t < w.tiles(); ++t) output.put(first_row + r, tile + t, y[t][r]);
  }
};

template <bool HasOffset>
void multiply_piece(const Weight& w, const Rows& rows, const uint16_t* inputs, const Output& output, int tile,
                    int64_t begin, int64_t end) {
  const Slab slab = unpack(w, tile);
  const GroupKernel<HasOffset> kernel = {w, rows, inputs, output, slab, tile};
  const TileScope scope(16);
  for (int64_t row = begin; row < end; row += kBlockRows) kernel.multiply(row);
}

}  // namespace

bool multiply_group_tiles(const Weight& w, const Rows& rows, const Output& output, Scratch& scratch, Team& team) {
  if (!is_for_groups(w, rows)) return false;
  uint16_t* inputs = scratch.take<uint16_t>((rows.count + kBlockRows) * 2 * rows.stride);
  const Pieces few = {rows.count, 4}, blocks = split_rows(rows.count, rows.stride * 4, kBlockRows);
  team.run(few.count(), [&](int64_t piece) {
    for (int64_t row = few.begin(piece); row < few.end(piece); ++row)
      widen_row(w, rows, row, inputs + row * 2 * rows.stride);
  });
  const auto kernel = w.offsets == nullptr ? multiply_piece<false> : multiply_piece<true>;
  const int64_t pairs = (w.tiles() + 1) / 2;
  team.run(pairs * blocks.count(), [&](int64_t task) {
    const int64_t block = task / pairs;
    kernel(w, rows, inputs, output, (int)(task % pairs) * 2, blocks.begin(block), blocks.end(block));
  });
  return true;
}

#else

bool multiply_group_tiles(const Weight&, const Rows&, const Output&, Scratch&, Team&) { return false; }

#endif

}  // namespace qserve
