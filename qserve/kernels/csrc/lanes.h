// Sixteen lanes of float or int32, on whatever vectors the target has: GCC and Clang split a 64-byte vector into what
// exists. What the language cannot say (dot products of bytes, fused multiply-add, rounding) has one version per target.
// Multiplications and additions are never contracted: where a fused one is meant, `fused` says so.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QSERVE_INLINE inline __attribute__((always_inline))

namespace qserve {

constexpr int kLanes = 16;
constexpr int kSecondLevel = 2;  // of the cache, as __builtin_prefetch counts

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));  // 16 lanes of 4 codes
typedef int8_t I8x16 __attribute__((vector_size(16)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

enum FloatType : int32_t { kBF16 = 0, kF16 = 1, kF32 = 2, kE4M3 = 3, kE5M2 = 4 };
constexpr int kFloatBytes[] = {2, 2, 4, 1, 1};

template <class V>
QSERVE_INLINE V load(const void* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
QSERVE_INLINE void store(void* to, V value) {
  memcpy(to, &value, sizeof value);
}

// A whole line of the cache, past the caches. Whoever stores so must do something atomic that locks before others read it,
// as Team does at a loop's end.
QSERVE_INLINE void store_past(float* to, F32 value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#else
  store(to, value);
#endif
}

QSERVE_INLINE F32 splat(float x) { return F32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
QSERVE_INLINE I32 splat(int32_t x) { return I32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
QSERVE_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
QSERVE_INLINE F32 bits_to_float(U32 x) { return (F32)x; }
QSERVE_INLINE F32 magnitude(F32 x) { return (F32)((U32)x & 0x7fffffffu); }

// The first `count` lanes; the others are zero.
QSERVE_INLINE F32 load_some(const float* from, int count) {
  F32 value = {};
  if (count >= kLanes) return load<F32>(from);
  if (count > 0) memcpy(&value, from, count * sizeof(float));
  return value;
}

QSERVE_INLINE void store_some(float* to, F32 value, int count) {
  if (count >= kLanes) return store(to, value);
  if (count > 0) memcpy(to, &value, count * sizeof(float));
}

// body(index, one of four, lanes left) for every 16 of `count` numbers: where each waits for the last that was alike, four
// can be under way, and whole ones ask nothing.
template <class Body>
QSERVE_INLINE void by_fours(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) body(i + j * kLanes, j, kLanes);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    if (i + j * kLanes < count) body(i + j * kLanes, j, (int)(count - i) - j * kLanes);
}

// Sums and maxima over lanes, in one fixed tree: halves, quarters, and so on. GCC's and Clang's own for AVX-512 is it.
#if defined(__AVX512F__)

QSERVE_INLINE float sum_lanes(F32 x) { return _mm512_reduce_add_ps((__m512)x); }
QSERVE_INLINE float max_lanes(F32 x) { return _mm512_reduce_max_ps((__m512)x); }
QSERVE_INLINE int32_t sum_lanes(I32 x) { return _mm512_reduce_add_epi32((__m512i)x); }

#else

QSERVE_INLINE int32_t sum_lanes(I32 x) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

QSERVE_INLINE float sum_lanes(F32 x) {
  float lane[kLanes];
  store(lane, x);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

QSERVE_INLINE float max_lanes(F32 x) {
  float lane[kLanes];
  store(lane, x);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

#endif

// Sizes are compared as whole numbers, for which a NaN is larger than any: it is never passed over.
QSERVE_INLINE F32 larger_size(F32 sizes, F32 x) {
  const I32 a = (I32)sizes, b = (I32)magnitude(x);
  return (F32)(a > b ? a : b);
}

QSERVE_INLINE float max_size(F32 sizes) {
#if defined(__AVX512F__)
  const int32_t most = _mm512_reduce_max_epi32((__m512i)sizes);
#else
  int32_t lane[kLanes], most = 0;
  store(lane, sizes);
  for (int32_t size : lane) most = size > most ? size : most;
#endif
  float size;
  memcpy(&size, &most, sizeof size);
  return size;
}

// The larger and the smaller one, b where either is a NaN; from `a > b ? a : b` GCC makes two instructions.
#if defined(__AVX512F__)

QSERVE_INLINE F32 largest(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }
QSERVE_INLINE F32 smallest(F32 a, F32 b) { return (F32)_mm512_min_ps((__m512)a, (__m512)b); }

#else

QSERVE_INLINE F32 largest(F32 a, F32 b) { return a > b ? a : b; }
QSERVE_INLINE F32 smallest(F32 a, F32 b) { return a < b ? a : b; }

#endif

#if defined(__AVX512F__)

QSERVE_INLINE F32 fused(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
QSERVE_INLINE I32 round_to_int(F32 x) { return (I32)_mm512_cvtps_epi32((__m512)x); }

#elif defined(__AVX2__)

struct Halves {
  __m256i low, high;
};
template <class V>
QSERVE_INLINE Halves split(V x) {
  Halves halves;
  memcpy(&halves, &x, 64);
  return halves;
}
template <class V>
QSERVE_INLINE V join(__m256i low, __m256i high) {
  Halves halves{low, high};
  V value;
  memcpy(&value, &halves, 64);
  return value;
}
QSERVE_INLINE F32 fused(F32 a, F32 b, F32 c) {
  const Halves x = split(a), y = split(b), z = split(c);
  return join<F32>((__m256i)_mm256_fmadd_ps((__m256)x.low, (__m256)y.low, (__m256)z.low),
                   (__m256i)_mm256_fmadd_ps((__m256)x.high, (__m256)y.high, (__m256)z.high));
}
QSERVE_INLINE I32 round_to_int(F32 x) {
  const Halves halves = split(x);
  return join<I32>(_mm256_cvtps_epi32((__m256)halves.low), _mm256_cvtps_epi32((__m256)halves.high));
}

#else

QSERVE_INLINE F32 fused(F32 a, F32 b, F32 c) { return a * b + c; }
QSERVE_INLINE I32 round_to_int(F32 x) {
  I32 result;
  for (int i = 0; i < kLanes; ++i) result[i] = (int32_t)__builtin_rintf(x[i]);
  return result;
}

#endif

// GCC 12 widens vectors by halves; the processor can do it at once.
QSERVE_INLINE U32 widen(U16x16 x) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, U32);
#endif
}

QSERVE_INLINE U32 widen(U8x16 x) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, U32);
#endif
}

QSERVE_INLINE I32 widen(I8x16 x) {
#if defined(__AVX512F__)
  return (I32)_mm512_cvtepi8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, I32);
#endif
}

QSERVE_INLINE I32 load_int16(const void* from, int64_t index) {
#if defined(__AVX512F__)
  return (I32)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)((const int16_t*)from + index)));
