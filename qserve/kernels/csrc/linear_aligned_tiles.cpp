// 4-bit weights with aligned scales times int8 inputs by AMX, for more than a few rows. A code times its scale's multiple
// is a whole number of 16 bits, the same unit for a whole channel: two digits of 8 bits, so a weight is two tiles of int8,
// and sums run over all groups without being touched between them:
//
//     w = multiple * (code - zero) = 256 high + low,    sum w x = 256 sum high x + sum low x
//
// A task unpacks 16 channels at a time, for all its rows. Everything is exact, so it has the bits of linear_integer.cpp.
#include "aligned.h"
#include "linear.h"
#include "tiles.h"

namespace qserve {

#if defined(__AMX_INT8__)

namespace {

constexpr int kStep = 64;        // inputs of one product of tiles
constexpr int kBlockRows = 32;   // two tiles
constexpr int64_t kChunk = 1024; // inputs whose weights stay in the first cache while rows pass

typedef uint16_t Words __attribute__((vector_size(64)));

// One tile of channels: (digit, input / 4, channel, input % 4), the high digits first, padded to whole steps by zeros.
struct Slab {
  int8_t* digits;
  int64_t steps;

  int64_t size() const { return steps * kStep * kLanes; }  // of all high digits, or all low ones
};

// The products of 4 x 16 codes, of which `even` and `odd` hold every other one in 16 bits each, as two digits.
QSERVE_INLINE void store_digits(U32 even_codes, U32 odd_codes, Words multiples, Words constant, int8_t* high, int8_t* low) {
  const Words even = (Words)even_codes * multiples + constant, odd = (Words)odd_codes * multiples + constant;
  const U32 mask = (U32)splat(0x00ff00ff);
  store(high, (U32)(even >> 8) | ((U32)odd & ~mask));
  store(low, (((U32)even & mask) | ((U32)(odd << 8) & ~mask)) ^ 0x80808080u);
}

void unpack(const Weight& w, int tile, const Slab& slab) {
  constexpr int64_t kAhead = 4096;  // bytes
  const int units = w.padded_group / 8;
  const U32 mask = (U32)splat(0x000f000f);
  int8_t *high = slab.digits, *low = high + slab.size();
  for (int g = 0; g < w.groups; ++g) {
    const int64_t index = (int64_t)tile * w.groups + g;
    const Words multiples = (Words)((U32)load_multiples(w, index * kLanes) * 0x10001u);
    const U32 zero = w.zeros == nullptr ? (U32)splat(w.code_bias) : widen(load<U8x16>(w.zeros + index * kLanes));
    const Words half = (Words)splat(128 * 0x10001);  // so that cutting off the low digit rounds
    const Words constant = half - (Words)(zero * 0x10001u) * multiples;
    const uint8_t* codes = w.codes + index * units * 64;
    for (int unit = 0; unit < units; ++unit, codes += 64, high += 128, low += 128) {
      __builtin_prefetch(codes + kAhead);
      const U32 pairs = load<U32>(codes);
      store_digits(pairs & mask, (pairs >> 8) & mask, multiples, constant, high, low);
      store_digits((pairs >> 4) & mask, (pairs >> 12) & mask, multiples, constant, high + 64, low + 64);
    }
  }
  const int64_t rest = slab.digits + slab.size() - high;
  memset(high, 0, rest);
  memset(low, 0, rest);
}

struct AlignedKernel {
  const Weight& w;
  const Rows& rows;
  const Output& output;
  const Slab& slab;

