#include "tiles.h"

#if defined(__AMX_TILE__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qserve {

#if defined(__AMX_TILE__)

bool allow_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool is_allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_allowed;
}

TileScope::TileScope(int depth) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = (uint8_t)(tile < 6 ? 16 : depth);
    config.row_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? 4 * depth : 64);
  }
  // GCC's intrinsics say too little of the memory they read: everything must be written before them.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

TileScope::~TileScope() { _tile_release(); }

#else

bool allow_tiles() { return false; }

#endif

}  // namespace qserve
