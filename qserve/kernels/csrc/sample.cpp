#include "sample.h"

#include <cmath>

#include "lanes.h"
#include "scratch.h"

namespace qserve {
namespace {

constexpr int64_t kRun = 256;  // tokens that are looked at together: only one run is looked at one by one
constexpr float kLeastTemperature = 1e-30f;

int64_t count_runs(int64_t count) { return (count + kRun - 1) / kRun; }

int64_t end_of(int64_t run, int64_t count) { return (run + 1) * kRun < count ? (run + 1) * kRun : count; }

// What is past the end cannot be drawn; neither can what is not a number.
QSERVE_INLINE F32 load_logits(const float* from, int64_t count) {
  F32 x = splat(-INFINITY);
  if (count >= kLanes) x = load<F32>(from);
  if (count < kLanes) memcpy(&x, from, count * sizeof(float));
  return x == x ? x : splat(-INFINITY);
}

float find_most(const float* x, int64_t begin, int64_t end) {
  F32 most = splat(-INFINITY);
  for (int64_t i = begin; i < end; i += kLanes) most = largest(most, load_logits(x + i, end - i));
  return max_lanes(most);
}

// Probabilities, but for their sum; the likeliest token's is 1.
struct Weights {
  const float* x;
  float most, temperature;

  QSERVE_INLINE F32 at(int64_t i, int64_t end) const {
    return exponential((load_logits(x + i, end - i) - splat(most)) / splat(temperature));
  }

  float sum(int64_t begin, int64_t end) const {
    F32 total = {};
    for (int64_t i = begin; i < end; i += kLanes) total += at(i, end);
    return sum_lanes(total);
  }

  // The first at which the sum from `begin` exceeds `target`. Rounding may put a target on the very end: then the last
  // that adds to it.
  int64_t invert(int64_t begin, int64_t end, double target) const {
    int64_t found = begin;
    double total = 0;
    for (int64_t i = begin; i < end; i += kLanes) {
      float lanes[kLanes];
      store(lanes, at(i, end));
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (lanes[lane] > 0) found = i + lane;
        total += lanes[lane];
        if (total > target) return found;
      }
    }
    return found;
  }
};

int64_t find_first(const float* x, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; ++i)
    if (x[i] == value) return i;
  return 0;
}

int64_t draw(const Weights& weights, int64_t count, double number, float* sums) {
  const int64_t runs = count_runs(count);
  double total = 0, before = 0;
  for (int64_t run = 0; run < runs; ++run) total += sums[run] = weights.sum(run * kRun, end_of(run, count));
  const double target = number * total;
  int64_t found = 0;
  double end = 0;
  for (int64_t run = 0; run < runs && end <= target; ++run) {
    if (sums[run] > 0) found = run, before = end;
    end += sums[run];
  }
  return weights.invert(found * kRun, end_of(found, count), target - before);
}

int64_t sample_row(const float* x, int64_t count, float temperature, double number) {
  Scratch& scratch = thread_scratch();
  scratch.reset();
  float* runs = scratch.take<float>(count_runs(count));
  int64_t best = 0;
  for (int64_t run = 0; run < count_runs(count); ++run) {
    runs[run] = find_most(x, run * kRun, end_of(run, count));
    if (runs[run] > runs[best]) best = run;
  }
  const float most = runs[best];
  if (temperature == 0 || std::isinf(most)) return find_first(x, best * kRun, end_of(best, count), most);
  const Weights weights = {x, most, temperature > kLeastTemperature ? temperature : kLeastTemperature};
  return draw(weights, count, number, runs);
}

}  // namespace

void sample_rows(const Sampling& s, Team& team) {
  team.run(s.rows, [&](int64_t row) {
    s.tokens[row] = sample_row(s.logits + row * s.stride, s.vocabulary, s.temperatures[row], s.numbers[row]);
  });
}

}  // namespace qserve
