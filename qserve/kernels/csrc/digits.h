// Weights with aligned scales as two digits of 8 bits each, for AMX: w = multiple * code + constant = 256 high + low, the
// high digit signed, the low one unsigned. See aligned_scales.py.
#pragma once
#include "aligned.h"
#include "lanes.h"
#include "stage.h"

namespace qserve {

#if defined(__AMX_INT8__)

constexpr int kStep = 64;  // inputs of one product of tiles
constexpr int kDigitBytes = kStep * kLanes;
constexpr int kStepBytes = 2 * kDigitBytes;

typedef uint16_t Words __attribute__((vector_size(64)));

// The bytes of 16-bit numbers, of which `even` and `odd` hold every other one: all high ones at `to`, then the low ones.
QSERVE_INLINE void store_digits(Words even, Words odd, int8_t* to) {
  constexpr __mmask64 kEven = 0x5555555555555555, kOdd = ~kEven;
  const __m512i swap = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);
  store(to, _mm512_mask_shuffle_epi8((__m512i)odd, kEven, (__m512i)even, swap));
  store(to + kDigitBytes, _mm512_mask_shuffle_epi8((__m512i)even, kOdd, (__m512i)odd, swap));
}

// How codes of one group of 16 channels, four in each 16 bits, become whole numbers: times a multiple, plus a constant.
class Affine {
 public:
  QSERVE_INLINE Affine(Words multiples, Words constants) : multiples_(multiples), constants_(constants) {}

  QSERVE_INLINE void unpack(Words codes, int8_t* to) const {
    const Words mask = (Words)splat(0x000f000f);
    store_digits(product(codes & mask), product((codes >> 8) & mask), to);
    store_digits(product((codes >> 4) & mask), product(codes >> 12), to + 64);
  }

 private:
  QSERVE_INLINE Words product(Words codes) const { return codes * multiples_ + constants_; }

  Words multiples_, constants_;
};

// Numbers of 16 channels and one group, each twice.
QSERVE_INLINE Words load_words(const void* numbers, int64_t index) {
  const U32 words = widen(load<U16x16>((const uint16_t*)numbers + index * kLanes));
  return (Words)(words | words << 16);
}

struct Shifted : Affine {  // where the code of zero differs
  QSERVE_INLINE Shifted(const Weight& w, int64_t index)
      : Affine(load_words(w.scales, index), -zeros(w, index) * load_words(w.scales, index)) {}

 private:
  static QSERVE_INLINE Words zeros(const Weight& w, int64_t index) {
    const U32 zero = w.zeros == nullptr ? (U32)splat(w.code_bias) : widen(load<U8x16>(w.zeros + index * kLanes));
    return (Words)(zero | zero << 16);
  }
};

struct Moved : Affine {  // where the constants of the middle code stand beside the multiples
  QSERVE_INLINE Moved(const Weight& w, int64_t index) : Moved(load_words(w.scales, index), load_words(w.offsets, index)) {}

 private:
  QSERVE_INLINE Moved(Words multiples, Words constants) : Affine(multiples, constants - kMiddleCode * multiples) {}
};

class Symmetric {  // where it is 8: the upper four bits of a number can be its signed code times 2^12
 public:
  Symmetric(const Weight& w, int64_t index) : multiples_(load_words(w.scales, index) << 3) {}

  QSERVE_INLINE void unpack(Words codes, int8_t* to) const {
    const Words all = codes ^ (uint16_t)0x8888, mask = (Words)splat((int32_t)0xf000f000);
    store_digits(product(all << 12), product((all << 4) & mask), to);
    store_digits(product((all << 8) & mask), product(all & mask), to + 64);
  }

 private:
  // What is above 2^15 is all of the product: there is nothing to round.
  QSERVE_INLINE Words product(Words codes) const {
    return (Words)_mm512_mulhrs_epi16((__m512i)codes, (__m512i)multiples_);
  }

  Words multiples_;
};

// Unpacks tiles of channels from a step of one on, half a step of 32 inputs after the other, as they follow in memory:
// to (digit, input / 4, channel, input % 4), the high digit first. Groups are whole multiples of Inputs.
template <class Numbers, int Inputs>
class Unpacker {
 public:
  Unpacker(const Weight& w, int64_t tile, int64_t step = 0)
      : w_(&w),
        codes_(w.codes + (tile * w.padded_features() + step * kStep) * 8),
        group_(tile * w.groups + step * kStep / w.padded_group),
        run_((int)(step * kStep % w.padded_group) / Inputs),
        runs_(w.padded_group / Inputs) {}

  // Which half of its step comes next is the caller's to know.
  QSERVE_INLINE void operator()(int half, int8_t* step) {
    constexpr int kUnits = 4, kRun = Inputs / 8;
    constexpr int kAhead = 8192, kGroupsAhead = 64;  // fetched so many bytes, and multiples, ahead
    int8_t* to = step + half * kUnits * 128;
#pragma GCC unroll 4
    for (int unit = 0; unit < kUnits; unit += kRun) {
      __builtin_prefetch((const uint16_t*)w_->scales + (group_ + kGroupsAhead) * kLanes, 0, kSecondLevel);
      const Numbers numbers(*w_, group_);
      if (++run_ == runs_) run_ = 0, ++group_;
#pragma GCC unroll 4
      for (int i = unit; i < unit + kRun; ++i, codes_ += 64) {
        __builtin_prefetch(codes_ + kAhead, 0, kSecondLevel);
        numbers.unpack(load<Words>(codes_), to + i * 128);
      }
    }
  }

 private:
  const Weight* w_;
  const uint8_t* codes_;
  int64_t group_;
  int run_, runs_;  // of Inputs each, in a group
};

#endif

}  // namespace qserve
