// y = x W^T: the kernels, and where their results go.
#pragma once
#include <algorithm>

#include "gate.h"
#include "lanes.h"
#include "rows.h"
#include "stage.h"
#include "team.h"

namespace qserve {

// Where a linear's results go, and what is done to each on the way. With a gate, even tiles of channels are gates and
// wait at their place until the odd one beside them comes, from the same thread.
struct Output {
  float* data;  // (rows, stride)
  const float* residual;
  const float* bias;
  int64_t stride;
  int64_t column;  // where the weight's channels begin
  int32_t channels;
  int32_t gate;  // Gate
  float scale;
  float soft_cap;
  bool is_large;  // more than the caches keep until somebody reads it

  QSERVE_INLINE void put(int64_t row, int tile, F32 y) const {
    if (!is_plain()) y = adjust(tile, y);
    if (gate != kNoGate) return put_gated(row, tile, y);
    const int rest = channels - tile * kLanes;
    const int64_t at = row * stride + column + tile * kLanes;
    if (residual != nullptr) y = load_some(residual + at, rest) + y;
    store_some(data + at, y, rest);
  }

  // Whether every tile of a row is a line of the cache.
  bool has_whole_lines() const { return ((uintptr_t)(data + column) | (uintptr_t)stride * sizeof(float)) % 64 == 0; }

  bool is_plain() const { return bias == nullptr && scale == 1.0f && soft_cap == 0.0f; }

 private:
  F32 adjust(int tile, F32 y) const {
    if (bias != nullptr) y += load_some(bias + column + tile * kLanes, channels - tile * kLanes);
    y *= splat(scale);
    return soft_cap == 0.0f ? y : tanh_lanes(y / splat(soft_cap)) * splat(soft_cap);
  }

  QSERVE_INLINE void put_gated(int64_t row, int tile, F32 y) const {
    float* to = data + row * stride + tile / 2 * kLanes;
    store(to, tile % 2 == 0 ? y : activate(gate, load<F32>(to)) * y);
  }
};

// A tile of channels of an output: what is to be done to its results, asked once for all rows.
class OutputTile {
 public:
  OutputTile() = default;
  QSERVE_INLINE OutputTile(const Output& output, int tile)
      : output_(&output), tile_(tile), way_(choose(output, tile)), stride_(output.stride) {
    const int64_t channel = output.column + (output.gate == kNoGate ? tile : tile / 2) * kLanes;
    data_ = output.data + channel;
    if (way_ == kAdd) residual_ = output.residual + channel;
  }

  QSERVE_INLINE void put(int64_t row, F32 y) const {
    if (way_ == kOther) return put_other(*output_, tile_, row, y);
    float* to = data_ + row * stride_;
    if (way_ == kAdd) y = load<F32>(residual_ + row * stride_) + y;
    if (way_ == kSiluTimes) y = silu(load<F32>(to)) * y;
    way_ == kStream ? store_past(to, y) : store(to, y);
  }

 private:
  enum Way { kStore, kStream, kAdd, kSiluTimes, kOther };

  static QSERVE_INLINE Way choose(const Output& output, int tile) {
    if (!output.is_plain() || output.channels < (tile + 1) * kLanes) return kOther;
    if (output.gate == kNoGate && output.residual != nullptr) return kAdd;
    if (output.gate == kNoGate) return output.is_large && output.has_whole_lines() ? kStream : kStore;
    if (tile % 2 == 0) return kStore;
    return output.gate == kSilu ? kSiluTimes : kOther;
  }

  static __attribute__((noinline)) void put_other(const Output& output, int tile, int64_t row, F32 y) {
    output.put(row, tile, y);
  }

  const Output* output_ = nullptr;
  int tile_ = 0;
  Way way_ = kOther;
  int64_t stride_ = 0;
  float* data_ = nullptr;
  const float* residual_ = nullptr;
};

// Tiles for a task, in pairs: enough bytes that taking one costs little, and enough tasks that no thread waits long for
// the last.
inline Pieces split_tiles(const Weight& w, int64_t tile_bytes, const Team& team) {
  constexpr int64_t kTaskBytes = 64 * 1024, kTasksPerThread = 16;
  const int64_t tiles = w.tiles();
  const int64_t for_bytes = (kTaskBytes + tile_bytes - 1) / tile_bytes;
  const int64_t for_count = (tiles + team.size() * kTasksPerThread - 1) / (team.size() * kTasksPerThread);
  const int64_t size = for_bytes > for_count ? for_bytes : for_count;
  return {tiles, size + size % 2};
}

struct Range {
  int64_t begin, end;
};

// Tasks of a kernel that unpacks weights for all the rows it is given: pieces of rows by shares of tiles. These are as even
// as pairs of tiles can be, for a loop takes as long as the thread that has most.
struct Blocks {
  Pieces rows;
  int64_t tiles, shares;
  int64_t count() const { return rows.count() * shares; }
  Range rows_of(int64_t task) const { return {rows.begin(task / shares), rows.end(task / shares)}; }
  Range tiles_of(int64_t task) const { return {begin(task % shares), begin(task % shares + 1)}; }

 private:
  int64_t begin(int64_t share) const { return std::min((tiles + 1) / 2 * share / shares * 2, tiles); }
};

// Rows are shared out where a thread's share is `many`, so that weights are unpacked once for so many rows that it costs
// little; else channels. Tasks are so many that a thread that was held up can be helped.
inline Blocks split_blocks(const Weight& w, int64_t num_rows, const Team& team, int64_t many) {
  constexpr int64_t kTasksPerThread = 4;
  const Pieces rows = count_share(num_rows, team) >= many ? share_rows(num_rows, team) : Pieces{num_rows, num_rows};
  const int64_t shares = share_out(team.size() * kTasksPerThread, rows.count());
  return {rows, w.tiles(), std::min(shares, share_out(w.tiles(), 2))};
}

void multiply_integer(const Weight& w, const Rows& rows, const Output& output, Team& team);
void multiply_float(const Weight& w, const Rows& rows, const Output& output, Team& team);

// By AMX; false where this build, this weight or so few rows are not for it. Equal bits to multiply_integer.
bool multiply_integer_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team);
void multiply_aligned_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team);
bool uses_code_tiles(const Weight& w, int num_rows);
void multiply_code_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team);
void multiply_exact_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team);
void multiply_bf16_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team);

void run_linear(const Stage& stage, Scratch& scratch, Team& team);

}  // namespace qserve
