// What the two kernels of attention over int8 codes share. Both multiply whole numbers, exactly, so that they have the
// same sums whatever order their instructions add in:
//
//     score[j]  = query_factor * key_scale[j]  *  sum_d query[d] key_code[j][d]        query, weight: 16 bits, as
//     value[d]  = weight_factor                *  sum_j weight[j] value_code[j][d]     256 * upper + lower, two bytes
//
// weight[j] stands for exp(score[j]) * value_scale[j]. A query's factor is made for its largest number, a weight's for
// the largest of its part; what that rounds away is a hundredth of what the cache's own codes do.
#pragma once
#include "attention_work.h"

namespace qserve {

constexpr float kMostWhole = 127 * 256 + 127;
constexpr float kLeast = 1e-30f;  // so that nothing is divided by zero

// The whole numbers next to 64, each in two bytes.
QSERVE_INLINE void split_whole(const F32 (&x)[4], int8_t* upper, int8_t* lower) {
#if defined(__AVX512BW__)
  const auto pack = [&](int i) {
    return _mm512_packs_epi32((__m512i)round_to_int(x[i]), (__m512i)round_to_int(x[i + 1]));
  };
  const __m512i left = pack(0), right = pack(2), half = _mm512_set1_epi16(128);
  const __m512i left_upper = _mm512_srai_epi16(_mm512_add_epi16(left, half), 8);
  const __m512i right_upper = _mm512_srai_epi16(_mm512_add_epi16(right, half), 8);
  const __m512i left_lower = _mm512_sub_epi16(left, _mm512_slli_epi16(left_upper, 8));
  const __m512i right_lower = _mm512_sub_epi16(right, _mm512_slli_epi16(right_upper, 8));
  store(upper, pack_in_order(left_upper, right_upper));
  store(lower, pack_in_order(left_lower, right_lower));
#else
  for (int i = 0; i < 4; ++i) {
    const I32 whole = round_to_int(x[i]);
    store(upper + i * kLanes, narrow((whole + splat(128)) >> 8));
    store(lower + i * kLanes, narrow(whole));
  }
#endif
}

QSERVE_INLINE F32 join_whole(I32 upper, I32 lower) { return fused(to_float(upper), splat(256.0f), to_float(lower)); }

// Kernel: score(piece, query, row, count, fetcher) fills the scores of so many queries, from that row on; mix(piece, row,
// count, fetcher, values) what comes of the values. The bytes of queries, and of weights, stand in rows: of a group first
// all upper ones, then all lower.
template <class Kernel>
class CodeKernel {
 public:
  CodeKernel(const Layout& layout, const Task& task, Scratch& scratch)
      : layout_(layout),
        task_(task),
        count_(layout.count_queries(task)),
        head_dim_(layout.attention.head_dim),
        depth_((head_dim_ + 63) / 64 * 64),
        rows_(count_ <= kQueries / 2 ? count_ : kQueries),
        scale_(layout.attention) {
    const int64_t most = std::max<int64_t>(count_, kQueries);
    queries_ = scratch.take<int8_t>((most + rows_ - 1) / rows_ * 2 * rows_ * depth_);
    factors_ = scratch.take<float>(most);
  }

  void start(Heads heads) {
    for (int h = 0; h < heads.count(); ++h)
      for (int i = 0; i < count_; ++i) split_query(layout_.query(task_, heads.begin + h, i), h * count_ + i);
  }

  void prepare(Piece& piece) {
    if (piece.steps < kSteps) piece.value_scales[piece.steps] = piece.value_scales[piece.steps - 1];
  }

  void attend(HeadPieces& pieces, int64_t first, int64_t count, Fetcher* fetcher, const States& states) {
    Kernel& kernel = *(Kernel*)this;
    const int64_t each = pieces.count > 1 ? count_ : count;
    for (int h = 0; h < pieces.count; ++h) {
      if (fetcher != nullptr) kernel.prepare(pieces.of[h]);
      kernel.score(pieces.of[h], first + h * each, h * each, each, fetcher);
    }
    for (int h = 0; h < pieces.count; ++h)
      for (int64_t i = 0; i < each; i += kTogether)
        with_count(each - i, [&](auto some) {
          weigh_some<decltype(some)::value>(pieces.of[h], first + i, h * each + i, fetcher, states);
        });
    for (int h = 0; h < pieces.count; ++h)
      kernel.mix(pieces.of[h], h * each, each, fetcher, states.values + h * each * layout_.padded_dim);
  }

