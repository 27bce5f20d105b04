// What is done to a row of floats before and after a linear.
#pragma once
#include "lanes.h"
#include "stage.h"

namespace qserve {

// to[i] = normalized(x)[i] * weight[i] + bias[i]; `to` may be x.
void normalize_row(const float* x, const Norm& norm, float* to);

inline const float* input_row(const Stage& stage, int64_t row) {
  return (const float*)stage.input + row * stage.input_stride;
}

// The same, normalized where the stage has a norm.
void read_input(const Stage& stage, int64_t row, float* to, int64_t features);

}  // namespace qserve
