// Aligned scales: those of a channel are whole multiples of one unit, so its sum over all groups is an integer, which no
// order of adding can change. See aligned_scales.py.
#pragma once
#include "lanes.h"
#include "rows.h"

namespace qserve {

typedef double F64 __attribute__((vector_size(64)));
typedef int32_t I32x8 __attribute__((vector_size(32)));
typedef float F32x8 __attribute__((vector_size(32)));

// Sixteen lanes of double: they hold integers of up to 53 bits.
struct Doubles {
  F64 low, high;
};

#if defined(__AVX512F__)  // GCC 12 would go through memory

QSERVE_INLINE Doubles to_doubles(I32 x) {
  return {(F64)_mm512_cvtepi32_pd(_mm512_castsi512_si256((__m512i)x)),
          (F64)_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64((__m512i)x, 1))};
}
QSERVE_INLINE Doubles load_doubles(const int32_t* x) {
  return {(F64)_mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i*)x)),
          (F64)_mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i*)(x + 8)))};
}
QSERVE_INLINE Doubles fused(Doubles x, double factor, Doubles y) {
  const __m512d factors = _mm512_set1_pd(factor);
  return {(F64)_mm512_fmadd_pd((__m512d)x.low, factors, (__m512d)y.low),
          (F64)_mm512_fmadd_pd((__m512d)x.high, factors, (__m512d)y.high)};
}
QSERVE_INLINE F32 to_float(Doubles x) {
  const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)x.low)));
  return (F32)_mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(_mm512_cvtpd_ps((__m512d)x.high)), 1));
}

#else

QSERVE_INLINE Doubles to_doubles(I32 x) {
  I32x8 halves[2];
  memcpy(halves, &x, sizeof x);
  return {__builtin_convertvector(halves[0], F64), __builtin_convertvector(halves[1], F64)};
}
QSERVE_INLINE F32 to_float(Doubles x) {
  const F32x8 halves[2] = {__builtin_convertvector(x.low, F32x8), __builtin_convertvector(x.high, F32x8)};
  return load<F32>(halves);
}

#endif

// Where inputs are exact, codes count from 7. So a sum of 32 products fits in 16 bits: codes are -7 to 8 and inputs -128
// to 127, and 32 * 8 * 127 and 32 * -8 * 128 just do. What a weight of code 7 is stands beside the multiples, or is a
// multiple itself where it differs from zero by whole codes.
constexpr int kMiddleCode = 7;

inline bool has_short_sums(const Weight& w) { return w.units != nullptr && w.planes == 2 && w.padded_group == 32; }

inline bool counts_from_middle(const Weight& w) {
  return has_short_sums(w) || (w.units != nullptr && w.planes == 2 && w.offsets != nullptr);
}

QSERVE_INLINE Doubles operator*(Doubles x, double factor) { return {x.low * factor, x.high * factor}; }
QSERVE_INLINE Doubles operator+(Doubles x, Doubles y) { return {x.low + y.low, x.high + y.high}; }
QSERVE_INLINE Doubles operator-(Doubles x, Doubles y) { return {x.low - y.low, x.high - y.high}; }

// From the exact sum over all groups to the result of 16 channels: exact too, up to one rounding to float32 and that of
// the input's scale. `fix` is what a channel gives for an input whose code is 1 everywhere.
QSERVE_INLINE I32 load_fix(const Weight& w, int tile) {
  return w.fix == nullptr ? I32{} : load<I32>((const int32_t*)w.fix + tile * kLanes);
}

class AlignedFinish {
 public:
  AlignedFinish() = default;
  AlignedFinish(const Weight& w, int tile) : unit_(load<F32>(w.units + tile * kLanes)), fix_(to_doubles(load_fix(w, tile))) {}

  QSERVE_INLINE F32 operator()(Doubles total, float scale) const { return splat(scale) * (unit_ * to_float(total)); }
  QSERVE_INLINE F32 operator()(Doubles total, float scale, int32_t zero) const {
    return (*this)(total - fix_ * (double)zero, scale);
  }

 private:
  F32 unit_;
  Doubles fix_;
};

// The same of a narrow weight, whose sums are whole numbers of 32 bits, modulo 2^32.
class NarrowFinish {
 public:
  NarrowFinish() = default;
  NarrowFinish(const Weight& w, int tile)
      : unit_(load<F32>(w.units + tile * kLanes)), minus_fix_(split_factor(-load_fix(w, tile))) {}

  QSERVE_INLINE F32 operator()(U32 total, float scale, int32_t zero) const {
    return splat(scale) * (unit_ * to_float((I32)add_split_product(total, minus_fix_, zero)));
  }

 private:
  F32 unit_;
  I32 minus_fix_;  // below 2^23: 128 times it, and what a channel's weights add up to, is below 2^31
};

}  // namespace qserve
