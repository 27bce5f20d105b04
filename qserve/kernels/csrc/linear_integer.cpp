// Integer weights times integer inputs, sixteen output channels at a time: for few rows, and for every target.
#include "aligned.h"
#include "group.h"
#include "linear.h"

namespace qserve {
namespace {

// Eight codes along the input for 16 channels: the first four in `low`, the others in `high`, times 16 where they stay
// in the upper half of their byte.
struct Codes {
  Bytes low, high;
};

template <int Bits, bool IsHighTimes16>
QSERVE_INLINE Codes load_codes(const uint8_t* from) {
  if constexpr (Bits == 8) return {load<Bytes>(from), load<Bytes>(from + 64)};
  const U32 pairs = load<U32>(from);
  const U32 high = IsHighTimes16 ? pairs & 0xf0f0f0f0u : (pairs >> 4) & 0x0f0f0f0fu;
  return {(Bytes)(pairs & 0x0f0f0f0fu), (Bytes)high};
}

template <int Bits>
constexpr int kUnitBytes = Bits == 4 ? 64 : 128;  // of eight codes for 16 channels

// How far ahead of its use a weight is fetched: first from wherever it is into the second level of the cache, which has
// more requests under way than the first, and then from there. Measured for one row: either alone was slower.
constexpr int kFar = 12288, kNear = 1536;

// `part`: what part of the codes' bytes this stream has beside them.
QSERVE_INLINE void fetch_ahead(const void* stream, int part = 1) {
  __builtin_prefetch((const uint8_t*)stream + kFar / part, 0, kSecondLevel);
  __builtin_prefetch((const uint8_t*)stream + kNear / part);
}

// The dot products of one group, of Count rows and all their planes, with unsigned codes, from `sums` on. Few sums go
// in two chains each, since one would wait for its own last addition.
template <int Bits, int Count>
QSERVE_INLINE void dot_group(const uint8_t* codes, int units, const int8_t* const* inputs, int64_t at, I32* sums) {
  constexpr bool kIsSplit = Count < 4, kIsHighTimes16 = kIsSplit && Bits == 4;
  I32 others[Count] = {};
  for (int unit = 0; unit < units; ++unit, codes += kUnitBytes<Bits>, at += 8) {
    fetch_ahead(codes);
    if constexpr (Bits == 8) fetch_ahead(codes + 64);
    const Codes eight = load_codes<Bits, kIsHighTimes16>(codes);
    for (int i = 0; i < Count; ++i) {
      I32& high = kIsSplit ? others[i] : sums[i];
      sums[i] = dot<Bits>(sums[i], eight.low, inputs[i] + at);
      high = dot<kIsHighTimes16 ? 8 : Bits>(high, eight.high, inputs[i] + at + 4);
    }
  }
  if constexpr (kIsSplit)
    for (int i = 0; i < Count; ++i) sums[i] += kIsHighTimes16 ? others[i] >> 4 : others[i];
}

// Units is the length of a group in units of eight inputs, or 0 where it is known only at run time.
template <int Bits, Inputs Kind, int Units, int NumRows>
void multiply_tile(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t first_row) {
  constexpr int Planes = num_planes(Kind), kCount = Planes * NumRows;
  const int units = Units ? Units : w.padded_group / 8;
  const int8_t* inputs[kCount];
  for (int i = 0; i < kCount; ++i) inputs[i] = rows.codes + (first_row * Planes + i) * rows.stride;
  F32 y[NumRows] = {};
  int64_t index = (int64_t)tile * w.groups;
  const uint8_t* codes = w.codes + index * units * kUnitBytes<Bits>;
  for (int g = 0; g < w.groups; ++g, ++index, codes += units * kUnitBytes<Bits>) {
    I32 sums[kCount];
    for (int i = 0; i < kCount; ++i)
      sums[i] = splat(rows.starts[((first_row + i / Planes) * w.groups + g) * Planes + i % Planes]);
    if (w.zeros != nullptr) {
      const I32 zeros = (I32)widen(load<U8x16>(w.zeros + index * kLanes));
      for (int i = 0; i < kCount; ++i) sums[i] *= zeros;
    }
    dot_group<Bits, kCount>(codes, units, inputs, (int64_t)g * w.padded_group, sums);
    const GroupScales scales = load_scales(w, index * kLanes);
    for (int r = 0; r < NumRows; ++r) {
      const int64_t row = first_row + r;
      y[r] = add_group<Kind>(y[r], sums + r * Planes, scales, input_scale<Kind>(w, rows, row, g),
                             rows.totals[row * w.groups + g]);
    }
  }
  for (int r = 0; r < NumRows; ++r)
    output.put(first_row + r, tile, finish_row<Kind>(y[r], w, rows, first_row + r, tile));
}

// Beside the codes, multiples and constants are streams of their own, an eighth as wide where groups are of 32.
QSERVE_INLINE void fetch_numbers(const Weight& w, int64_t index) {
  const int64_t at = index * 2 * kLanes;
  fetch_ahead((const uint8_t*)w.scales + at, 8);
  if (w.offsets != nullptr) fetch_ahead((const uint8_t*)w.offsets + at, 8);
}

// The same with aligned scales: sums of so many groups as 32 bits hold, of a narrow weight all, and of those in double.
// Inputs of one plane are what the recipe makes of them; those of two are exact, and codes may have constants.
template <Inputs Kind, int Units, int NumRows>
void multiply_aligned_tile(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t first_row) {
  constexpr int Planes = num_planes(Kind), kCount = Planes * NumRows;
  constexpr bool kIsShort = Kind == kRowInputs && Units == 4;  // see has_short_sums
  constexpr int kMostInputs = 512;  // 128 * 8 * 4079 for each stays below 2^31
  const int units = Units ? Units : w.padded_group / 8;
  const int most = w.is_narrow ? w.groups : w.group_size < kMostInputs ? kMostInputs / w.group_size : 1;
  const bool has_constants = Kind == kRowInputs && (kIsShort || w.offsets != nullptr);
  const void* all_constants = w.offsets != nullptr ? w.offsets : w.scales;
  const int8_t* inputs[kCount];
  for (int i = 0; i < kCount; ++i) inputs[i] = rows.codes + (first_row * Planes + i) * rows.stride;
  const auto index_of = [&](int i, int g) { return ((first_row + i / Planes) * w.groups + g) * Planes + i % Planes; };
  Doubles y[kCount] = {};
  int64_t index = (int64_t)tile * w.groups;
  const uint8_t* codes = w.codes + index * units * 64;
  for (int g = 0; g < w.groups;) {
    U32 totals[kCount] = {};
    for (const int end = g + most < w.groups ? g + most : w.groups; g < end; ++g, ++index, codes += units * 64) {
      I32 sums[kCount];
      for (int i = 0; i < kCount; ++i) sums[i] = splat(rows.starts[index_of(i, g)]);
      if (Planes == 1 && w.zeros != nullptr) {
        const I32 zeros = (I32)widen(load<U8x16>(w.zeros + index * kLanes));
        for (int i = 0; i < kCount; ++i) sums[i] *= zeros;
      }
      fetch_numbers(w, index);
      dot_group<4, kCount>(codes, units, inputs, (int64_t)g * w.padded_group, sums);
      if constexpr (kIsShort) {
        const I32 multiples = (I32)widen(load<U16x16>((const uint16_t*)w.scales + index * kLanes));
        for (int i = 0; i < kCount; ++i) totals[i] = add_product(totals[i], sums[i], multiples);
      } else {
        const U32 multiples = (U32)load_int16(w.scales, index * kLanes);
        for (int i = 0; i < kCount; ++i) totals[i] += (U32)sums[i] * multiples;
      }
      if (!has_constants) continue;
      const I32 constants = load_int16(all_constants, index * kLanes);
      for (int i = 0; i < kCount; ++i) totals[i] = add_product(totals[i], constants, rows.sums[index_of(i, g)]);
    }
    for (int i = 0; i < kCount; ++i) y[i] = y[i] + to_doubles((I32)totals[i]);
  }
  const AlignedFinish finish(w, tile);
  for (int64_t r = 0; r < NumRows; ++r) {
    const int64_t row = first_row + r;
    Doubles total = y[r * Planes];
    for (int p = 1; p < Planes; ++p) total = total * 256.0 + y[r * Planes + p];
    output.put(row, tile, finish(total, rows.scales[row], Planes == 1 ? rows.zeros[row] : 0));
  }
}

template <Inputs Kind, int Units, int NumRows = 8 / num_planes(Kind)>
void multiply_aligned_rows(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t row) {
  for (; row + NumRows <= rows.count; row += NumRows)
    multiply_aligned_tile<Kind, Units, NumRows>(w, rows, output, tile, row);
  if constexpr (NumRows > 1)
    if (row < rows.count) multiply_aligned_rows<Kind, Units, NumRows / 2>(w, rows, output, tile, row);
}

// As many rows at once as registers hold their sums, then half as many, down to one.
template <int Bits, Inputs Kind, int Units, int NumRows = 8 / num_planes(Kind)>
void multiply_rows(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t row) {
  for (; row + NumRows <= rows.count; row += NumRows)
    multiply_tile<Bits, Kind, Units, NumRows>(w, rows, output, tile, row);
  if constexpr (NumRows > 1)
    if (row < rows.count) multiply_rows<Bits, Kind, Units, NumRows / 2>(w, rows, output, tile, row);
}

using Kernel = void (*)(const Weight&, const Rows&, const Output&, int tile, int64_t row);

Kernel choose_kernel(const Weight& w) {
  constexpr Inputs kDynamic = kDynamicInputs, kGroup = kGroupInputs, kRow = kRowInputs;
  static constexpr Kernel kernels[2][3] = {
      {multiply_rows<4, kDynamic, 0>, multiply_rows<4, kGroup, 0>, multiply_rows<4, kRow, 0>},
      {multiply_rows<8, kDynamic, 0>, multiply_rows<8, kGroup, 0>, multiply_rows<8, kRow, 0>},
  };
  static constexpr Kernel of_32[2] = {multiply_rows<4, kDynamic, 4>, multiply_rows<4, kGroup, 4>};
  static constexpr Kernel aligned[2][2] = {
      {multiply_aligned_rows<kDynamic, 0>, multiply_aligned_rows<kDynamic, 4>},
      {multiply_aligned_rows<kRow, 0>, multiply_aligned_rows<kRow, 4>},
  };
  const Inputs inputs = inputs_of(w);
  if (w.units != nullptr) return aligned[inputs == kRow][w.padded_group == 32];
  if (w.form == kInt4 && w.padded_group == 32 && inputs != kRow) return of_32[inputs];
  return kernels[w.form == kInt8][inputs];
}

}  // namespace

void multiply_integer(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  if (uses_aligned_tiles(w, rows.count)) return multiply_aligned_tiles(w, rows, output, team);
  if (uses_exact_tiles(w, rows.count)) return multiply_exact_tiles(w, rows, output, team);
  if (uses_code_tiles(w, rows.count)) return multiply_code_tiles(w, rows, output, team);
  if (w.units == nullptr && multiply_integer_tiles(w, rows, output, team)) return;
  const Kernel kernel = choose_kernel(w);
  const int64_t tile_bytes = (int64_t)w.padded_features() * (w.form == kInt4 ? 8 : 16);
  const Pieces pieces = split_tiles(w, tile_bytes * (rows.count < 8 ? rows.count : 8), team);
  team.run(pieces.count(), [&](int64_t piece) {
    for (int64_t tile = pieces.begin(piece); tile < pieces.end(piece); ++tile) kernel(w, rows, output, (int)tile, 0);
  });
}

}  // namespace qserve
