// Queries and keys of each row: normalized, turned by their position, and written with the values into the cache.
#include <type_traits>

#include "attention.h"
#include "cache_layout.h"
#include "normalize.h"

namespace qserve {
namespace {

void normalize_heads(float* heads, int num_heads, int head_dim, const Norm* norm) {
  if (norm == nullptr) return;
  const int per_norm = norm->size == head_dim ? 1 : num_heads;
  for (int head = 0; head < num_heads; head += per_norm)
    normalize_row(heads + (int64_t)head * head_dim, *norm, heads + (int64_t)head * head_dim);
}

void turn(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i += kLanes) {
    const int rest = half - i;
    const F32 c = load_some(cos + i, rest), s = load_some(sin + i, rest);
    const F32 left = load_some(head + i, rest), right = load_some(head + half + i, rest);
    store_some(head + i, left * c - right * s, rest);
    store_some(head + half + i, right * c + left * s, rest);
  }
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

constexpr float kLeastSize = 1e-30f;  // of a head, so that no scale is zero

// Sixteen codes at a time, put(d, codes), and the scale that they are multiples of. `reference_attention.py` says the
// same, operation by operation.
template <class Put>
float quantize_head(const float* head, int64_t head_dim, const Put& put) {
  F32 sizes = splat(kLeastSize);
  for (int64_t d = 0; d < head_dim; d += kLanes) sizes = larger_size(sizes, load_some(head + d, (int)(head_dim - d)));
  const float scale = max_size(sizes) * (1.0f / 127);
  const F32 inverse = splat(1.0f / scale);
  for (int64_t d = 0; d < head_dim; d += kLanes)
    put(d, narrow(round_to_int(load_some(head + d, (int)(head_dim - d)) * inverse)));
  return scale;
}

// Four dimensions of a key are a word of their row.
void put_key_codes(const CacheLayout& blocks, int8_t* keys, int64_t at, int64_t d, I8x16 codes) {
  const int64_t count = blocks.head_dim - d < kLanes ? blocks.head_dim - d : kLanes;
  alignas(16) int8_t bytes[kLanes];
  store(bytes, codes);
  if (blocks.together == 4)
    for (int64_t i = 0; i < count; i += 4) memcpy(keys + blocks.key_offset(at, d + i), bytes + i, 4);
  else
    for (int64_t i = 0; i < count; ++i) keys[blocks.key_offset(at, d + i)] = bytes[i];
}

// A dimension of a value is a byte of a word, whose other three are the positions beside it.
void put_value_codes(const CacheLayout& blocks, int8_t* values, int64_t at, int64_t d, I8x16 codes) {
#if defined(__AVX512BW__)
  if (blocks.together == 4 && blocks.head_dim - d >= kLanes) {
    const int64_t byte = at % 4;
    const __m512i words = _mm512_slli_epi32((__m512i)widen(codes), (unsigned)(8 * byte));
    return _mm512_mask_storeu_epi8(values + blocks.value_offset(at - byte, d), 0x1111111111111111u << byte, words);
  }
#endif
  const int64_t count = blocks.head_dim - d < kLanes ? blocks.head_dim - d : kLanes;
  for (int64_t i = 0; i < count; ++i) values[blocks.value_offset(at, d + i)] = codes[i];
}

void store_codes(const CacheLayout& blocks, const Cache& cache, const float* key, const float* value, int64_t start,
                 int64_t at) {
  int8_t *keys = (int8_t*)cache.keys + start, *values = (int8_t*)cache.values + start;
  const auto scale_at = [&](float* scales) -> float& { return *((float*)((char*)scales + start) + at); };
  scale_at(cache.key_scales) = quantize_head(
      key, blocks.head_dim, [&](int64_t d, I8x16 codes) { put_key_codes(blocks, keys, at, d, codes); });
  scale_at(cache.value_scales) = quantize_head(
      value, blocks.head_dim, [&](int64_t d, I8x16 codes) { put_value_codes(blocks, values, at, d, codes); });
}

// One head's key and value, to where its position begins.
template <int Type>
void store_lanes(const CacheLayout& blocks, const float* key, const float* value, void* keys, void* values) {
  using Element = std::conditional_t<Type == kF32, float, uint16_t>;
  const auto stored = [](float x) -> Element {
    if constexpr (Type == kF32) return x;
    return to_bf16(x);
  };
  for (int64_t d = 0; d < blocks.head_dim; ++d) ((Element*)keys)[d * blocks.block_size] = stored(key[d]);
  for (int64_t d = 0; d < blocks.head_dim; ++d) ((Element*)values)[d] = stored(value[d]);
}

#if defined(__AMX_BF16__)

// Each two dimensions of a key are a word of four bytes in a row of their own; each dimension of a value is one half of
// a word, whose other half is the position beside it and perhaps another thread's.
void store_tiles(const CacheLayout& blocks, const float* key, const float* value, void* keys, void* values, bool is_odd) {
  constexpr I32 kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const I32 rows = kNumbers * splat((int32_t)(blocks.key_stride() * blocks.element));
  const int64_t step = kLanes * blocks.key_stride() * blocks.element;
  for (int64_t d = 0; d < blocks.head_dim; d += 2 * kLanes) {
    const __m512bh words = _mm512_cvtne2ps_pbh((__m512)load<F32>(key + d + kLanes), (__m512)load<F32>(key + d));
    _mm512_i32scatter_epi32((char*)keys + d / (2 * kLanes) * step, (__m512i)rows, (__m512i)words, 1);
  }
  for (int64_t d = 0; d < blocks.head_dim; d += kLanes) {
    const U32 halves = round_to_bf16(load<F32>(value + d));
    uint16_t* to = (uint16_t*)values + 2 * d;
    if (is_odd) _mm512_mask_storeu_epi16(to, 0xaaaaaaaau, (__m512i)halves);
    if (!is_odd) _mm512_mask_storeu_epi16(to, 0x55555555u, (__m512i)(halves >> 16));
  }
}

#endif

void store_row(const CacheLayout& blocks, const Cache& cache, const float* keys, const float* values, int64_t slot) {
  const int64_t block = slot / blocks.block_size, at = slot % blocks.block_size;
  for (int head = 0; head < blocks.num_kv_heads; ++head) {
    const int64_t start = blocks.head_start(block, head);
    const float *key = keys + head * blocks.head_dim, *value = values + head * blocks.head_dim;
    if (cache.type == kCodes) {
      store_codes(blocks, cache, key, value, start, at);
      continue;
    }
    void* to_key = (char*)cache.keys + start + blocks.key_offset(at) * blocks.element;
    const int64_t first_at = at / blocks.together * blocks.together;
    void* to_value = (char*)cache.values + start + blocks.value_offset(first_at) * blocks.element;
#if defined(__AMX_BF16__)
    if (blocks.together == 2) {
      store_tiles(blocks, key, value, to_key, to_value, at % 2 == 1);
      continue;
    }
#endif
    const auto store = cache.type == kF32 ? store_lanes<kF32> : store_lanes<kBF16>;
    store(blocks, key, value, to_key, to_value);
  }
}

void rotate_row(const Stage& stage, const CacheLayout& blocks, int64_t row) {
  const Attention& a = *stage.attention;
  float* queries = stage.output + row * stage.output_stride;
  float* keys = queries + (int64_t)a.num_heads * a.head_dim;
  normalize_heads(queries, a.num_heads, a.head_dim, a.query_norm);
  normalize_heads(keys, a.num_kv_heads, a.head_dim, a.key_norm);
  const int64_t at = stage.step->positions[row] * a.half;
  if (a.cos != nullptr)
    for (int head = 0; head < a.num_heads + a.num_kv_heads; ++head)
      turn(queries + (int64_t)head * a.head_dim, a.cos + at, a.sin + at, a.half);
  const float* values = keys + (int64_t)a.num_kv_heads * a.head_dim;
  store_row(blocks, *stage.cache, keys, values, stage.step->slots[row]);
}

// Where a task begins: a step's positions share lines of the cache, which no two threads should write at once.
int64_t first_row(const Stage& stage, int64_t row) {
  if (row >= stage.rows) return stage.rows;
  const int64_t* slots = stage.step->slots;
  const int64_t most = row + kStep < stage.rows ? row + kStep : stage.rows;
  while (row > 0 && row < most && slots[row] == slots[row - 1] + 1 && slots[row] % kStep != 0) ++row;
  return row;
}

}  // namespace

void run_rotate(const Stage& stage, Team& team) {
  const CacheLayout blocks(*stage.attention, *stage.cache);
  const int64_t share = count_share(stage.rows, team);
  const Pieces pieces = {stage.rows, share < kStep ? share : kStep};
  team.run(pieces.count(), [&](int64_t piece) {
    const int64_t end = first_row(stage, pieces.end(piece));
    for (int64_t row = first_row(stage, pieces.begin(piece)); row < end; ++row) rotate_row(stage, blocks, row);
  });
}

}  // namespace qserve
