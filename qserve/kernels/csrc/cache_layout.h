// Where a position's keys and values stand in their block. There are two layouts; only rotary.cpp and attention*.cpp
// know them. The shapes that Python sees, (blocks, kv_heads, block_size, head_dim), tell no more than the size.
//
//   lanes   keys   (blocks, kv_heads, head_dim, block_size)       float32 or bfloat16
//           values (blocks, kv_heads, block_size, head_dim)
//           sixteen positions of one dimension of the keys are a vector, as are sixteen dimensions of a value
//
//   tiles   keys   (blocks, kv_heads, head_dim / 2, block_size, 2)   bfloat16
//           values (blocks, kv_heads, block_size / 2, head_dim, 2)
//           what AMX multiplies in pairs stands in pairs, so that a tile loads as it is: 16 pairs of dimensions by
//           16 positions, or 8 pairs of positions by 16 dimensions, each row 64 bytes
#pragma once
#include "lanes.h"
#include "stage.h"
#include "tiles.h"

namespace qserve {

constexpr int kStep = kLanes;  // positions computed at once; they stand in one block wherever its size allows

struct CacheLayout {
  bool is_tiles;
  int64_t block_size;
  int64_t head_size;  // elements of a block for one head
  int64_t element;    // bytes
  int64_t head_dim;
  int num_kv_heads;

  CacheLayout(const Attention& attention, const Cache& cache)
      : is_tiles(has_tile_layout(attention, cache)),
        block_size(cache.block_size),
        head_size((int64_t)cache.block_size * attention.head_dim),
        element(kFloatBytes[cache.type]),
        head_dim(attention.head_dim),
        num_kv_heads(attention.num_kv_heads) {}

  // Decided by what never changes while a cache lives.
  static bool has_tile_layout(const Attention& attention, const Cache& cache) {
#if defined(__AMX_BF16__)
    return cache.type == kBF16 && attention.head_dim % 32 == 0 && cache.block_size % kStep == 0 && allow_tiles();
#else
    return (void)attention, (void)cache, false;
#endif
  }

  bool has_whole_steps() const { return block_size % kStep == 0; }
  // Of the first element of a block, for one head.
  int64_t head_start(int64_t block, int64_t kv_head) const { return (block * num_kv_heads + kv_head) * head_size; }
  // Of a position's first key or value, from there. With tiles an odd position's values are one element further.
  int64_t key_offset(int64_t at) const { return is_tiles ? 2 * at : at; }
  int64_t value_offset(int64_t at) const { return is_tiles ? at / 2 * 2 * head_dim : at * head_dim; }
  // From the keys of one dimension, or pair of dimensions, to the next.
  int64_t key_stride() const { return is_tiles ? 2 * block_size : block_size; }
  int64_t key_rows() const { return is_tiles ? head_dim / 2 : head_dim; }
};

}  // namespace qserve