#else
  return (I32)(widen(load<U16x16>((const uint16_t*)from + index)) << 16) >> 16;
#endif
}

// sums + x * y modulo 2^32, both factors of 16 bits; of y the upper bits are zero.
QSERVE_INLINE U32 add_product(U32 sums, I32 x, int32_t y) {
#if defined(__AVX512VNNI__)
  return (U32)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, _mm512_set1_epi32(y));
#else
  return sums + (U32)x * (uint32_t)(int16_t)y;
#endif
}

QSERVE_INLINE U32 add_product(U32 sums, I32 x, I32 y) {
#if defined(__AVX512VNNI__)
  return (U32)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, (__m512i)y);
#else
  return sums + (U32)x * (U32)(y << 16 >> 16);
#endif
}

// The same for an x of 24 bits and a y of 8. VNNI multiplies 16 bits by 16 and adds two such products: x is split for it.
#if defined(__AVX512VNNI__)

QSERVE_INLINE I32 split_factor(I32 x) { return (x >> 8) << 16 | (x & 255); }
QSERVE_INLINE U32 add_split_product(U32 sums, I32 x, int32_t y) {
  return (U32)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, _mm512_set1_epi32((y & 0xffff) | y << 24));
}

#else

QSERVE_INLINE I32 split_factor(I32 x) { return x; }
QSERVE_INLINE U32 add_split_product(U32 sums, I32 x, int32_t y) { return sums + (U32)x * (uint32_t)y; }