 protected:
  int8_t* query_row(int64_t query) const { return queries_ + place_of(query) * depth_; }
  // Of a query of those under way.
  int8_t* weight_row(int64_t row) { return weights_ + place_of(row) * kPart; }
  // Of its upper bytes.
  int64_t place_of(int64_t index) const { return index / rows_ * 2 * rows_ + index % rows_; }

  QSERVE_INLINE void put_scores(const Piece& piece, int64_t query, int64_t row, int step, I32 upper, I32 lower) {
    const F32 scales = load<F32>(piece.key_scales[step]) * splat(factors_[query]);
    store(scores_ + row * kPart + step * kStep, join_whole(upper, lower) * scales);
  }

  const Layout& layout_;
  const Task& task_;
  int64_t count_, head_dim_, depth_;
  int64_t rows_;  // from a query's upper bytes to its lower ones; as many as a group has queries
  Scale scale_;
  float weight_factors_[kQueries];

 private:
  void split_query(const float* query, int64_t index) {
    F32 sizes = splat(kLeast);
    for (int64_t d = 0; d < head_dim_; d += kLanes)
      sizes = larger_size(sizes, load_some(query + d, (int)(head_dim_ - d)));
    const float most = max_size(sizes);
    int8_t* upper = query_row(index);
    const F32 factor = splat(kMostWhole / most);
    for (int64_t d = 0; d < depth_; d += 4 * kLanes) {
      F32 some[4];
      for (int v = 0; v < 4; ++v)
        some[v] = load_some(query + d + v * kLanes, (int)(head_dim_ - d) - v * kLanes) * factor;
      split_whole(some, upper + d, upper + rows_ * depth_ + d);
    }
    factors_[index] = most / kMostWhole * scale_.factor;
  }

  // Queries of a head, from this one of it on.
  template <int Count>
  void weigh_some(const Piece& piece, int64_t query, int64_t row, Fetcher* fetcher, const States& states) {
    Span spans[Count];
    F32 most[Count];
    for (int q = 0; q < Count; ++q) spans[q] = Span(layout_, task_, piece, query + q), most[q] = splat(kLeast);
    float* scores = scores_ + row * kPart;
    // What no row may see has any scale, even none that is a number.
    const auto times = [](F32 weights, const float* scales) {
      return weights > F32{} ? weights * load<F32>(scales) : F32{};
    };
    const auto put = [&](int q, int s, F32 some, F32 more) {
      if (fetcher != nullptr) fetcher->idle();
      some = times(some, piece.value_scales[s]), more = times(more, piece.value_scales[s + 1]);
      store(scores + q * kPart + s * kStep, some);
      store(scores + q * kPart + (s + 1) * kStep, more);
      most[q] = larger_size(larger_size(most[q], some), more);
    };
    weigh<Count>(scale_, spans, scores, piece.steps, states_from(states, row, 0), put);
    for (int q = 0; q < Count; ++q) split_weights(row + q, max_size(most[q]), piece.steps);
  }

  // Up to a whole number of four steps, for a tile is as deep.
  void split_weights(int64_t row, float most, int steps) {
    const float* weights = scores_ + row * kPart;
    int8_t* upper = weight_row(row);
    const F32 factor = splat(kMostWhole / most);
    for (int s = 0; s < steps; s += 4) {
      F32 some[4];
      for (int v = 0; v < 4; ++v) some[v] = s + v < steps ? load<F32>(weights + (s + v) * kStep) * factor : F32{};
      split_whole(some, upper + s * kStep, upper + rows_ * kPart + s * kStep);
    }
    weight_factors_[row] = most / kMostWhole;
  }

  int8_t* queries_;
  float* factors_;
  alignas(64) float scores_[kQueries * kPart];
  alignas(64) int8_t weights_[2 * kQueries * kPart];
};

}  // namespace qserve
