// A linear stage: prepare the rows, multiply by each weight, add what follows.
#include "linear.h"

#include "normalize.h"

namespace qserve {
namespace {

void multiply(const Weight& w, const Rows& rows, const Output& output, Scratch& scratch, Team& team) {
  if (w.form == kFloat) return multiply_float(w, rows, output, team);
  multiply_integer(w, rows, output, scratch, team);
}

void normalize_and_add(const Stage& stage, const float* y, int64_t features, Team& team) {
  team.run(stage.rows, [&](int64_t row) {
    Scratch& scratch = thread_scratch();
    scratch.reset();
    float* normal = scratch.take<float>(features);
    normalize_row(y + row * features, *stage.post_norm, normal);
    const float* residual = stage.residual + row * stage.output_stride;
    float* output = stage.output + row * stage.output_stride;
    for (int64_t i = 0; i < features; ++i) output[i] = residual[i] + normal[i] * stage.scale;
  });
}

}  // namespace

void run_linear(const Stage& stage, Scratch& scratch, Team& team) {
  const Linear& linear = *stage.linear;
  const bool is_direct = stage.post_norm == nullptr;
  float* data = is_direct ? stage.output : scratch.take<float>((int64_t)stage.rows * linear.out_features);
  for (int i = 0; i < linear.num_weights; ++i) {
    const Weight& w = linear.weights[i];
    const Rows rows = prepare_rows(stage, w, scratch, team);
    const Output output = {data, is_direct ? stage.residual : nullptr, linear.bias,
                           is_direct ? stage.output_stride : linear.out_features, w.column, w.out_features, is_direct ? stage.scale : 1.0f, stage.soft_cap};
    multiply(w, rows, output, scratch, team);
  }
  if (!is_direct) normalize_and_add(stage, data, linear.out_features, team);
}

}  // namespace qserve
