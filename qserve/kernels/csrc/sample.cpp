#include "sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "lanes.h"
#include "scratch.h"

namespace qserve {
namespace {

constexpr int64_t kRun = 256;  // tokens that are looked at together: most are never looked at one by one
constexpr float kLeastTemperature = 1e-30f;
constexpr float kLeastWeight = 1.17549435e-38f;  // of those that are not nothing

int64_t count_runs(int64_t count) { return (count + kRun - 1) / kRun; }

int64_t end_of(int64_t run, int64_t count) { return std::min((run + 1) * kRun, count); }

struct Row {
  const float* logits;
  const uint8_t* allowed;
  int64_t count;

  // Sixteen from there. What is past the end cannot be drawn; neither can what is not a number, or is not allowed.
  QSERVE_INLINE F32 load_at(int64_t i) const {
    F32 x = splat(-INFINITY);
    if (count - i >= kLanes) x = load<F32>(logits + i);
    if (count - i < kLanes) memcpy(&x, logits + i, std::max<int64_t>(count - i, 0) * sizeof(float));
    return (allowed == nullptr ? x == x : (x == x) & are_allowed(i)) ? x : splat(-INFINITY);
  }

  float find_most(int64_t begin, int64_t end) const {
    F32 most[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    by_fours(end - begin, [&](int64_t i, int j, int) { most[j] = largest(most[j], load_at(begin + i)); });
    return max_lanes(largest(largest(most[0], most[1]), largest(most[2], most[3])));
  }

  // The first of the likeliest; -1 where there is none.
  int64_t find_likeliest() const {
    float most = -INFINITY;
    int64_t best = -1;
    for (int64_t run = 0; run < count_runs(count); ++run) {
      const float most_of_run = find_most(run * kRun, end_of(run, count));
      if (most_of_run > most) most = most_of_run, best = run;
    }
    return best < 0 ? -1 : find_first(most, best * kRun, end_of(best, count));
  }

  int64_t find_first(float value, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kLanes) {
      const F32 x = load_at(i);
      for (int lane = 0; lane < kLanes; ++lane)
        if (x[lane] == value) return i + lane;
    }
    return -1;
  }

 private:
  // All ones for those that are.
  QSERVE_INLINE I32 are_allowed(int64_t i) const {
    constexpr I32 kBits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const int32_t low = i < count ? allowed[i / 8] : 0, high = i + 8 < count ? allowed[i / 8 + 1] : 0;
    return (I32)((splat(low | high << 8) & kBits) != I32{});
  }
};

// Some weights; zeros fill up the last vector.
struct Some {
  const float* each;
  int64_t count;

  // Of those that are at least so much.
  double sum(float least) const {
    double total = 0;
    for (int64_t run = 0; run < count; run += kRun) {
      F32 sums = {};
      for (int64_t i = run; i < end_of(run / kRun, count); i += kLanes) {
        const F32 weights = load<F32>(each + i);
        sums += weights >= splat(least) ? weights : F32{};
      }
      total += sum_lanes(sums);
    }
    return total;
  }

  double number(float least) const {
    I32 counts = {};
    for (int64_t i = 0; i < count; i += kLanes) counts -= (I32)(load<F32>(each + i) >= splat(least));
    int64_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += counts[lane];
    return (double)total;
  }
};

// A row's probabilities, but for their sum: the likeliest token's is 1. Zeros fill up the last run.
class Weights {
 public:
  Weights(const Row& row, float most, float temperature, Scratch& scratch)
      : count_(count_runs(row.count) * kRun),
        each_(scratch.take<float>(count_)),
        heavy_(scratch.take<float>(count_ + kLanes)),
        maxima_(scratch.take<float>(count_ / kRun)),
        sums_(scratch.take<double>(count_ / kRun)) {
    for (int64_t run = 0; run < count_; run += kRun) {
      F32 most_of_run = {};
      for (int64_t i = run; i < run + kRun; i += kLanes) {
        const F32 weights = exponential((row.load_at(i) - splat(most)) / splat(temperature));
        most_of_run = largest(most_of_run, weights);
        store(each_ + i, weights);
      }
      maxima_[run / kRun] = max_lanes(most_of_run);
    }
  }

  double sum() const { return Some{each_, count_}.sum(0.0f); }

  // Those that are at least so much.
  Some gather(float least) {
    int64_t found = 0;
    for (int64_t run = 0; run < count_; run += kRun)
      if (maxima_[run / kRun] >= least)
        for (int64_t i = run; i < run + kRun; i += kLanes)
          found += store_at_least(heavy_ + found, load<F32>(each_ + i), least);
    store(heavy_ + found, F32{});
    return {heavy_, found};
  }

  // A weight that `number` tokens surely have: as many runs have one of it.
  float weight_of_best(int64_t number) {
    if (number > count_ / kRun) return kLeastWeight;
    std::copy(maxima_, maxima_ + count_ / kRun, heavy_);
    std::nth_element(heavy_, heavy_ + number - 1, heavy_ + count_ / kRun, [](float a, float b) { return a > b; });
    return std::max(heavy_[number - 1], kLeastWeight);
  }

