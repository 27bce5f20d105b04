// Attention on vectors: keys and values in lanes, float32 or bfloat16, any head size and block size.
#include "attention_work.h"

namespace qserve {
namespace {

constexpr int kMaxHeads = 4;  // queries computed together: as many as registers hold
constexpr int kColumns = 4;   // vectors of a value, likewise

// scores[h][j] of Heads queries against 16 positions j, whose keys are (head_dim, stride) with a position a column.
template <int Type, int Heads>
QSERVE_INLINE void score(const float* const* queries, const void* keys, int64_t stride, int64_t head_dim, float* scores) {
  F32 even[Heads] = {}, odd[Heads] = {};
  for (int64_t d = 0; d < head_dim; d += 2) {
    const F32 first = load_float<Type>(keys, d * stride), second = load_float<Type>(keys, (d + 1) * stride);
    for (int h = 0; h < Heads; ++h) {
      even[h] = fused(splat(queries[h][d]), first, even[h]);
      odd[h] = fused(splat(queries[h][d + 1]), second, odd[h]);
    }
  }
  for (int h = 0; h < Heads; ++h) store(scores + h * kPart, even[h] + odd[h]);
}

// sums[h][v] over a piece's positions, ascending, of weights[h][j] * V[j], for Width vectors from a column on.
template <int Type, int Heads, int Width>
QSERVE_INLINE void mix(const Piece& piece, const float* weights, int64_t head_dim, int64_t column, float* sums,
                       int64_t padded_dim) {
  F32 totals[Heads][Width] = {};
  for (int s = 0; s < piece.steps; ++s) {
    const int64_t rest = piece.end - piece.begin - s * kStep, count = rest < kStep ? rest : kStep;
    for (int64_t j = 0; j < count; ++j)
      for (int v = 0; v < Width; ++v) {
        const F32 value = load_float<Type>(piece.values[s], j * head_dim + column + v * kLanes);
        for (int h = 0; h < Heads; ++h)
          totals[h][v] = fused(splat(weights[h * kPart + s * kStep + j]), value, totals[h][v]);
      }
  }
  for (int h = 0; h < Heads; ++h)
    for (int v = 0; v < Width; ++v) store(sums + h * padded_dim + column + v * kLanes, totals[h][v]);
}

template <int Type>
QSERVE_INLINE float load_one(const char* from, int64_t index) {
  if constexpr (Type == kF32) return ((const float*)from)[index];
  const uint32_t bits = (uint32_t)((const uint16_t*)from)[index] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Type: of the numbers that pieces point to.
template <int Type>
class LaneKernel {
 public:
  static constexpr bool kIsForManyHeads = false;

  LaneKernel(const Layout& layout, const Task& task, Scratch& scratch)
      : layout_(layout), task_(task), head_dim_(layout.attention.head_dim), scale_(layout.attention) {
    queries_ = scratch.take<float>(layout.count_queries(task) * layout.padded_dim);
    if (layout.blocks.has_whole_steps()) return;
    keys_ = scratch.take<float>(kPart * head_dim_);
    values_ = scratch.take<float>(kPart * head_dim_);
  }

  void start(Heads heads) {
    const int kv_head = heads.begin;
    for (int64_t i = 0; i < layout_.count_queries(task_); ++i) {
      const float* query = layout_.query(task_, kv_head, (int)i);
      for (int64_t d = 0; d < head_dim_; d += kLanes)
        store(query_at(i) + d, load_some(query + d, (int)(head_dim_ - d)) * splat(scale_.factor));
    }
  }

  void attend(HeadPieces& pieces, int64_t first, int64_t count, Fetcher* fetcher, const States& states) {
    Piece& piece = pieces.of[0];
    if (fetcher != nullptr) prepare(piece), fetcher->steps(piece.steps);
    for (int64_t i = 0; i < count; i += kMaxHeads)
      with_count(count - i, [&](auto heads) {
        attend_some<decltype(heads)::value>(piece, first + i, states_from(states, i, layout_.padded_dim));
      });
    if (fetcher != nullptr) fetcher->steps(piece.steps);
  }

 private:
  float* query_at(int64_t index) const { return queries_ + index * layout_.padded_dim; }

  template <int Heads>
  void attend_some(const Piece& piece, int64_t first, const States& states) {
    const float* queries[Heads];
    for (int h = 0; h < Heads; ++h) queries[h] = query_at(first + h);
    const int64_t stride = layout_.blocks.has_whole_steps() ? layout_.blocks.key_stride() : kStep;
    for (int s = 0; s < piece.steps; ++s)
      score<Type, Heads>(queries, piece.keys[s], stride, head_dim_, weights_ + s * kStep);
    for (int h = 0; h < Heads; ++h) {
      const Span span(layout_, task_, piece, first + h);
      float* weights = weights_ + h * kPart;
      weigh<1>(scale_, &span, weights, piece.steps, states_from(states, h, 0), [&](int, int s, F32 some, F32 more) {
        store(weights + s * kStep, some);
        store(weights + (s + 1) * kStep, more);
      });
    }
    for (int64_t column = 0; column < layout_.padded_dim; column += kColumns * kLanes)
      with_count((layout_.padded_dim - column) / kLanes, [&](auto width) {
        mix<Type, Heads, decltype(width)::value>(piece, weights_, head_dim_, column, states.values, layout_.padded_dim);
      });
  }

  void prepare(Piece& piece) {
    if (layout_.blocks.has_whole_steps()) return;
    layout_.cache.type == kF32 ? collect<kF32>(piece) : collect<kBF16>(piece);
  }

  // Copies a piece whose steps do not stand in one block each.
  template <int Stored>
  void collect(Piece& piece) {
    const CacheLayout& blocks = layout_.blocks;
    for (int s = 0; s < piece.steps; ++s) {
      piece.keys[s] = (const char*)(keys_ + s * kStep * head_dim_);
      piece.values[s] = (const char*)(values_ + s * kStep * head_dim_);
    }
    for (int64_t i = 0; i < piece.end - piece.begin; ++i) {
      const int64_t position = piece.begin + i, at = position % blocks.block_size;
      const int64_t start = layout_.head_start(task_.chunk, position, piece.kv_head);
      const char *keys = (const char*)layout_.cache.keys + start, *values = (const char*)layout_.cache.values + start;
      float* key = keys_ + i / kStep * kStep * head_dim_ + i % kStep;
      for (int64_t d = 0; d < head_dim_; ++d) {
        key[d * kStep] = load_one<Stored>(keys, blocks.key_offset(at, d));
        values_[i * head_dim_ + d] = load_one<Stored>(values, blocks.value_offset(at, d));
      }
    }
  }

  const Layout& layout_;
  const Task& task_;
  int64_t head_dim_;
  Scale scale_;
  float* queries_;
  float* keys_ = nullptr;
  float* values_ = nullptr;
  alignas(64) float weights_[kMaxHeads * kPart];
};

}  // namespace

void attend_lanes(const Layout& layout, const Task* begin, const Task* end, const States& partials) {
  const bool is_bf16 = layout.cache.type == kBF16 && layout.blocks.has_whole_steps();
  if (is_bf16) Walk<LaneKernel<kBF16>>(layout, end, partials).go(begin);
  if (!is_bf16) Walk<LaneKernel<kF32>>(layout, end, partials).go(begin);
}

}  // namespace qserve
