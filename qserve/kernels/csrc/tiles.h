// AMX: eight tiles of 16 rows by 64 bytes, and the permission and configuration that each thread needs for them.
#pragma once
#include <cstdint>

#include "lanes.h"

namespace qserve {

// True once this process may use the tiles; false where the build or the system has none.
bool allow_tiles();

#if defined(__AMX_TILE__)

// Tiles 0 to 3 are sums (16 rows x 64 bytes), 4 and 5 inputs (16 x 4 depth), 6 and 7 weights (depth x 64): `depth`
// rows of four bytes along the input, 8 or 16. Released at the end, for others in this thread configure tiles too.
class TileScope {
 public:
  explicit TileScope(int depth);
  ~TileScope();
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The compiler's own intrinsics take tile numbers as text, which a template cannot give.
template <int Tile>
QSERVE_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

template <int Tile>
QSERVE_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}

// The same for what comes once, or not again before the first cache has lost it: it leaves that cache to the others.
template <int Tile>
QSERVE_INLINE void tile_stream(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <bool IsStream, int Tile>
QSERVE_INLINE void tile_load_inputs(const void* from, int64_t stride) {
  if constexpr (IsStream) tile_stream<Tile>(from, stride);
  if constexpr (!IsStream) tile_load<Tile>(from, stride);
}

template <int Tile>
QSERVE_INLINE void tile_store(void* to, int64_t stride = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
}

// Tiles 0 to 3 as the sums of two tiles of rows by two of channels; in memory a row's stand together, 32 numbers.
inline void clear_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}

inline void load_sums(const void* sums) {
  const char* from = (const char*)sums;
  tile_load<0>(from, 128);
  tile_load<1>(from + 64, 128);
  tile_load<2>(from + 16 * 128, 128);
  tile_load<3>(from + 16 * 128 + 64, 128);
}

inline void store_sums(void* sums) {
  char* to = (char*)sums;
  tile_store<0>(to, 128);
  tile_store<1>(to + 64, 128);
  tile_store<2>(to + 16 * 128, 128);
  tile_store<3>(to + 16 * 128 + 64, 128);
}

// Signed inputs times signed or unsigned weights.
template <bool IsUnsigned, int Sums, int Inputs, int Weights>
QSERVE_INLINE void tile_dot() {
  if constexpr (IsUnsigned)
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
  else
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
}

#endif

}  // namespace qserve
