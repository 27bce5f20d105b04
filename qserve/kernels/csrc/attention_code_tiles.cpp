// Attention over int8 codes by AMX, for any number of rows. Up to eight queries, the heads that share a kv head, are
// one tile, upper and lower bytes together; more are two.
#include <utility>

#include "attention_codes.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

constexpr int kDepth = 64;  // dimensions of a tile of keys, positions of a tile of values

// Tiles 0 to 3 are sums, 4 and 5 queries or weights, 6 and 7 codes.
class CodeTiles {
 public:
  explicit CodeTiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.rows[tile] = (uint8_t)(tile < 6 ? rows : kDepth / 4);
    asm volatile("" : : "r"(&config) : "memory");  // written before it is read
    _tile_loadconfig(&config);
  }
  ~CodeTiles() { _tile_release(); }
  CodeTiles(const CodeTiles&) = delete;
  CodeTiles& operator=(const CodeTiles&) = delete;
};

constexpr int64_t kTile = 16 * kLanes;  // sums

struct Rows {
  const int8_t* bytes;
  int64_t stride, depth;
};

// Rows of bytes, as many as Tiles have, times tiles of codes side by side: at(column, depth / 64). One tile of sums
// after another: of each column all, or first those of the upper rows.
template <int Tiles, int... Columns, class Address>
QSERVE_INLINE void multiply(std::integer_sequence<int, Columns...>, const Rows& rows, const Address& at,
                            int64_t code_stride, int32_t* sums) {
  (tile_zero<Columns * Tiles>(), ...);
  if constexpr (Tiles == 2) (tile_zero<Columns * 2 + 1>(), ...);
  for (int64_t d = 0; d < rows.depth; d += kDepth) {
    tile_load<4>(rows.bytes + d, rows.stride);
    if constexpr (Tiles == 2) tile_load<5>(rows.bytes + kQueries * rows.stride + d, rows.stride);
    const auto add = [&](auto column) {
      constexpr int kColumn = decltype(column)::value, kCodes = 6 + kColumn % 2;
      tile_load<kCodes>(at(kColumn, d / kDepth), code_stride);
      tile_dot<false, kColumn * Tiles, 4, kCodes>();
      if constexpr (Tiles == 2) tile_dot<false, kColumn * Tiles + 1, 5, kCodes>();
    };
    (add(std::integral_constant<int, Columns>()), ...);
  }
  (tile_store<Columns * Tiles>(sums + Columns * Tiles * kTile), ...);
  if constexpr (Tiles == 2) (tile_store<Columns * 2 + 1>(sums + (Columns * 2 + 1) * kTile), ...);
}

class CodeTileKernel : public CodeKernel<CodeTileKernel> {
 public:
  static constexpr bool kIsForManyHeads = true;

  CodeTileKernel(const Layout& layout, const Task& task, Scratch& scratch)
      : CodeKernel(layout, task, scratch), tiles_(rows_ < kQueries ? 2 * rows_ : kQueries) {
    values_ = scratch.take<char>(kPart * head_dim_);
  }

  void score(const Piece& piece, int64_t query, int64_t row, int64_t count, Fetcher* fetcher) {
    const int64_t stride = layout_.blocks.key_stride();
    const auto keys = [&](int64_t step, int64_t d) { return piece.keys[step] + d * (kDepth / 4) * stride; };
    const auto put = [&](int64_t i, int64_t step, I32 upper, I32 lower) {
      put_scores(piece, query + i, row + i, (int)step, upper, lower);
    };
    if (fetcher != nullptr) fetcher->steps(piece.steps);
    multiply_all(count, piece.steps, {query_row(query), depth_, depth_}, keys, stride, put);
  }

  // The values of four steps are a tile's rows only where they stand behind each other.
  void mix(const Piece& piece, int64_t row, int64_t count, Fetcher* fetcher, float* values) {
    const int64_t bytes = kStep * head_dim_;
    for (int s = 0; s < piece.steps && fetcher != nullptr; ++s) {
      fetcher->step();
      memcpy(values_ + s * bytes, piece.values[s], bytes);
    }
    const auto codes = [&](int64_t column, int64_t d) { return values_ + d * 4 * bytes + column * kLanes * 4; };
    const auto put = [&](int64_t i, int64_t column, I32 upper, I32 lower) {
      store(values + i * layout_.padded_dim + column * kLanes,
            join_whole(upper, lower) * splat(weight_factors_[row + i]));
    };
    multiply_all(count, layout_.padded_dim / kLanes, {weight_row(row), kPart, (piece.steps + 3) / 4 * kDepth}, codes,
                 head_dim_ * 4, put);
  }

 private:
  // put(row, column, upper sums, lower sums) for all columns.
  template <class Address, class Put>
  QSERVE_INLINE void multiply_all(int64_t count, int64_t columns, Rows rows, const Address& at, int64_t code_stride,
                                  const Put& put) {
    const bool is_one = rows_ < kQueries;
    const int64_t widest = is_one ? 4 : 2, lower = is_one ? rows_ * kLanes : kTile, next = is_one ? kTile : 2 * kTile;
    for (int64_t column = 0; column < columns; column += widest) {
      const int64_t width = columns - column < widest ? columns - column : widest;
      multiply_some(width, rows, [&](int c, int64_t d) { return at(column + c, d); }, code_stride);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < width; ++c) {
          const int32_t* from = sums_ + c * next + i * kLanes;
          put(i, column + c, load<I32>(from), load<I32>(from + lower));
        }
    }
  }

  template <class Address>
  QSERVE_INLINE void multiply_some(int64_t columns, Rows rows, const Address& at, int64_t code_stride) {
    with_count(columns, [&](auto some) {
      constexpr int kOne = decltype(some)::value, kTwo = kOne < 2 ? 1 : 2;
      if (rows_ < kQueries)
        multiply<1>(std::make_integer_sequence<int, kOne>(), rows, at, code_stride, sums_);
      else
        multiply<2>(std::make_integer_sequence<int, kTwo>(), rows, at, code_stride, sums_);
    });
  }

  CodeTiles tiles_;
  char* values_;
  alignas(64) int32_t sums_[4 * kTile];
};

}  // namespace

void attend_code_tiles(const Layout& layout, const Task* begin, const Task* end, const States& partials) {
  Walk<CodeTileKernel>(layout, end, partials).go(begin);
}

#else

void attend_code_tiles(const Layout&, const Task*, const Task*, const States&) {}

#endif

}  // namespace qserve
