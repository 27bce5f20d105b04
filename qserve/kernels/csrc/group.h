// What an integer kernel does with the exact sums of a group, and with a row at the end. Both integer kernels call
// these, so their float operations are the same in the same order: multiply, then add, groups ascending.
#pragma once
#include "lanes.h"
#include "rows.h"

namespace qserve {

// The float numbers of a weight that belong to 16 channels and one group.
struct GroupScales {
  F32 scale, offset;
  bool has_offset;
};

QSERVE_INLINE GroupScales load_scales(const Weight& w, int64_t index) {
  // Beside the codes, these are streams too thin for the processor to notice in time.
  constexpr int64_t kAhead = 32 * kLanes;
  const int64_t ahead = (index + kAhead) * kFloatBytes[w.scale_type];
  __builtin_prefetch((const uint8_t*)w.scales + ahead);
  if (w.offsets != nullptr) __builtin_prefetch((const uint8_t*)w.offsets + ahead);
  GroupScales group = {load_float(w.scale_type, w.scales, index), {}, w.offsets != nullptr};
  if (group.has_offset) group.offset = load_float(w.offset_type, w.offsets, index);
  return group;
}

// What stands for an input, see Rows.
enum Inputs { kDynamicInputs, kGroupInputs, kRowInputs };

constexpr int num_planes(Inputs inputs) { return inputs == kDynamicInputs ? 1 : 2; }

inline Inputs inputs_of(const Weight& w) {
  if (w.planes == 1) return kDynamicInputs;
  return w.has_group_inputs() ? kGroupInputs : kRowInputs;
}

// sums[p] are the planes' dot products with codes whose zero is already taken away. With int8 inputs each operation
// is rounded, as the recipe's formula says; exact inputs have no formula to agree with, and may be fused.
template <Inputs Kind>
QSERVE_INLINE F32 add_group(F32 y, const I32* sums, const GroupScales& group, float input_scale, float total) {
  if constexpr (Kind == kDynamicInputs) y += group.scale * to_float(sums[0]);
  if constexpr (Kind == kGroupInputs)
    y = fused(group.scale * splat(input_scale), to_float((sums[0] << 8) + sums[1]), y);
  if constexpr (Kind == kRowInputs)
    y = fused(group.scale, fused(to_float(sums[0]), splat(256.0f), to_float(sums[1])), y);
  if (!group.has_offset) return y;
  return Kind == kDynamicInputs ? y + group.offset * splat(total) : fused(group.offset, splat(total), y);
}

template <Inputs Kind>
QSERVE_INLINE F32 finish_row(F32 y, const Weight& w, const Rows& rows, int64_t row, int tile) {
  if constexpr (Kind == kGroupInputs) return y;
  if (w.fix != nullptr) y -= splat((float)rows.zeros[row]) * load<F32>((const float*)w.fix + tile * kLanes);
  return splat(rows.scales[row]) * y;
}

template <Inputs Kind>
QSERVE_INLINE float input_scale(const Weight& w, const Rows& rows, int64_t row, int group) {
  return Kind == kGroupInputs ? rows.scales[row * w.groups + group] : 1.0f;
}

}  // namespace qserve
