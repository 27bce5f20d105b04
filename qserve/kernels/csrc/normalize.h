// What is done to a row of floats before and after a linear: norms, gates.
#pragma once
#include "lanes.h"
#include "stage.h"

namespace qserve {

// to[i] = normalized(x)[i] * weight[i] + bias[i]; `to` may be x.
void normalize_row(const float* x, const Norm& norm, float* to);

// Row `row` of a stage's input as the linear wants it: normalized, or gated from a left and a right half.
void read_input(const Stage& stage, int64_t row, float* to, int64_t features);

}  // namespace qserve
