// Attention by AMX over a bfloat16 cache, for any number of rows. A query, and later a weight, is the sum of two bfloat16
// numbers, multiplied one after the other into the same float32 sums; the cache's own numbers are taken as they stand.
// A tile has sixteen queries: the heads that share a kv head, of one row or of neighbours; no row of a tile changes
// another's bits.
#include "attention_work.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_BF16__)

namespace {

constexpr int kDepth = 32;    // dimensions of a tile of keys
constexpr int kColumns = 16;  // dimensions of a tile of values

// Tiles 0 to 3 are sums, one row a query. To score, 2 and 3 are the upper and lower half of 32 dimensions of the
// queries, 4 is the keys of 16 positions. To mix, 6 and 7 are the halves of 16 positions' weights, 5 is their values.
class AttentionTiles {
 public:
  explicit AttentionTiles(int64_t queries) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, kStep * 2, kStep * 2};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.rows[tile] = (uint8_t)queries;
    config.rows[4] = kDepth / 2;
    config.rows[5] = kStep / 2;
    asm volatile("" : : "r"(&config) : "memory");  // written before it is read
    _tile_loadconfig(&config);
  }
  ~AttentionTiles() { _tile_release(); }
  AttentionTiles(const AttentionTiles&) = delete;
  AttentionTiles& operator=(const AttentionTiles&) = delete;
};

// GCC's intrinsics say too little of the memory they read: everything must be written before them.
QSERVE_INLINE void finish_stores() { asm volatile("" : : : "memory"); }

// The upper halves of twice sixteen words.
QSERVE_INLINE __m512i join_upper(U32 first, U32 second) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16((__m512i)first, _mm512_load_si512(kOdd), (__m512i)second);
}

// The two bfloat16 numbers that stand for each of 32: the nearest (a tie away from zero), and what it leaves.
QSERVE_INLINE void split(F32 first, F32 second, uint16_t* upper, uint16_t* lower) {
  const U32 near_first = ((U32)first + 0x8000u) & 0xffff0000u, near_second = ((U32)second + 0x8000u) & 0xffff0000u;
  store(upper, join_upper(near_first, near_second));
  store(lower, _mm512_cvtne2ps_pbh((__m512)(second - (F32)near_second), (__m512)(first - (F32)near_first)));
}

class TileKernel {
 public:
  TileKernel(const Layout& layout, const Task& task, Scratch& scratch)
      : layout_(layout),
        task_(task),
        count_(layout.count_queries(task)),
        head_dim_(layout.attention.head_dim),
        scale_(layout.attention),
        tiles_(count_ < kQueries ? count_ : kQueries) {
    const int64_t padded = (count_ + kQueries - 1) / kQueries * kQueries;
    upper_ = scratch.take<uint16_t>(padded * head_dim_);
    lower_ = scratch.take<uint16_t>(padded * head_dim_);
    clean_ = scratch.take<char>(kStep * head_dim_ * 2);
  }

  void start(int kv_head) {
    for (int64_t i = 0; i < count_; ++i) {
      const float* query = layout_.query(task_, kv_head, i);
      const F32 factor = splat(scale_.factor);
      for (int64_t d = 0; d < head_dim_; d += kDepth)
        split(load<F32>(query + d) * factor, load<F32>(query + d + kLanes) * factor, upper_ + i * head_dim_ + d,
              lower_ + i * head_dim_ + d);
    }
  }

  // A weight of zero times whatever stands past the last position is not always zero.
  void prepare(Piece& piece) {
    const int64_t last = piece.steps - 1, seen = piece.end - piece.begin - last * kStep;
    if (seen == kStep) return;
    for (int64_t pair = 0; pair < kStep / 2; ++pair) {
      const uint32_t mask = seen > 2 * pair + 1 ? 0xffffffffu : seen > 2 * pair ? 0xffffu : 0;
      for (int64_t at = pair * head_dim_ * 4; at < (pair + 1) * head_dim_ * 4; at += 64)
        store(clean_ + at, load<U32>(piece.values[last] + at) & mask);
    }
    piece.values[last] = clean_;
  }