  // A weight so small that all smaller ones together are half of that share of everything.
  float weight_of_rest(double share) const {
    return std::max((float)(share * sum() / (double)count_ / 2), kLeastWeight);
  }

  // Nothing but what weighs more than `least`, and the first `equals` that weigh just as much.
  void keep(float least, double equals) {
    for (int64_t i = 0; i < count_; i += kLanes) {
      const F32 weights = load<F32>(each_ + i);
      store(each_ + i, weights > splat(least) ? weights : F32{});
      if (equals > 0 && max_lanes(weights == splat(least) ? splat(1.0f) : F32{}) > 0)
        for (int lane = 0; lane < kLanes; ++lane)
          if (weights[lane] == least && equals-- > 0) each_[i + lane] = least;
    }
  }

  // Before `invert`, which any number of times may follow.
  void sum_runs() {
    for (int64_t run = 0; run < count_; run += kRun) sums_[run / kRun] = Some{each_ + run, kRun}.sum(0.0f);
    total_ = std::accumulate(sums_, sums_ + count_ / kRun, 0.0);
  }

  // The first token at which the cumulative weight exceeds that share of the whole. Rounding may put it on the very end:
  // then the last that adds to it.
  int64_t invert(double share) const {
    const double target = share * total_;
    double before = 0, end = 0;
    int64_t found = 0;
    for (int64_t run = 0; run < count_ && end <= target; run += kRun) {
      const double added = sums_[run / kRun];
      if (added > 0) found = run, before = end;
      end += added;
    }
    int64_t token = found;
    for (int64_t i = found; i < found + kRun && before <= target; ++i) {
      if (each_[i] > 0) token = i;
      before += each_[i];
    }
    return token;
  }

 private:
  int64_t count_;
  float *each_, *heavy_, *maxima_;
  double *sums_, total_ = 0;
};

// The largest weight that has `wanted` of the measure at it and above, or the least of all; by bisection of the numbers
// that there are: to sum what weighs enough takes a microsecond, and to put it in order up to 3,000.
template <class Measure>
float find_threshold(double wanted, const Measure& measure) {
  uint32_t low, high;
  const float least = kLeastWeight, most = 1.0f;
  memcpy(&low, &least, sizeof low);
  memcpy(&high, &most, sizeof high);
  const auto weight_of = [](uint32_t bits) {
    float weight;
    memcpy(&weight, &bits, sizeof weight);
    return weight;
  };
  for (++high; high - low > 1;) {
    const uint32_t middle = low + (high - low) / 2;
    (measure(weight_of(middle)) >= wanted ? low : high) = middle;
  }
  return weight_of(low);
}

float after(float weight) { return std::nextafter(weight, 2.0f); }

void cut_by_number(Weights& weights, double number) {
  const Some some = weights.gather(weights.weight_of_best((int64_t)number));
  const float least = find_threshold(number, [&](float weight) { return some.number(weight); });
  weights.keep(least, number - some.number(after(least)));
}

void cut_by_share(Weights& weights, double share) {
  const double mass = share * weights.sum();
  const Some some = weights.gather(weights.weight_of_rest(1 - share));
  const float least = find_threshold(mass, [&](float weight) { return some.sum(weight); });
  weights.keep(least, std::max(std::ceil((mass - some.sum(after(least))) / least), 1.0));
}

void sample_row(const Row& row, const Draw& draw, const double* numbers, int64_t* tokens, int64_t count) {
  if (draw.temperature == 0) return (void)std::fill_n(tokens, count, row.find_likeliest());
  const float most = row.find_most(0, row.count);
  if (std::isinf(most)) return (void)std::fill_n(tokens, count, row.find_likeliest());
  Scratch& scratch = thread_scratch();
  scratch.reset();
  Weights weights(row, most, std::max((float)draw.temperature, kLeastTemperature), scratch);
  if (0 < draw.top_k && draw.top_k < (double)row.count) cut_by_number(weights, draw.top_k);
  if (draw.top_p < 1) cut_by_share(weights, draw.top_p);
  if (draw.min_p > 0) weights.keep(std::nextafter((float)draw.min_p, 0.0f), 0);
  weights.sum_runs();
  for (int64_t i = 0; i < count; ++i) tokens[i] = weights.invert(numbers[i]);
}

}  // namespace

void sample_rows(const Sampling& s, Team& team) {
  constexpr int64_t kNumbersAt = sizeof(Draw) / sizeof(double);
  team.run(s.rows, [&](int64_t i) {
    const Row row{s.logits + i * s.stride, s.allowed == nullptr ? nullptr : s.allowed[i], s.vocabulary};
    const double* draw = s.draws + i * (kNumbersAt + s.numbers);
    sample_row(row, *(const Draw*)draw, draw + kNumbersAt, s.tokens + i * s.numbers, s.numbers);
  });
}

}  // namespace qserve