  // Steps [begin, end) of 32 rows, added to `sums`, (row tile, digit, 16, 16).
  void take_chunk(int64_t row, bool has_lower, int64_t begin, int64_t end, int32_t* sums) const {
    const int8_t* upper = rows.codes + row * rows.stride;
    const int8_t* lower = upper + 16 * rows.stride;
    if (begin == 0) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    } else {
      tile_load<0>(sums, 64);
      tile_load<1>(sums + 256, 64);
      tile_load<2>(sums + 512, 64);
      tile_load<3>(sums + 768, 64);
    }
    for (int64_t step = begin; step < end; ++step) {
      const int8_t* digits = slab.digits + step * kStep * kLanes;
      tile_load<6>(digits, 64);
      tile_load<4>(upper + step * kStep, rows.stride);
      tile_dot_int8<0, 4, 6>();
      tile_load<7>(digits + slab.size(), 64);
      tile_dot_int8<1, 4, 7>();
      if (!has_lower) continue;
      tile_load<5>(lower + step * kStep, rows.stride);
      tile_dot_int8<2, 5, 6>();
      tile_dot_int8<3, 5, 7>();
    }
    tile_store<0>(sums);
    tile_store<1>(sums + 256);
    tile_store<2>(sums + 512);
    tile_store<3>(sums + 768);
  }

  void put(int64_t first_row, int tile, const int32_t* sums) const {
    const AlignedFinish finish(w, tile);
    const Output to = output;
    const float* scales = rows.scales;
    const float* zeros = rows.zeros;
    const int64_t end = rows.count < first_row + kBlockRows ? rows.count : first_row + kBlockRows;
    for (int64_t row = first_row; row < end; ++row) {
      const int32_t* high = sums + (row - first_row) / 16 * 512 + (row - first_row) % 16 * kLanes;
      const Doubles total = to_doubles(load<I32>(high)) * 256.0 + to_doubles(load<I32>(high + 256));
      to.put(row, tile, finish(total, scales[row], zeros[row]));
    }
  }

  void multiply(int tile, int64_t begin, int64_t end, int32_t* sums) const {
    const int64_t chunks = (slab.steps * kStep + kChunk - 1) / kChunk, size = (slab.steps + chunks - 1) / chunks;
    for (int64_t step = 0; step < slab.steps; step += size) {
      const int64_t stop = step + size < slab.steps ? step + size : slab.steps;
      for (int64_t row = begin; row < end; row += kBlockRows) {
        int32_t* to = sums + (row - begin) / kBlockRows * 1024;
        take_chunk(row, end - row > 16, step, stop, to);
        if (stop == slab.steps) put(row, tile, to);
      }
    }
  }
};

void multiply_block(const Weight& w, const Rows& rows, const Output& output, const Blocks& blocks, int64_t task) {
  const int64_t block = task / blocks.tiles.count(), piece = task % blocks.tiles.count();
  const int64_t begin = blocks.rows.begin(block), end = blocks.rows.end(block);
  Scratch& scratch = thread_scratch();
  scratch.reset();
  const int64_t steps = (w.padded_features() + kStep - 1) / kStep;
  const Slab slab = {scratch.take<int8_t>(steps * 2 * kStep * kLanes), steps};
  int32_t* sums = scratch.take<int32_t>((end - begin + kBlockRows) / kBlockRows * 1024);
  const TileScope scope(16);
  const AlignedKernel kernel = {w, rows, output, slab};
  for (int64_t tile = blocks.tiles.begin(piece); tile < blocks.tiles.end(piece); ++tile) {
    unpack(w, (int)tile, slab);
    kernel.multiply((int)tile, begin, end, sums);
  }
}

}  // namespace

bool multiply_aligned_tiles(const Weight& w, const Rows& rows, const Output& output, Team& team) {
  constexpr int kFewest = 9;  // rows; measured: with fewer the vector kernel is faster
  if (rows.count < kFewest || !allow_tiles()) return false;
  const Blocks blocks = split_blocks(w, rows.count, 16, team);
  team.run(blocks.count(), [&](int64_t task) { multiply_block(w, rows, output, blocks, task); });
  return true;
}

#else

bool multiply_aligned_tiles(const Weight&, const Rows&, const Output&, Team&) { return false; }

#endif

}  // namespace qserve
