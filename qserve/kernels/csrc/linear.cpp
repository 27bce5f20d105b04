// A linear stage: prepare the rows, multiply by each weight, add what follows.
#include "linear.h"

#include "normalize.h"

namespace qserve {
namespace {

constexpr int64_t kLarge = 4 << 20;  // bytes; measured

void multiply(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  if (w.form == kFloat) return multiply_float(w, rows, output, team);
  multiply_integer(w, rows, output, team);
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

// Gates that do not stand beside what they are multiplied with.
void gate_rows(const Stage& stage, const float* y, int64_t features, Team& team) {
  team.run(stage.rows, [&](int64_t row) {
    const float *gate = y + row * 2 * features, *other = gate + features;
    float* output = stage.output + row * stage.output_stride;
    for (int64_t i = 0; i < features; i += kLanes) {
      const int rest = (int)(features - i);
      store_some(output + i, activate(stage.gate, load_some(gate + i, rest)) * load_some(other + i, rest), rest);
    }
  });
}

}  // namespace

void run_linear(const Stage& stage, Scratch& scratch, Team& team) {
  const Linear& linear = *stage.linear;
  const bool is_gated = stage.gate != kNoGate, is_gated_later = is_gated && !linear.is_paired;
  const bool is_direct = stage.post_norm == nullptr && !is_gated_later;
  float* data = is_direct ? stage.output : scratch.take<float>((int64_t)stage.rows * linear.out_features);
  for (int i = 0; i < linear.num_weights; ++i) {
    const Weight& w = linear.weights[i];
    const Rows rows = prepare_rows(stage, w, scratch, team);
    const Output output = {data,
                           is_direct ? stage.residual : nullptr,
                           linear.bias,
                           is_direct ? stage.output_stride : linear.out_features,
                           w.column,
                           w.out_features,
                           is_direct ? stage.gate : kNoGate,
                           is_direct ? stage.scale : 1.0f,
                           stage.soft_cap,
                           (int64_t)stage.rows * linear.out_features * (int64_t)sizeof(float) > kLarge};
    multiply(w, rows, output, team);
  }
  if (is_gated_later) gate_rows(stage, data, linear.out_features / 2, team);
  if (stage.post_norm != nullptr) normalize_and_add(stage, data, linear.out_features, team);
}

}  // namespace qserve
