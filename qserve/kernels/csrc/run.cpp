// The library's door: a team is opened once, then runs stages, one at a time or a recorded step at once.
#include <cstddef>
#include <mutex>

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "sample.h"
#include "scratch.h"
#include "stage.h"
#include "team.h"
#include "tiles.h"

namespace qserve {
namespace {

struct Runner {
  explicit Runner(int num_threads) : team(num_threads) {}
  Team team;
  Scratch scratch;
  std::mutex mutex;
};

void copy_row(const Stage& stage, int64_t row, float* to) {
  const int64_t bytes = stage.table_type == kF32 ? 4 : 2, width = stage.width;
  const char* from = (const char*)stage.input + row * width * bytes;
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t rest = width - i < kLanes ? width - i : kLanes;
    char some[64] = {};
    memcpy(some, from + i * bytes, rest * bytes);
    store_some(to + i, load_float(stage.table_type, some, 0) * splat(stage.scale), (int)rest);
  }
}

void run_select(const Stage& stage) {
  const int64_t* index = stage.kind == kEmbed ? stage.step->token_ids : stage.index;
  for (int64_t row = 0; row < stage.rows; ++row)
    copy_row(stage, index[row], stage.output + row * stage.output_stride);
}

void run_stage(const Stage& stage, Runner& runner) {
  runner.scratch.reset();
  switch (stage.kind) {
    case kEmbed:
    case kSelect:
      return run_select(stage);
    case kLinear:
      return run_linear(stage, runner.scratch, runner.team);
    case kRotate:
      return run_rotate(stage, runner.team);
    case kAttend:
      return run_attend(stage, runner.scratch, runner.team);
  }
}

}  // namespace
}  // namespace qserve

#define QSERVE_EXPORT __attribute__((visibility("default")))

extern "C" {

QSERVE_EXPORT void* qserve_open(int32_t num_threads) { return new qserve::Runner(num_threads); }

QSERVE_EXPORT void qserve_close(void* runner) { delete (qserve::Runner*)runner; }

QSERVE_EXPORT int32_t qserve_has_tiles() { return qserve::allow_tiles(); }

// Where the last member of each structure stands, so that a mirror that differs is found before it is used: the size
// would tell less, for it is rounded up.
QSERVE_EXPORT int32_t qserve_last_member(int32_t which) {
  constexpr size_t places[] = {offsetof(qserve::Weight, is_narrow),    offsetof(qserve::Linear, is_paired),
                               offsetof(qserve::Norm, size),           offsetof(qserve::Attention, soft_cap),
                               offsetof(qserve::Cache, block_size),    offsetof(qserve::Step, max_blocks),
                               offsetof(qserve::Stage, soft_cap),      offsetof(qserve::Sampling, vocabulary)};
  return (int32_t)places[which];
}

QSERVE_EXPORT void qserve_run(void* handle, const qserve::Stage* stages, int32_t count) {
  auto& runner = *(qserve::Runner*)handle;
  const std::lock_guard<std::mutex> lock(runner.mutex);
  runner.team.begin();
  for (int32_t i = 0; i < count; ++i) qserve::run_stage(stages[i], runner);
  runner.team.end();
}

QSERVE_EXPORT void qserve_sample(void* handle, const qserve::Sampling* sampling) {
  auto& runner = *(qserve::Runner*)handle;
  const std::lock_guard<std::mutex> lock(runner.mutex);
  runner.team.begin();
  qserve::sample_rows(*sampling, runner.team);
  runner.team.end();
}

}  // extern "C"
