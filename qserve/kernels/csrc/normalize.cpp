#include "normalize.h"

#include <cmath>

namespace qserve {
namespace {

template <class Value>
float sum_over(int64_t count, const Value& value) {
  F32 sums[4] = {};
  by_fours(count, [&](int64_t i, int j, int rest) { sums[j] += value(i, rest); });
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

float mean_of(const float* x, int64_t count) {
  return sum_over(count, [&](int64_t i, int rest) { return load_some(x + i, rest); }) / (float)count;
}

float mean_square(const float* x, int64_t count, float mean) {
  const float sum = sum_over(count, [&](int64_t i, int rest) {
    F32 away = load_some(x + i, rest) - splat(mean);
    if (rest < kLanes)
      for (int lane = rest; lane < kLanes; ++lane) away[lane] = 0;
    return away * away;
  });
  return sum / (float)count;
}

}  // namespace

void normalize_row(const float* x, const Norm& norm, float* to) {
  const float mean = norm.is_layer ? mean_of(x, norm.size) : 0.0f;
  const F32 factor = splat(1.0f / std::sqrt(mean_square(x, norm.size, mean) + norm.eps));
  by_fours(norm.size, [&](int64_t i, int, int rest) {
    F32 y = (load_some(x + i, rest) - splat(mean)) * factor * load_some(norm.weight + i, rest);
    if (norm.bias != nullptr) y += load_some(norm.bias + i, rest);
    store_some(to + i, y, rest);
  });
}

void read_input(const Stage& stage, int64_t row, float* to, int64_t features) {
  const float* input = input_row(stage, row);
  if (stage.norm != nullptr) return normalize_row(input, *stage.norm, to);
  memcpy(to, input, features * sizeof(float));
}

}  // namespace qserve
