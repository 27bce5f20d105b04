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
  static constexpr bool kIsForManyHeads = true;

  TileKernel(const Layout& layout, const Task& task, Scratch& scratch)
      : layout_(layout),
        task_(task),
        count_(layout.count_queries(task)),
        head_dim_(layout.attention.head_dim),
        scale_(layout.attention),
        tiles_(std::min<int64_t>(count_, kQueries)) {
    const int64_t padded = (count_ + kQueries - 1) / kQueries * kQueries;
    upper_ = scratch.take<uint16_t>(padded * head_dim_);
    lower_ = scratch.take<uint16_t>(padded * head_dim_);
    clean_ = scratch.take<char>(kQueries * kStep * head_dim_ * 2);
  }

  void start(Heads heads) {
    for (int h = 0; h < heads.count(); ++h)
      for (int i = 0; i < count_; ++i) split_query(layout_.query(task_, heads.begin + h, i), (h * count_ + i) * head_dim_);
  }

  void attend(HeadPieces& pieces, int64_t first, int64_t count, Fetcher* fetcher, const States& states) {
    for (int h = 0; h < pieces.count; ++h) score(pieces.of[h], first + h * count_, h * count_, fetcher);
    for (int64_t i = 0; i < count; i += kTogether)
      with_count(count - i, [&](auto some) {
        weigh_some<decltype(some)::value>(pieces.of[0], first + i, i, fetcher, states_from(states, i, 0));
      });
    if (fetcher != nullptr) clean_last(pieces);
    for (int h = 0; h < pieces.count; ++h)
      mix(pieces.of[h], h * count_, fetcher, states.values + h * count_ * head_dim_);
  }

 private:
  void split_query(const float* query, int64_t to) {
    const F32 factor = splat(scale_.factor);
    for (int64_t d = 0; d < head_dim_; d += kDepth)
      split(load<F32>(query + d) * factor, load<F32>(query + d + kLanes) * factor, upper_ + to + d, lower_ + to + d);
  }

  // A weight of zero times whatever stands past the last position is not always zero.
  void clean_last(HeadPieces& pieces) const {
    const Piece& one = pieces.of[0];
    const int64_t last = one.steps - 1, seen = one.end - one.begin - last * kStep, bytes = kStep * head_dim_ * 2;
    if (seen == kStep) return;
    for (int h = 0; h < pieces.count; ++h) {
      clean_values(pieces.of[h].values[last], seen, clean_ + h * bytes);
      pieces.of[h].values[last] = clean_ + h * bytes;
    }
  }

  void clean_values(const char* values, int64_t seen, char* to) const {
    for (int64_t pair = 0; pair < kStep / 2; ++pair) {
      const uint32_t mask = seen > 2 * pair + 1 ? 0xffffffffu : seen > 2 * pair ? 0xffffu : 0;
      for (int64_t at = pair * head_dim_ * 4; at < (pair + 1) * head_dim_ * 4; at += 64)
        store(to + at, load<U32>(values + at) & mask);
    }
  }

  void score(const Piece& piece, int64_t query, int64_t row, Fetcher* fetcher) {
    const int64_t stride = layout_.blocks.key_stride() * 2;
    const uint16_t *upper = upper_ + query * head_dim_, *lower = lower_ + query * head_dim_;
    finish_stores();
    for (int s = 0; s < piece.steps; ++s) {
      if (fetcher != nullptr) fetcher->step();
      _tile_zero(0);
      for (int64_t d = 0; d < head_dim_; d += kDepth) {
        _tile_loadd(4, piece.keys[s] + d / 2 * stride, stride);
        _tile_loadd(2, upper + d, head_dim_ * 2);
        _tile_loadd(3, lower + d, head_dim_ * 2);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(0, 3, 4);
      }
      _tile_stored(0, scores_ + row * kPart + s * kStep, kPart * 4);
    }
  }

  template <int Count>
  void weigh_some(const Piece& piece, int64_t query, int64_t row, Fetcher* fetcher, const States& states) {
    Span spans[Count];
    for (int q = 0; q < Count; ++q) spans[q] = Span(layout_, task_, piece, (int)(query + q) % (int)count_);
    uint16_t *upper = upper_weights_ + row * kPart, *lower = lower_weights_ + row * kPart;
    weigh<Count>(scale_, spans, scores_ + row * kPart, piece.steps, states, [&](int q, int s, F32 some, F32 more) {
      if (fetcher != nullptr) fetcher->idle();
      split(some, more, upper + q * kPart + s * kStep, lower + q * kPart + s * kStep);
    });
  }

  void mix(const Piece& piece, int64_t row, Fetcher* fetcher, float* values) {
    finish_stores();
    int64_t column = 0;
    for (; column + 4 * kColumns <= head_dim_; column += 4 * kColumns)
      mix_some<4>(piece, row, column, column == 0 ? fetcher : nullptr, values + column);
    if (column < head_dim_) mix_some<2>(piece, row, column, column == 0 ? fetcher : nullptr, values + column);
  }

  // The weighted sums of Count tiles of columns.
  template <int Count>
  void mix_some(const Piece& piece, int64_t row, int64_t column, Fetcher* fetcher, float* values) {
    const uint16_t *upper = upper_weights_ + row * kPart, *lower = lower_weights_ + row * kPart;
    const int64_t stride = head_dim_ * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < piece.steps; ++s) {
      if (fetcher != nullptr) fetcher->step();
      const char* from = piece.values[s] + column * 4;
      _tile_loadd(6, upper + s * kStep, kPart * 2);
      _tile_loadd(7, lower + s * kStep, kPart * 2);
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
    _tile_stored(0, values, stride);
    _tile_stored(1, values + kColumns, stride);
    if (Count < 4) return;
    _tile_stored(2, values + 2 * kColumns, stride);
    _tile_stored(3, values + 3 * kColumns, stride);
  }

  const Layout& layout_;
  const Task& task_;
  int64_t count_, head_dim_;
  Scale scale_;
  AttentionTiles tiles_;
  uint16_t *upper_, *lower_;  // queries, (count, head_dim)
  char* clean_;               // the values of last steps, without what no row may see
  alignas(64) float scores_[kQueries * kPart];
  alignas(64) uint16_t upper_weights_[kQueries * kPart], lower_weights_[kQueries * kPart];
};

}  // namespace

void attend_tiles(const Layout& layout, const Task* begin, const Task* end, const States& partials) {
  Walk<TileKernel>(layout, end, partials).go(begin);
}

#else

void attend_tiles(const Layout&, const Task*, const Task*, const States&) {}

#endif

}  // namespace qserve
