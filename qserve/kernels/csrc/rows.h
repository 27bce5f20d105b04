// The inputs of a linear, prepared for the arithmetic of its weight.
#pragma once
#include "lanes.h"
#include "scratch.h"
#include "stage.h"
#include "team.h"

namespace qserve {

// An input x of an integer weight is `planes` int8 numbers, most significant first:
//
//   1  dynamic int8 as the recipe says: x = scale * (q - zero), a scale and a zero for a row
//   2  16 bits of a float input:        x = scale * (256 q0 + q1), a scale for a row, or a power of two for each group
//                                       (Weight::has_group_inputs)
//
// Sums of products of such numbers are exact, so every kernel agrees to the bit, whatever its order.
// An input of a float weight is a float, or for AMX the sum of two bfloat16 numbers (one where it was float8 before).
struct Rows {
  int count;
  int planes;
  int64_t stride;        // numbers from one plane to the next; the planes of a row follow each other
  bool is_tiled;         // codes stand as PlaneTiles says instead
  const int8_t* codes;   // (count, planes, stride)
  const int32_t* starts; // (count, groups, planes): the plane's sum over the group, times minus the code bias; or null
  const int32_t* sums;   // (count, groups, planes): the lower 16 bits of that sum times what constants count in; or null
  const float* scales;   // (count, groups) where groups have their own, else (count,)
  const float* totals;   // (count, groups): sums of inputs, in the units of the accumulator; for offsets
  const int32_t* zeros;  // (count,)
  const uint16_t* halves;  // (count, planes, stride), bfloat16
  const float* values;     // (count, stride)
};

// Two planes for AMX stand in blocks of 16 rows, and in a block step by step: 64 inputs of all its rows, as one or two
// tiles of 16 x 64 bytes. Which row of which tile holds row r's plane p:
//
//     up to 8 rows    one tile    row 2 r + p
//     more            two tiles   row r of tile p
//
// The last rows of a tile may hold anything.
struct PlaneTiles {
  static constexpr int kRows = 16, kStep = 64, kTileBytes = kRows * kStep, kFewRows = 8;

  // Tiles of a block that begins with so many rows left.
  static int count(int64_t rows_left) { return rows_left <= kFewRows ? 1 : 2; }

  // Where the block that begins with this row stands.
  static int64_t place(const Weight& w, int64_t row) { return row / kRows * 2 * kRows * w.padded_features(); }
};

// Whether a float weight is multiplied by AMX in bfloat16, on this build.
bool uses_bf16_tiles(const Weight& weight);

// Whether so many rows times a weight with aligned scales go through AMX: sums over groups are of no use there.
bool uses_aligned_tiles(const Weight& weight, int num_rows);

// Whether so many rows with a scale a row go through AMX: codes are tiled then.
bool uses_exact_tiles(const Weight& weight, int num_rows);

Rows prepare_rows(const Stage& stage, const Weight& weight, Scratch& scratch, Team& team);

}  // namespace qserve
