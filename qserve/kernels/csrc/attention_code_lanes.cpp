// Attention over int8 codes on vectors, by dot products of four bytes: any head size and block size.
#include "attention_codes.h"

namespace qserve {
namespace {

constexpr int kMaxHeads = 4;  // queries computed together: as many as registers hold, with two sums each
constexpr int kColumns = 2;   // vectors of a value, likewise

// Codes are signed, and the dot product takes unsigned ones: 128 more each, times what they are multiplied with.
QSERVE_INLINE Bytes load_unsigned(const char* codes) {
  return load<Bytes>(codes) ^ (Bytes)splat((int32_t)0x80808080u);
}

QSERVE_INLINE I32 surplus(const int8_t* bytes, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += bytes[i];
  return splat(128 * sum);
}

class CodeLaneKernel : public CodeKernel<CodeLaneKernel> {
 public:
  static constexpr bool kIsForManyHeads = false;

  CodeLaneKernel(const Layout& layout, const Task& task, Scratch& scratch) : CodeKernel(layout, task, scratch) {
    if (layout.blocks.together == 4) return;
    keys_ = scratch.take<int8_t>(kPart * depth_);
    values_ = scratch.take<int8_t>(kPart * depth_);
    scales_ = scratch.take<float>(2 * kPart);
  }

  void prepare(Piece& piece) {
    if (layout_.blocks.together != 4) collect(piece);
    CodeKernel::prepare(piece);
  }

  void score(const Piece& piece, int64_t query, int64_t row, int64_t count, Fetcher* fetcher) {
    if (fetcher != nullptr) fetcher->steps(piece.steps);
    for (int64_t i = 0; i < count; i += kMaxHeads)
      with_count(count - i, [&](auto heads) { score_some<decltype(heads)::value>(piece, query + i, row + i); });
  }

  void mix(const Piece& piece, int64_t, int64_t count, Fetcher* fetcher, float* values) {
    if (fetcher != nullptr) fetcher->steps(piece.steps);
    for (int64_t i = 0; i < count; i += kMaxHeads)
      with_count(count - i, [&](auto heads) {
        constexpr int kHeads = decltype(heads)::value;
        for (int64_t column = 0; column < layout_.padded_dim; column += kColumns * kLanes)
          layout_.padded_dim - column == kLanes ? mix_some<kHeads, 1>(piece, i, column, values)
                                                : mix_some<kHeads, kColumns>(piece, i, column, values);
      });
  }

 private:
  template <int Heads>
  void score_some(const Piece& piece, int64_t query, int64_t row) {
    const int8_t* queries[Heads];
    I32 upper_surplus[Heads], lower_surplus[Heads];
    const int64_t down = rows_ * depth_;
    const int64_t stride = layout_.blocks.together == 4 ? layout_.blocks.key_stride() : 4 * kStep;
    for (int h = 0; h < Heads; ++h) {
      queries[h] = query_row(query + h);
      upper_surplus[h] = surplus(queries[h], head_dim_), lower_surplus[h] = surplus(queries[h] + down, head_dim_);
    }
    for (int s = 0; s < piece.steps; ++s) {
      I32 upper[Heads] = {}, lower[Heads] = {};
      for (int64_t d = 0; d < head_dim_; d += 4) {
        const Bytes codes = load_unsigned(piece.keys[s] + d / 4 * stride);
        for (int h = 0; h < Heads; ++h) {
          upper[h] = dot<8>(upper[h], codes, queries[h] + d);
          lower[h] = dot<8>(lower[h], codes, queries[h] + down + d);
        }
      }
      for (int h = 0; h < Heads; ++h)
        put_scores(piece, query + h, row + h, s, upper[h] - upper_surplus[h], lower[h] - lower_surplus[h]);
    }
  }

  template <int Heads, int Width>
  void mix_some(const Piece& piece, int64_t index, int64_t column, float* values) {
    I32 upper[Heads][Width], lower[Heads][Width];
    const int64_t down = rows_ * kPart;
    for (int h = 0; h < Heads; ++h)
      for (int v = 0; v < Width; ++v) {
        const int8_t* weights = weight_row(index + h);
        upper[h][v] = -surplus(weights, piece.steps * kStep);
        lower[h][v] = -surplus(weights + down, piece.steps * kStep);
      }
    for (int j = 0; j < piece.steps * kStep; j += 4)
      for (int v = 0; v < Width; ++v) {
        const int64_t at = j % kStep * head_dim_ + (column + v * kLanes) * 4;
        const Bytes codes = load_unsigned(piece.values[j / kStep] + at);
        for (int h = 0; h < Heads; ++h) {
          upper[h][v] = dot<8>(upper[h][v], codes, weight_row(index + h) + j);
          lower[h][v] = dot<8>(lower[h][v], codes, weight_row(index + h) + down + j);
        }
      }
    for (int h = 0; h < Heads; ++h)
      for (int v = 0; v < Width; ++v)
        store(values + (index + h) * layout_.padded_dim + column + v * kLanes,
              join_whole(upper[h][v], lower[h][v]) * splat(weight_factors_[index + h]));
  }

  // Copies a piece whose codes do not stand in fours: keys (depth / 4, 16, 4) and values (4, head_dim, 4) a step.
  void collect(Piece& piece) {
    const CacheLayout& blocks = layout_.blocks;
    for (int s = 0; s < piece.steps; ++s) {
      piece.keys[s] = (const char*)keys_ + s * kStep * depth_;
      piece.values[s] = (const char*)values_ + s * kStep * depth_;
      piece.key_scales[s] = scales_ + s * kStep, piece.value_scales[s] = scales_ + kPart + s * kStep;
    }
    for (int64_t i = 0; i < piece.end - piece.begin; ++i) {
      const int64_t at = (piece.begin + i) % blocks.block_size;
      const int64_t start = layout_.head_start(task_.chunk, piece.begin + i, piece.kv_head);
      const int8_t *keys = (int8_t*)layout_.cache.keys + start, *values = (int8_t*)layout_.cache.values + start;
      int8_t* key = keys_ + i / kStep * kStep * depth_ + i % kStep * 4;
      int8_t* value = values_ + i / kStep * kStep * depth_ + i % kStep / 4 * 4 * head_dim_ + i % 4;
      for (int64_t d = 0; d < head_dim_; ++d) {
        key[d / 4 * 4 * kStep + d % 4] = keys[blocks.key_offset(at, d)];
        value[d * 4] = values[blocks.value_offset(at, d)];
      }
      scales_[i] = *((const float*)((const char*)layout_.cache.key_scales + start) + at);
      scales_[kPart + i] = *((const float*)((const char*)layout_.cache.value_scales + start) + at);
    }
  }

  int8_t* keys_ = nullptr;
  int8_t* values_ = nullptr;
  float* scales_ = nullptr;
};

}  // namespace

void attend_code_lanes(const Layout& layout, const Task* begin, const Task* end, const States& partials) {
  Walk<CodeLaneKernel>(layout, end, partials).go(begin);
}

}  // namespace qserve
