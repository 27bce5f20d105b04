// Queries and keys of each row: normalized, turned by their position, and written with the values into the cache.
//
// Keys stand in a block so that sixteen positions are one vector: (kv_heads, head_dim, block_size). Only rotary.cpp
// and attention.cpp know that; values stand as the cache's shape says, (kv_heads, block_size, head_dim).
#include "attention.h"
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

template <class Element>
Element stored_as(float x);
template <>
float stored_as(float x) {
  return x;
}
template <>
uint16_t stored_as(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <class Element>
void store_row(const float* keys, const float* values, const Attention& attention, const Cache& cache, int64_t slot) {
  const int64_t size = cache.block_size, head_dim = attention.head_dim;
  const int64_t block = slot / size, at = slot % size;
  for (int head = 0; head < attention.num_kv_heads; ++head) {
    const int64_t start = (block * attention.num_kv_heads + head) * size * head_dim;
    Element* key = (Element*)cache.keys + start + at;
    Element* value = (Element*)cache.values + start + at * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) {
      key[i * size] = stored_as<Element>(keys[head * head_dim + i]);
      value[i] = stored_as<Element>(values[head * head_dim + i]);
    }
  }
}

void rotate_row(const Stage& stage, int64_t row) {
  const Attention& a = *stage.attention;
  float* queries = stage.output + row * a.row_size();
  float* keys = queries + (int64_t)a.num_heads * a.head_dim;
  normalize_heads(queries, a.num_heads, a.head_dim, a.query_norm);
  normalize_heads(keys, a.num_kv_heads, a.head_dim, a.key_norm);
  const int64_t at = stage.step->positions[row] * a.half;
  if (a.cos != nullptr)
    for (int head = 0; head < a.num_heads + a.num_kv_heads; ++head)
      turn(queries + (int64_t)head * a.head_dim, a.cos + at, a.sin + at, a.half);
  const float* values = keys + (int64_t)a.num_kv_heads * a.head_dim;
  const auto store = stage.cache->type == kF32 ? store_row<float> : store_row<uint16_t>;
  store(keys, values, a, *stage.cache, stage.step->slots[row]);
}

}  // namespace

void run_rotate(const Stage& stage, Team& team) {
  const int64_t rows_per_task = 4;
  team.run((stage.rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    for (int64_t row = task * rows_per_task; row < stage.rows && row < (task + 1) * rows_per_task; ++row)
      rotate_row(stage, row);
  });
}

}  // namespace qserve
