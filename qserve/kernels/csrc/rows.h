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
//   2  exact inputs, small groups:      x = scale * (256 q0 + q1), a power of two for each group: 15 bits of its largest
//   3  exact inputs, long groups:       x = scale * (65536 q0 + 256 q1 + q2), a scale for a row: 24 bits
//
// Sums of products of such numbers are exact in int32, so every kernel agrees to the bit, whatever its order.
// An input of a float weight is a float, or for AMX the sum of two bfloat16 numbers (one where it was float8 before).
struct Rows {
  int count;
  int planes;
  int64_t stride;        // numbers from one plane to the next; the planes of a row follow each other
  const int8_t* codes;   // (count, planes, stride)
  const int32_t* starts; // (count, groups, planes): the plane's sum over the group, times minus the code bias; or null
  const float* scales;   // (count, groups) with two planes, else (count,)
  const float* totals;   // (count, groups): sums of inputs, in the units of the accumulator; for offsets
  const float* zeros;    // (count,)
  const uint16_t* halves;  // (count, planes, stride), bfloat16
  const float* values;     // (count, stride)
};

// Whether a float weight is multiplied by AMX in bfloat16, on this build.
bool uses_bf16_tiles(const Weight& weight);

// Whether so many rows times a weight with aligned scales go through AMX: sums over groups are of no use there.
bool uses_aligned_tiles(const Weight& weight, int num_rows);

Rows prepare_rows(const Stage& stage, const Weight& weight, Scratch& scratch, Team& team);

}  // namespace qserve
