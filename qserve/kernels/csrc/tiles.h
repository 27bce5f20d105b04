// AMX: eight tiles of 16 rows by 64 bytes, and the permission and configuration that each thread needs for them.
#pragma once
#include <cstdint>

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
#endif

}  // namespace qserve
