// Integer weights times integer inputs, sixteen output channels at a time: for few rows, and for every target.
#include "group.h"
#include "linear.h"

namespace qserve {
namespace {

// Eight codes along the input for 16 channels: the first four in `low`, the others in `high`.
struct Codes {
  Bytes low, high;
};

template <int Bits>
QSERVE_INLINE Codes load_codes(const uint8_t* from) {
  if constexpr (Bits == 8) return {load<Bytes>(from), load<Bytes>(from + 64)};
  const U32 pairs = load<U32>(from);
  return {(Bytes)(pairs & 0x0f0f0f0fu), (Bytes)((pairs >> 4) & 0x0f0f0f0fu)};
}

template <int Bits>
constexpr int kUnitBytes = Bits == 4 ? 64 : 128;  // of eight codes for 16 channels

// The dot products of one group, of Count rows and all their planes, with unsigned codes, from `sums` on.
template <int Bits, int Count>
QSERVE_INLINE void dot_group(const uint8_t* codes, int units, const int8_t* const* inputs, int64_t at, I32* sums) {
  I32 others[Count] = {};
  for (int unit = 0; unit < units; ++unit) {
    __builtin_prefetch(codes + (unit + 32) * kUnitBytes<Bits>);
    if constexpr (Bits == 8) __builtin_prefetch(codes + (unit + 32) * kUnitBytes<Bits> + 64);
    const Codes eight = load_codes<Bits>(codes + unit * kUnitBytes<Bits>);
    for (int i = 0; i < Count; ++i) {
      sums[i] = dot<Bits>(sums[i], eight.low, inputs[i] + at + unit * 8);
      others[i] = dot<Bits>(others[i], eight.high, inputs[i] + at + unit * 8 + 4);
    }
  }
  for (int i = 0; i < Count; ++i) sums[i] += others[i];
}

template <int Bits, int Planes, int NumRows>
void multiply_tile(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t first_row) {
  constexpr int kCount = Planes * NumRows;
  const int units = w.padded_group / 8;
  const int8_t* inputs[kCount];
  for (int i = 0; i < kCount; ++i) inputs[i] = rows.codes + (first_row * Planes + i) * rows.features;
  F32 y[NumRows] = {};
  for (int g = 0; g < w.groups; ++g) {
    const int64_t index = (int64_t)tile * w.groups + g;
    I32 sums[kCount];
    for (int i = 0; i < kCount; ++i)
      sums[i] = splat(rows.starts[((first_row + i / Planes) * w.groups + g) * Planes + i % Planes]);
    if (w.zeros != nullptr) {
      const I32 zeros = __builtin_convertvector(load<U8x16>(w.zeros + index * kLanes), I32);
      for (int i = 0; i < kCount; ++i) sums[i] *= zeros;
    }
    dot_group<Bits, kCount>(w.codes + index * units * kUnitBytes<Bits>, units, inputs, (int64_t)g * w.padded_group, sums);
    const GroupScales scales = load_scales(w, index * kLanes);
    for (int r = 0; r < NumRows; ++r) {
      const int64_t row = first_row + r;
      y[r] = add_group<Planes>(y[r], sums + r * Planes, scales, input_scale<Planes>(w, rows, row, g),
                               rows.totals[row * w.groups + g]);
    }
  }
  for (int r = 0; r < NumRows; ++r)
    output.put(first_row + r, tile, finish_row<Planes>(y[r], w, rows, first_row + r, tile));
}

// As many rows at once as registers hold their sums.
template <int Bits, int Planes>
void multiply_rows(const Weight& w, const Rows& rows, const Output& output, int tile) {
  constexpr int kMost = Planes == 1 ? 4 : 2;
  int64_t row = 0;
  for (; row + kMost <= rows.count; row += kMost) multiply_tile<Bits, Planes, kMost>(w, rows, output, tile, row);
  for (; row < rows.count; ++row) multiply_tile<Bits, Planes, 1>(w, rows, output, tile, row);
}

using Kernel = void (*)(const Weight&, const Rows&, const Output&, int tile);

Kernel choose_kernel(const Weight& w) {
  static constexpr Kernel kernels[2][3] = {
      {multiply_rows<4, 1>, multiply_rows<4, 2>, multiply_rows<4, 3>},
      {multiply_rows<8, 1>, multiply_rows<8, 2>, multiply_rows<8, 3>},
  };
  return kernels[w.form == kInt8][w.planes - 1];
}

}  // namespace

void multiply_integer(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  if (multiply_integer_tiles(w, rows, output, team)) return;
  const Kernel kernel = choose_kernel(w);
  const int64_t tile_bytes = (int64_t)w.padded_features() * (w.form == kInt4 ? 8 : 16);
  const Pieces pieces = split_tiles(w, tile_bytes * (rows.count < 8 ? rows.count : 8), team);
  team.run(pieces.count(), [&](int64_t piece) {
    for (int64_t tile = pieces.begin(piece); tile < pieces.end(piece); ++tile) kernel(w, rows, output, (int)tile);
  });
}

}  // namespace qserve