#endif

// x * 256. Beside AMX, shifts have one port of the processor with all multiplications; bytes are moved on another.
QSERVE_INLINE U32 shift_byte(U32 x) {
#if defined(__AVX512BW__)
  return (U32)_mm512_shuffle_epi8((__m512i)x, _mm512_set4_epi32(0x0e0d0c80, 0x0a090880, 0x06050480, 0x02010080));
#else
  return x << 8;
#endif
}

QSERVE_INLINE F32 round_lanes(F32 x) { return to_float(round_to_int(x)); }

// sums[lane] + codes[4 lane + j] * inputs[j] over j < 4: unsigned codes below 2^Bits, signed inputs; exact.
template <int Bits>
QSERVE_INLINE I32 dot(I32 sums, Bytes codes, const int8_t* inputs) {
  int32_t four;
  memcpy(&four, inputs, 4);
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
  const __m256i x = _mm256_set1_epi32(four);
  const Halves w = split(codes);
  __m256i low, high;
  if constexpr (Bits <= 4) {  // pairs fit in 16 bits
    const __m256i ones = _mm256_set1_epi16(1);
    low = _mm256_madd_epi16(_mm256_maddubs_epi16(w.low, x), ones);
    high = _mm256_madd_epi16(_mm256_maddubs_epi16(w.high, x), ones);
  } else {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
    const __m256i mask = _mm256_set1_epi16(0xff);
    const auto both = [&](__m256i half) {
      return _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(half, mask), even),
                              _mm256_madd_epi16(_mm256_srli_epi16(half, 8), odd));
    };
    low = both(w.low), high = both(w.high);
  }
  return sums + join<I32>(low, high);
#else
  const U32 lanes = (U32)codes;
  for (int j = 0; j < 4; ++j) sums += (I32)((lanes >> (8 * j)) & 0xffu) * splat((int32_t)inputs[j]);
  return sums;
#endif
}

// Sixteen values of a stored float type, widened exactly (infinities and NaNs of the 8- and 16-bit types aside).
template <int Type>
QSERVE_INLINE F32 load_float(const void* from, int64_t index) {
  if constexpr (Type == kF32) return load<F32>((const float*)from + index);
  if constexpr (Type == kBF16)
    return bits_to_float(widen(load<U16x16>((const uint16_t*)from + index)) << 16);
  if constexpr (Type == kF16) {
    const U32 bits = widen(load<U16x16>((const uint16_t*)from + index));
    return (F32)((U32)((F32)((bits & 0x7fffu) << 13) * splat(0x1p112f)) | ((bits & 0x8000u) << 16));
  }
  const U32 bits = widen(load<U8x16>((const uint8_t*)from + index));
  const F32 size = Type == kE4M3 ? (F32)((bits & 0x7fu) << 20) * splat(0x1p120f)
                                 : (F32)((bits & 0x7fu) << 21) * splat(0x1p112f);
  return (F32)((U32)size | ((bits & 0x80u) << 24));
}

QSERVE_INLINE F32 load_float(int32_t type, const void* from, int64_t index) {
  if (type == kBF16) return load_float<kBF16>(from, index);
  if (type == kF16) return load_float<kF16>(from, index);
  return load_float<kF32>(from, index);
}

// The nearest bfloat16, ties to even, in the upper half of each lane.
QSERVE_INLINE U32 round_to_bf16(F32 x) {
  const U32 bits = (U32)x;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

QSERVE_INLINE U16x16 upper_halves(U32 x) {
#if defined(__AVX512F__)
  return (U16x16)_mm512_cvtepi32_epi16((__m512i)(x >> 16));
#else
  return __builtin_convertvector(x >> 16, U16x16);
#endif
}

QSERVE_INLINE I8x16 narrow(I32 x) {
#if defined(__AVX512F__)
  return (I8x16)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, I8x16);
#endif
}

