#include "rows.h"

#include <cmath>

#include "aligned.h"
#include "normalize.h"

namespace qserve {
namespace {

constexpr float kTiny = 1.17549435e-38f;
constexpr float kEpsilon = 1.1920929e-07f;
constexpr float kNothing = 1e-24f;  // exact inputs that are all smaller count as zeros: their scale has no inverse

// Where one row's numbers go; see Rows.
struct Row {
  int8_t* codes;
  int64_t stride;  // from plane to plane
  int64_t step;    // from 64 inputs to the next
  int32_t* starts;
  int32_t* sums;
  float* scales;
  float* totals;
  int32_t* zero;

  QSERVE_INLINE int8_t* at(int64_t input) const { return codes + input / PlaneTiles::kStep * step + input % PlaneTiles::kStep; }
};

QSERVE_INLINE void store_codes(int8_t* to, I32 codes) { store(to, narrow(codes)); }

float largest_magnitude(const float* x, int64_t count) {
  F32 most[4] = {};
  by_fours(count, [&](int64_t i, int j, int rest) {
    most[j] = largest(most[j], magnitude(load_some(x + i, rest)));
  });
  return max_lanes(largest(largest(most[0], most[1]), largest(most[2], most[3])));
}

// Of one plane, over [begin, end), whole multiples of 16.
int32_t sum_codes(const Row& row, int plane, int64_t begin, int64_t end) {
  I32 sums = {};
  for (int64_t i = begin; i < end; i += kLanes) sums += widen(load<I8x16>(row.at(i) + plane * row.stride));
  return sum_lanes(sums);
}

int32_t start_factor(const Weight& w) {
  if (counts_from_middle(w)) return -kMiddleCode;
  return w.zeros != nullptr ? -1 : -w.code_bias;
}

// Fills starts, and totals in units of `unit(group)`.
template <class Unit>
void sum_groups(const Weight& w, const Row& row, const Unit& unit) {
  if (row.starts == nullptr) return;
  const int32_t constant = w.offsets != nullptr ? 1 : kMiddleCode - w.code_bias;
  for (int g = 0; g < w.groups; ++g) {
    float total = 0;
    for (int p = 0; p < w.planes; ++p) {
      const int32_t sum = sum_codes(row, p, (int64_t)g * w.padded_group, (int64_t)(g + 1) * w.padded_group);
      row.starts[g * w.planes + p] = sum * start_factor(w);
      if (row.sums != nullptr) row.sums[g * w.planes + p] = sum * constant & 0xffff;
      total = total * 256.0f + (float)sum;
    }
    row.totals[g] = total * unit(g);
  }
}

constexpr float kMost = 127.0f * 256;  // of two signed digits of base 256

QSERVE_INLINE void store_digits(int8_t* to, int64_t stride, I32 number) {
  store_codes(to, (number + 128) >> 8);
  store_codes(to + stride, number);  // modulo 256
}

// The scale of a group's inputs: the power of two that its largest needs. So input times scale is exact wherever the
// scale is multiplied in.
float choose_scale(float most) {
  if (most < kNothing) return 0.0f;
  int exponent;
  std::frexp(most / kMost, &exponent);
  return std::ldexp(1.0f, exponent);
}

// Sixteen at a time, so what is written past `count` belongs to the next group, which is written later.
void quantize_exact(const float* x, int64_t begin, int64_t count, float factor, const Row& row) {
  for (int64_t i = 0; i < count; i += kLanes)
    store_digits(row.at(begin + i), row.stride,
                 round_to_int(load_some(x + begin + i, (int)(count - i)) * splat(factor)));
}

void quantize_groups(const float* x, const Weight& w, const Row& row) {
  for (int g = 0; g < w.groups; ++g) {
    const int64_t at = (int64_t)g * w.padded_group;
    const float scale = choose_scale(largest_magnitude(x + at, w.padded_group));
    row.scales[g] = scale;
    quantize_exact(x, at, w.padded_group, scale > 0 ? 1.0f / scale : 0.0f, row);
  }
  sum_groups(w, row, [&](int g) { return row.scales[g]; });
}

void quantize_row(const float* x, const Weight& w, const Row& row) {
  const float most = largest_magnitude(x, w.padded_features());
  row.scales[0] = most / kMost;
  quantize_exact(x, 0, w.padded_features(), most > kNothing ? kMost / most : 0.0f, row);
  sum_groups(w, row, [](int) { return 1.0f; });
}

void quantize_int8(const float* x, const Weight& w, const Row& row, float scale, int32_t zero) {
  const F32 inverse = splat(1.0f / scale);
  const I32 shift = splat(zero);
  const int64_t features = w.padded_features();
  const auto code = [&](int64_t i, int rest) { return round_to_int(load_some(x + i, rest) * inverse) + shift; };
  int64_t i = 0;
  for (; i + 4 * kLanes <= features; i += 4 * kLanes) {
    I32 four[4];
    for (int j = 0; j < 4; ++j) four[j] = code(i + j * kLanes, kLanes);
    store_to_limits(row.codes + i, four);
  }
  for (; i < features; i += kLanes) store(row.codes + i, narrow_to_limits(code(i, (int)(features - i))));
  row.scales[0] = scale;
  *row.zero = zero;
}

// What stands in the padding must count as nothing: neither in the sums nor in the zero point's share.
void clear_padding(const Weight& w, int8_t* codes) {
  if (w.padded_group == w.group_size) return;
  for (int g = 0; g < w.groups; ++g)
    memset(codes + (int64_t)g * w.padded_group + w.group_size, 0, w.padded_group - w.group_size);
}

void quantize_asymmetric(const float* x, const Weight& w, const Row& row) {
  F32 low[4] = {}, high[4] = {};
  by_fours(w.padded_features(), [&](int64_t i, int j, int rest) {
    const F32 values = load_some(x + i, rest);
    low[j] = smallest(low[j], values), high[j] = largest(high[j], values);
  });
  const float least = -max_lanes(-smallest(smallest(low[0], low[1]), smallest(low[2], low[3])));
  const float most = max_lanes(largest(largest(high[0], high[1]), largest(high[2], high[3])));
  const float scale = std::fmax((most - least) / 255.0f, kTiny);
  const float zero = std::fmin(std::fmax(-128.0f - std::nearbyintf(least / scale), -128.0f), 127.0f);
  quantize_int8(x, w, row, scale, (int32_t)zero);
  clear_padding(w, row.codes);
  sum_groups(w, row, [](int) { return 1.0f; });
}

void quantize_symmetric(const float* x, const Weight& w, const Row& row) {
  const float scale = std::fmax(largest_magnitude(x, w.padded_features()) / 127.5f, kEpsilon);
  quantize_int8(x, w, row, scale, 0);
  sum_groups(w, row, [](int) { return 1.0f; });
}

void quantize(const float* x, const Weight& w, const Row& row) {
  if (w.activation == kAsymmetric) return quantize_asymmetric(x, w, row);
  if (w.activation == kSymmetric) return quantize_symmetric(x, w, row);
  return w.has_group_inputs() ? quantize_groups(x, w, row) : quantize_row(x, w, row);
}

// x as the sum of two bfloat16 numbers, 16 of its 24 bits; one is enough for what was float8.
void split_halves(const float* x, int64_t features, int planes, uint16_t* halves, int64_t stride) {
  for (int64_t i = 0; i < features; i += kLanes) {
    const F32 values = load<F32>(x + i);
    const U32 upper = round_to_bf16(values);
    store(halves + i, upper_halves(upper));
    if (planes == 2) store(halves + stride + i, upper_halves(round_to_bf16(values - bits_to_float(upper))));
  }
}

// Rounds to float8_e4m3fn: three bits behind the leading one, steps of 2^-9 below 2^-6.
float round_to_e4m3(float x) {
  int exponent;
  std::frexp(x, &exponent);
  const float step = std::ldexp(1.0f, (exponent < -5 ? -5 : exponent) - 4);
  return std::nearbyintf(x / step) * step;
}

float quantize_float8(float* x, int64_t features) {
  constexpr float kMost = 448.0f;
  const float most = largest_magnitude(x, features);
  const float scale = most == 0 ? 1.0f : most / kMost;
  for (int64_t i = 0; i < features; ++i) x[i] = round_to_e4m3(std::fmin(std::fmax(x[i] / scale, -kMost), kMost));
  return scale;
}

void round_to_float8(float* x, int64_t features) {
  const float scale = quantize_float8(x, features);
  for (int64_t i = 0; i < features; ++i) x[i] *= scale;
}

// The input of one row as floats, in the weight's padded order.
void gather_row(const Stage& stage, const Weight& w, int64_t row, float* x, float* unpadded) {
  float* plain = w.padded_group == w.group_size ? x : unpadded;
  read_input(stage, row, plain, w.in_features);
  if (w.pre_scale != nullptr)
    for (int64_t i = 0; i < w.in_features; ++i) plain[i] *= w.pre_scale[i];
  if (plain == x) return;
  memset(x, 0, w.padded_features() * sizeof(float));
  for (int g = 0; g < w.groups; ++g)
    memcpy(x + (int64_t)g * w.padded_group, plain + (int64_t)g * w.group_size, w.group_size * sizeof(float));
}

// Where a row's codes begin, and how far it is from plane to plane and from step to step.
struct Place {
  int64_t begin, stride, step;
};

Place place_of(const Rows& rows, const Weight& w, int64_t row) {
  constexpr int64_t kStep = PlaneTiles::kStep, kTileBytes = PlaneTiles::kTileBytes;
  if (!rows.is_tiled) return {row * rows.planes * rows.stride, rows.stride, kStep};
  const int64_t r = row % PlaneTiles::kRows, block = PlaneTiles::place(w, row - r);
  const int tiles = PlaneTiles::count(rows.count - (row - r));
  if (tiles == 2) return {block + r * kStep, kTileBytes, 2 * kTileBytes};
  return {block + r * 2 * kStep, kStep, kTileBytes};
}

Row row_of(const Rows& rows, const Weight& w, int64_t row) {
  const int64_t scales = w.has_group_inputs() ? w.groups : 1, sums = row * w.groups * w.planes;
  const Place place = place_of(rows, w, row);
  return {(int8_t*)rows.codes + place.begin,
          place.stride,
          place.step,
          rows.starts == nullptr ? nullptr : (int32_t*)rows.starts + sums,
          rows.sums == nullptr ? nullptr : (int32_t*)rows.sums + sums,
          (float*)rows.scales + row * scales,
          (float*)rows.totals + row * w.groups,
          (int32_t*)rows.zeros + row};
}

// A cache line more than the inputs need: rows a power of two apart would fight for the same few places of the cache.
int64_t stride_of(const Weight& w, int64_t bytes) { return w.padded_features() + 64 / bytes; }

Rows take_rows(const Weight& w, int count, Scratch& scratch) {
  Rows rows = {};
  rows.count = count, rows.planes = w.planes;
  const int64_t plane_rows = (int64_t)(count + 16) * w.planes;  // kernels read whole tiles of 16
  if (w.form == kFloat) {
    const bool is_half = uses_bf16_tiles(w);
    rows.stride = stride_of(w, is_half ? 2 : 4);
    rows.scales = scratch.take<float>(count);
    if (is_half) rows.halves = scratch.take<uint16_t>(plane_rows * rows.stride);
    if (!is_half) rows.values = scratch.take<float>((int64_t)count * rows.stride);
    return rows;
  }
  rows.stride = stride_of(w, 1);
  rows.codes = scratch.take<int8_t>(plane_rows * rows.stride);
  rows.is_tiled = uses_exact_tiles(w, count);
  const int64_t sums = (int64_t)count * w.groups * w.planes;
  if (!uses_aligned_tiles(w, count) && !(rows.is_tiled && w.units != nullptr)) {
    rows.starts = scratch.take<int32_t>(sums);
    if (counts_from_middle(w)) rows.sums = scratch.take<int32_t>(sums);
  }
  rows.scales = scratch.take<float>((int64_t)count * (w.has_group_inputs() ? w.groups : 1));
  rows.totals = scratch.take<float>((int64_t)(count + 16) * w.groups);
  rows.zeros = scratch.take<int32_t>(count);
  return rows;
}

// Whether the input's own memory can be read in the weight's order.
bool stands_ready(const Stage& stage, const Weight& w, const Rows& rows) {
  const bool is_changed = stage.norm != nullptr || w.pre_scale != nullptr || w.activation == kFloat8;
  return !is_changed && w.padded_group == w.group_size && rows.values == nullptr;
}

void prepare_row(const Stage& stage, const Weight& w, int64_t row, const Rows& rows) {
  const int64_t features = w.padded_features();
  const float* x = input_row(stage, row);
  if (!stands_ready(stage, w, rows)) {
    Scratch& scratch = thread_scratch();
    scratch.reset();
    float* unpadded = scratch.take<float>(w.in_features);
    float* room = rows.values != nullptr ? (float*)rows.values + row * rows.stride : scratch.take<float>(features);
    gather_row(stage, w, row, room, unpadded);
    if (w.activation == kFloat8 && w.form == kFloat) ((float*)rows.scales)[row] = quantize_float8(room, features);
    if (w.activation == kFloat8 && w.form != kFloat) round_to_float8(room, features);
    x = room;
  }
  if (w.form != kFloat) quantize(x, w, row_of(rows, w, row));
  if (rows.halves != nullptr)
    split_halves(x, features, rows.planes, (uint16_t*)rows.halves + row * rows.planes * rows.stride, rows.stride);
}

}  // namespace

Rows prepare_rows(const Stage& stage, const Weight& weight, Scratch& scratch, Team& team) {
  const Rows rows = take_rows(weight, stage.rows, scratch);
  // A row takes a fraction of a microsecond: fewer than a handful are not worth waking anybody for.
  const Pieces pieces = {stage.rows, are_many(stage.rows, team) ? 16 : stage.rows < 4 ? stage.rows : 2};
  team.run(pieces.count(), [&](int64_t piece) {
    for (int64_t row = pieces.begin(piece); row < pieces.end(piece); ++row) prepare_row(stage, weight, row, rows);
  });
  return rows;
}

}  // namespace qserve
