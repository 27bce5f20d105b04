// Float weights times float inputs by fused multiply-add in float32: bfloat16, float16, float32 and float8 weights are
// widened in registers. A row's sums over even and over odd inputs run in ascending order whatever else is computed
// beside it, so its result does not depend on the batch.
#include "linear.h"

namespace qserve {
namespace {

// Two neighbours along the input, 16 channels each. Types of up to 16 bits stand as pairs, channel by channel; float32
// as two vectors.
struct Pair {
  F32 even, odd;
};

template <int Type>
constexpr int kPairBytes = Type == kF32 ? 128 : (Type == kBF16 || Type == kF16) ? 64 : 32;

QSERVE_INLINE F32 widen_f16(U32 bits) {
  return (F32)((U32)((F32)((bits & 0x7fffu) << 13) * splat(0x1p112f)) | ((bits & 0x8000u) << 16));
}

template <int Type>
QSERVE_INLINE F32 widen_f8(U32 bits) {
  const F32 size = Type == kE4M3 ? (F32)((bits & 0x7fu) << 20) * splat(0x1p120f)
                                 : (F32)((bits & 0x7fu) << 21) * splat(0x1p112f);
  return (F32)((U32)size | ((bits & 0x80u) << 24));
}

template <int Type>
QSERVE_INLINE Pair load_pair(const uint8_t* from) {
  if constexpr (Type == kF32) return {load<F32>(from), load<F32>(from + 64)};
  if constexpr (Type == kBF16) {
    const U32 pairs = load<U32>(from);
    return {bits_to_float(pairs << 16), bits_to_float(pairs & 0xffff0000u)};
  }
  if constexpr (Type == kF16) {
    const U32 pairs = load<U32>(from);
    return {widen_f16(pairs & 0xffffu), widen_f16(pairs >> 16)};
  }
  const U32 pairs = widen(load<U16x16>(from));
  return {widen_f8<Type>(pairs & 0xffu), widen_f8<Type>(pairs >> 8)};
}

template <int Type, int NumRows, int NumTiles>
void multiply_block(const Weight& w, const Rows& rows, const Output& output, int tile, int64_t row) {
  const int64_t tile_bytes = (int64_t)w.padded_features() / 2 * kPairBytes<Type>;
  const int pairs = w.padded_group / 2;
  F32 y[NumRows][NumTiles] = {};
  for (int g = 0; g < w.groups; ++g) {
    const uint8_t* codes = w.codes + tile * tile_bytes + (int64_t)g * pairs * kPairBytes<Type>;
    const float* x = rows.values + row * rows.stride + (int64_t)g * w.padded_group;
    F32 even[NumRows][NumTiles] = {}, odd[NumRows][NumTiles] = {};
    for (int i = 0; i < pairs; ++i)
      for (int t = 0; t < NumTiles; ++t) {
        const Pair pair = load_pair<Type>(codes + t * tile_bytes + i * kPairBytes<Type>);
        for (int r = 0; r < NumRows; ++r) {
          even[r][t] = fused(splat(x[r * rows.stride + 2 * i]), pair.even, even[r][t]);
          odd[r][t] = fused(splat(x[r * rows.stride + 2 * i + 1]), pair.odd, odd[r][t]);
        }
      }
    for (int t = 0; t < NumTiles; ++t) {
      const int64_t at = ((int64_t)(tile + t) * w.groups + g) * kLanes;
      const F32 scale = w.scales == nullptr ? splat(1.0f) : load_float(w.scale_type, w.scales, at);
      for (int r = 0; r < NumRows; ++r) y[r][t] += scale * (even[r][t] + odd[r][t]);
    }
  }
  for (int r = 0; r < NumRows; ++r)
    for (int t = 0; t < NumTiles; ++t) {
      const F32 input_scale = splat(w.activation == kFloat8 ? rows.scales[row + r] : 1.0f);
      output.put(row + r, tile + t, y[r][t] * input_scale);
    }
}

template <int Type, int NumTiles>
void multiply_tiles(const Weight& w, const Rows& rows, const Output& output, int tile) {
  constexpr int kMost = 16 / (2 * NumTiles);
  int64_t row = 0;
  for (; row + kMost <= rows.count; row += kMost) multiply_block<Type, kMost, NumTiles>(w, rows, output, tile, row);
  for (; row < rows.count; ++row) multiply_block<Type, 1, NumTiles>(w, rows, output, tile, row);
}

template <int Type>
void multiply_piece(const Weight& w, const Rows& rows, const Output& output, int begin, int end) {
  int tile = begin;
  for (; tile + 4 <= end; tile += 4) multiply_tiles<Type, 4>(w, rows, output, tile);
  for (; tile < end; ++tile) multiply_tiles<Type, 1>(w, rows, output, tile);
}

using Kernel = void (*)(const Weight&, const Rows&, const Output&, int begin, int end);
constexpr Kernel kKernels[] = {multiply_piece<kBF16>, multiply_piece<kF16>, multiply_piece<kF32>,
                               multiply_piece<kE4M3>, multiply_piece<kE5M2>};

}  // namespace

void multiply_float(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  if (rows.halves != nullptr) return multiply_bf16_tiles(w, rows, output, team);
  const int64_t tile_bytes = (int64_t)w.padded_features() * kLanes * kFloatBytes[w.value_type];
  Pieces pieces = split_tiles(w, tile_bytes, team);
  pieces.size = (pieces.size + 3) / 4 * 4;  // the kernels like four tiles
  team.run(pieces.count(), [&](int64_t piece) {
    kKernels[w.value_type](w, rows, output, (int)pieces.begin(piece), (int)pieces.end(piece));
  });
}

}  // namespace qserve