// Stores the lanes that are at least `least`, one after the other, and says how many; writes a whole vector.
QSERVE_INLINE int store_at_least(float* to, F32 x, float least) {
#if defined(__AVX512F__)
  const __mmask16 found = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_GE_OQ);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(found, (__m512)x));
  return __builtin_popcount(found);
#else
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    to[count] = x[lane];
    count += x[lane] >= least;
  }
  return count;
#endif
}

// The nearest that int8 can hold.
QSERVE_INLINE I8x16 narrow_to_limits(I32 x) {
#if defined(__AVX512F__)
  return (I8x16)_mm512_cvtsepi32_epi8((__m512i)x);
#else
  const I32 low = splat(-128), high = splat(127);
  x = x < low ? low : x;
  return narrow(x > high ? high : x);
#endif
}

#if defined(__AVX512BW__)
// The bytes of four vectors in order, where each pair was packed to 16 bits: packing takes quarters of two by turns.
QSERVE_INLINE __m512i pack_in_order(__m512i left, __m512i right) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(left, right));
}
#endif

// The nearest that int8 can hold, of four vectors one after the other.
QSERVE_INLINE void store_to_limits(int8_t* to, const I32 (&x)[4]) {
#if defined(__AVX512BW__)
  const __m512i left = _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]);
  store(to, pack_in_order(left, _mm512_packs_epi32((__m512i)x[2], (__m512i)x[3])));
#else
  for (int i = 0; i < 4; ++i) store(to + i * kLanes, narrow_to_limits(x[i]));
#endif
}

// e^x to about one unit in the last place; 0 below -87.
QSERVE_INLINE F32 exponential(F32 x) {
  const F32 clamped = smallest(largest(x, splat(-87.0f)), splat(88.0f));
  const I32 n = round_to_int(clamped * splat(1.44269504f));
  const F32 whole = to_float(n);
  const F32 r = fused(whole, splat(-1.42860677e-6f), fused(whole, splat(-0.693145752f), clamped));
  F32 p = splat(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fused(p, r, splat(c));
  const F32 y = (F32)((I32)p + (n << 23));
  return x < splat(-87.0f) ? F32{} : y;
}

constexpr float kLog2E = 1.44269504f;

// 2^x to about one unit in the last place, 0 far below; 2^0 is exactly 1. The polynomial, of least relative error on
// [-1/2, 1/2] and 1 at 0, was fitted by weighted least squares: within 1e-7.
QSERVE_INLINE F32 power_of_two(F32 x) {
  constexpr float kTerms[] = {9.67151e-3f, 5.550734e-2f, 2.4022242e-1f, 6.9314698e-1f, 1.0f};
  F32 p = splat(1.32647e-3f);
#if defined(__AVX512F__)
  const F32 whole = x + splat(0x1.8p23f) - splat(0x1.8p23f);  // where that loses x it is below -2^22, and 2^x is 0
  for (float c : kTerms) p = fused(p, x - whole, splat(c));
  return (F32)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  const F32 clamped = largest(x, splat(-127.0f));
  const I32 whole = round_to_int(clamped);
  for (float c : kTerms) p = fused(p, clamped - to_float(whole), splat(c));
  return x < splat(-126.0f) ? F32{} : (F32)((I32)p + (whole << 23));
#endif
}

// 1 / x to about one unit in the last place, where neither is subnormal.
QSERVE_INLINE F32 reciprocal(F32 x) {
#if defined(__AVX512F__)
  const F32 near = (F32)_mm512_rcp14_ps((__m512)x);
  return near * fused(-x, near, splat(2.0f));
#else
  return splat(1.0f) / x;
#endif
}

QSERVE_INLINE F32 tanh_lanes(F32 x) {
  const F32 e = exponential(magnitude(x) * splat(-2.0f));
  const F32 y = (splat(1.0f) - e) / (splat(1.0f) + e);
  return (F32)((U32)y | ((U32)x & 0x80000000u));
}

}  // namespace qserve
