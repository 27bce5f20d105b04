// How AMX adds up products of two tiles of weights with exact inputs, two planes of int8 a row (rows.h), and how the sums
// stand in its tiles and in memory.
#pragma once
#include "aligned.h"
#include "rows.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_INT8__)

constexpr int kPlanes = 2;

// Two tiles of weights: the digits of 16 channels, or codes of 32.
struct Pair {
  const int8_t *left, *right;
};

// Sums of each plane and side apart: (row, plane, side, 16 channels). One tile of inputs holds both planes of 8 rows, of
// two each is a plane of 16: tiles 0 and 1 of sums are the first one's, 2 and 3 the second's.
template <bool IsLeftUnsigned, int Tiles, bool IsStream = false>  // of several blocks of rows, inputs are a stream
struct Apart {
  static constexpr bool kHasSides = true;
  static constexpr int kTiles = Tiles, kRowSums = kPlanes * 2 * kLanes;
  static constexpr int64_t kNextTile = 2 * kLanes, kNextRow = (Tiles == 2 ? kRowSums : 2 * kLanes) * 4;  // bytes

  // `amidst` is what else is to be done, in two parts.
  template <class Amidst>
  static QSERVE_INLINE void multiply(const int8_t* inputs, const Pair& weights, Amidst& amidst) {
    tile_load<6>(weights.left, 64);
    tile_load_inputs<IsStream, 4>(inputs, 64);
    tile_dot<IsLeftUnsigned, 0, 4, 6>();
    tile_load<7>(weights.right, 64);
    tile_dot<true, 1, 4, 7>();
    amidst(0);
    if constexpr (Tiles == 2) {
      tile_load_inputs<IsStream, 5>(inputs + PlaneTiles::kTileBytes, 64);
      tile_dot<IsLeftUnsigned, 2, 5, 6>();
      tile_dot<true, 3, 5, 7>();
    }
    amidst(1);
  }

  static void clear() {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (Tiles == 2) tile_zero<2>(), tile_zero<3>();
  }

  static void read(const int32_t* sums) {
    tile_load<0>(sums, kNextRow), tile_load<1>(sums + kLanes, kNextRow);
    sums += kNextTile;
    if constexpr (Tiles == 2) tile_load<2>(sums, kNextRow), tile_load<3>(sums + kLanes, kNextRow);
  }

  static void write(int32_t* sums) {
    tile_store<0>(sums, kNextRow), tile_store<1>(sums + kLanes, kNextRow);
    sums += kNextTile;
    if constexpr (Tiles == 2) tile_store<2>(sums, kNextRow), tile_store<3>(sums + kLanes, kNextRow);
  }

  static QSERVE_INLINE I32 plane(const int32_t* sums, int p, int side) {
    return load<I32>(sums + (p * 2 + side) * kLanes);
  }

  // Of both digits of both planes.
  static QSERVE_INLINE Doubles total(const int32_t* sums) {
    Doubles total = {};
    for (int p = 0; p < kPlanes; ++p)
      total = total * 256.0 + (to_doubles(plane(sums, p, 0)) * 256.0 + to_doubles(plane(sums, p, 1)));
    return total;
  }
};

// Two planes of 16 rows times two digits, where products that count alike add up: (row, power of 256, 16 channels),
//
//     power       2         1                  0
//     products    0 high    0 low and 1 high   1 low
template <bool IsStream>
struct ByPower {
  static constexpr bool kHasSides = false;
  static constexpr int kTiles = 2, kPowers = 3, kRowSums = kPowers * kLanes;
  static constexpr int64_t kNextRow = 4 * kRowSums;  // bytes

  // A sum's two products stand as far apart as they can, for the second waits for the first.
  template <class Amidst>
  static QSERVE_INLINE void multiply(const int8_t* inputs, const Pair& weights, Amidst& amidst) {
    tile_load<7>(weights.right, 64);
    tile_load_inputs<IsStream, 4>(inputs, 64);
    tile_dot<true, 1, 4, 7>();
    tile_load<6>(weights.left, 64);
    tile_dot<false, 0, 4, 6>();
    amidst(0);
    tile_load_inputs<IsStream, 5>(inputs + PlaneTiles::kTileBytes, 64);
    tile_dot<true, 2, 5, 7>();
    tile_dot<false, 1, 5, 6>();
    amidst(1);
  }

  static void clear() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(); }

  static void read(const int32_t* sums) {
    tile_load<0>(sums, kNextRow);
    tile_load<1>(sums + kLanes, kNextRow);
    tile_load<2>(sums + 2 * kLanes, kNextRow);
  }

  static void write(int32_t* sums) {
    tile_store<0>(sums, kNextRow);
    tile_store<1>(sums + kLanes, kNextRow);
    tile_store<2>(sums + 2 * kLanes, kNextRow);
  }

  static QSERVE_INLINE Doubles total(const int32_t* sums) {
    Doubles total = load_doubles(sums);
    for (int power = 1; power < kPowers; ++power) total = fused(total, 256.0, load_doubles(sums + power * kLanes));
    return total;
  }
};

#endif

}  // namespace qserve
