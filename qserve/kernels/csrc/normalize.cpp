#include "normalize.h"

#include <cmath>

namespace qserve {
namespace {

template <class Value>
float sum_over(int64_t count, const Value& value) {
  F32 sums = {};
  for (int64_t i = 0; i < count; i += kLanes) sums += value(i, (int)(count - i));
  return sum_lanes(sums);
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

// erf by formula 7.1.26 of Abramowitz and Stegun: within 1.5e-7.
QSERVE_INLINE F32 error_function(F32 x) {
  const F32 size = magnitude(x);
  const F32 t = splat(1.0f) / fused(splat(0.3275911f), size, splat(1.0f));
  F32 p = splat(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fused(p, t, splat(c));
  const F32 y = splat(1.0f) - p * t * exponential(-(size * size));
  return (F32)((U32)y | ((U32)x & 0x80000000u));
}

QSERVE_INLINE F32 activate(int32_t gate, F32 x) {
  if (gate == kSilu) return x / (splat(1.0f) + exponential(-x));
  if (gate == kRelu) return largest(x, F32{});
  const F32 half = splat(0.5f) * x;
  if (gate == kGelu) return half * (splat(1.0f) + error_function(x * splat(0.70710678f)));
  const F32 inner = splat(0.79788456f) * fused(splat(0.044715f) * x * x, x, x);
  return half * (splat(1.0f) + tanh_lanes(inner));
}

void gate_row(const float* gate_up, int32_t gate, float* to, int64_t features) {
  for (int64_t i = 0; i < features; i += kLanes) {
    const int rest = (int)(features - i);
    store_some(to + i, activate(gate, load_some(gate_up + i, rest)) * load_some(gate_up + features + i, rest), rest);
  }
}

}  // namespace

void normalize_row(const float* x, const Norm& norm, float* to) {
  const float mean = norm.is_layer ? mean_of(x, norm.size) : 0.0f;
  const F32 factor = splat(1.0f / std::sqrt(mean_square(x, norm.size, mean) + norm.eps));
  for (int64_t i = 0; i < norm.size; i += kLanes) {
    const int rest = (int)(norm.size - i);
    F32 y = (load_some(x + i, rest) - splat(mean)) * factor * load_some(norm.weight + i, rest);
    if (norm.bias != nullptr) y += load_some(norm.bias + i, rest);
    store_some(to + i, y, rest);
  }
}

void read_input(const Stage& stage, int64_t row, float* to, int64_t features) {
  const float* input = (const float*)stage.input + row * stage.input_stride;
  if (stage.preparation == kGate) return gate_row(input, stage.gate, to, features);
  if (stage.norm != nullptr) return normalize_row(input, *stage.norm, to);
  memcpy(to, input, features * sizeof(float));
}

}  // namespace qserve
