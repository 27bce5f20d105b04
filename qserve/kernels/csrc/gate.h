// Activations of gates.
#pragma once
#include "lanes.h"
#include "stage.h"

namespace qserve {

// erf by formula 7.1.26 of Abramowitz and Stegun: within 1.5e-7.
QSERVE_INLINE F32 error_function(F32 x) {
  const F32 size = magnitude(x);
  const F32 t = splat(1.0f) / fused(splat(0.3275911f), size, splat(1.0f));
  F32 p = splat(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fused(p, t, splat(c));
  const F32 y = splat(1.0f) - p * t * exponential(-(size * size));
  return (F32)((U32)y | ((U32)x & 0x80000000u));
}

// x / (1 + e^-x); below -87 what is left of it is of no account.
QSERVE_INLINE F32 silu(F32 x) {
  return x * reciprocal(splat(1.0f) + power_of_two(smallest(x * splat(-kLog2E), splat(126.0f))));
}

QSERVE_INLINE F32 activate(int32_t gate, F32 x) {
  if (gate == kSilu) return silu(x);
  if (gate == kRelu) return largest(x, F32{});
  const F32 half = splat(0.5f) * x;
  if (gate == kGelu) return half * (splat(1.0f) + error_function(x * splat(0.70710678f)));
  const F32 inner = splat(0.79788456f) * fused(splat(0.044715f) * x * x, x, x);
  return half * (splat(1.0f) + tanh_lanes(inner));
}

}  // namespace qserve