  void attend(const Piece& piece, int64_t first, int64_t count, const Piece& next, const States& states) {
    score(piece, first);
    for (int64_t i = 0; i < count; i += kTogether)
      with_count(count - i, [&](auto some) { weigh_some<decltype(some)::value>(piece, first, i, states); });
    int64_t column = 0;
    for (; column + 4 * kColumns <= head_dim_; column += 4 * kColumns) mix<4>(piece, column, next, states.values);
    if (column < head_dim_) mix<2>(piece, column, next, states.values);
  }

 private:
  void score(const Piece& piece, int64_t first) {
    const int64_t stride = layout_.blocks.key_stride() * 2;
    finish_stores();
    for (int s = 0; s < piece.steps; ++s) {
      if (first == 0) fetch_values(layout_.blocks, piece, s);
      _tile_zero(0);
      for (int64_t d = 0; d < head_dim_; d += kDepth) {
        _tile_loadd(4, piece.keys[s] + d / 2 * stride, stride);
        _tile_loadd(2, upper_ + first * head_dim_ + d, head_dim_ * 2);
        _tile_loadd(3, lower_ + first * head_dim_ + d, head_dim_ * 2);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(0, 3, 4);
      }
      _tile_stored(0, scores_ + s * kStep, kPart * 4);
    }
  }

  template <int Count>
  void weigh_some(const Piece& piece, int64_t first, int64_t index, const States& states) {
    Span spans[Count];
    for (int q = 0; q < Count; ++q) spans[q] = Span(layout_, task_, piece, first + index + q);
    uint16_t *upper = upper_weights_ + index * kPart, *lower = lower_weights_ + index * kPart;
    weigh<Count>(scale_, spans, scores_ + index * kPart, piece.steps, states_from(states, index, 0),
                 [&](int q, int s, F32 some, F32 more) {
                   split(some, more, upper + q * kPart + s * kStep, lower + q * kPart + s * kStep);
                 });
  }

  // The weighted sums of Count tiles of columns.
  template <int Count>
  void mix(const Piece& piece, int64_t column, const Piece& next, float* values) {
    const int64_t stride = head_dim_ * 4;
    finish_stores();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < piece.steps; ++s) {
      if (column == 0) fetch_keys(layout_.blocks, next, s);
      const char* from = piece.values[s] + column * 4;
      _tile_loadd(6, upper_weights_ + s * kStep, kPart * 2);
      _tile_loadd(7, lower_weights_ + s * kStep, kPart * 2);
      _tile_loadd(5, from, stride);
      _tile_dpbf16ps(0, 6, 5);
      _tile_dpbf16ps(0, 7, 5);
      _tile_loadd(5, from + 64, stride);
      _tile_dpbf16ps(1, 6, 5);
      _tile_dpbf16ps(1, 7, 5);
      if (Count < 4) continue;
      _tile_loadd(5, from + 128, stride);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(2, 7, 5);
      _tile_loadd(5, from + 192, stride);
      _tile_dpbf16ps(3, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    }
    for (int s = piece.steps; s < next.steps && column == 0; ++s) fetch_keys(layout_.blocks, next, s);
    _tile_stored(0, values + column, stride);
    _tile_stored(1, values + column + kColumns, stride);
    if (Count < 4) return;
    _tile_stored(2, values + column + 2 * kColumns, stride);
    _tile_stored(3, values + column + 3 * kColumns, stride);
  }

  const Layout& layout_;
  const Task& task_;
  int64_t count_, head_dim_;
  Scale scale_;
  AttentionTiles tiles_;
  uint16_t *upper_, *lower_;  // queries, (count, head_dim)
  char* clean_;               // the values of a last step, without what no row may see
  alignas(64) float scores_[kQueries * kPart];
  alignas(64) uint16_t upper_weights_[kQueries * kPart], lower_weights_[kQueries * kPart];
};

}  // namespace

void attend_tiles(const Layout& layout, const Task& task, const States& partials) {
  attend_task<TileKernel>(layout, task, partials);
}

#else

void attend_tiles(const Layout&, const Task&, const States&) {}

#endif

}  // namespace qserve
