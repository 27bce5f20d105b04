// Where a position's keys and values stand in their block. There are three layouts; only rotary.cpp and attention*.cpp
// know them. The shapes that Python sees, (blocks, kv_heads, block_size, head_dim), tell no more than the size.
//
//   lanes   keys   (blocks, kv_heads, head_dim, block_size)       any type
//           values (blocks, kv_heads, block_size, head_dim)
//           sixteen positions of one dimension of the keys are a vector, as are sixteen dimensions of a value
//
//   pairs   keys   (blocks, kv_heads, head_dim / 2, block_size, 2)   bfloat16
//           values (blocks, kv_heads, block_size / 2, head_dim, 2)
//           what AMX multiplies in pairs stands in pairs, so that a tile loads as it is: 16 pairs of dimensions by
//           16 positions, or 8 pairs of positions by 16 dimensions, each row 64 bytes
//
//   fours   the same with fours, of codes: what AMX, or a dot product of bytes, multiplies together
//
// Codes have a scale for each position: (blocks, kv_heads, block_size) for keys, and for values. A head's values stand
// right behind its keys.
#pragma once
#include "lanes.h"
#include "stage.h"
#include "tiles.h"

namespace qserve {

constexpr int kStep = kLanes;  // positions computed at once; they stand in one block wherever its size allows

struct CacheLayout {
  int64_t together;  // dimensions of a key, and positions of values, that stand together: 1, 2 or 4
  bool is_tiles;     // for AMX
  int64_t block_size;
  int64_t head_bytes;  // from one head to the next
  int64_t element;     // bytes
  int64_t head_dim;
  int num_kv_heads;

  CacheLayout(const Attention& attention, const Cache& cache)
      : together(count_together(attention, cache)),
        is_tiles(can_be_tiles(attention, together)),
        block_size(cache.block_size),
        head_bytes(cache.head_bytes),
        element(cache.type == kCodes ? 1 : kFloatBytes[cache.type]),
        head_dim(attention.head_dim),
        num_kv_heads(attention.num_kv_heads) {}

  // Both are decided by what never changes while a cache lives.
  static int64_t count_together(const Attention& attention, const Cache& cache) {
    if (cache.block_size % kStep != 0) return 1;
    if (cache.type == kCodes && attention.head_dim % 4 == 0) return 4;
#if defined(__AMX_BF16__)
    if (cache.type == kBF16 && attention.head_dim % 32 == 0 && allow_tiles()) return 2;
#endif
    return 1;
  }

  static bool can_be_tiles(const Attention& attention, int64_t together) {
#if defined(__AMX_INT8__)
    // Tiles are 64 dimensions deep, and what they read past the keys must be the head's own values.
    const int64_t depth = (attention.head_dim + 63) / 64 * 64;
    return together == 2 || (together == 4 && depth <= 2 * attention.head_dim && allow_tiles());
#else
    return (void)attention, (void)together, false;
#endif
  }

  bool has_whole_steps() const { return block_size % kStep == 0; }
  // Bytes to a block's beginning, for one head.
  int64_t head_start(int64_t block, int64_t kv_head) const { return (block * num_kv_heads + kv_head) * head_bytes; }
  // Elements from there to a dimension of a position's key or value.
  int64_t key_offset(int64_t at, int64_t d = 0) const {
    return d / together * key_stride() + at * together + d % together;
  }
  int64_t value_offset(int64_t at, int64_t d = 0) const {
    return at / together * together * head_dim + d * together + at % together;
  }
  // From the keys of some dimensions that stand together to those of the next.
  int64_t key_stride() const { return together * block_size; }
  int64_t key_rows() const { return head_dim / together; }
};

}  // namespace qserve
