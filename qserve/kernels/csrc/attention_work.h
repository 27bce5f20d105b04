// What the two kernels of attention share: the cut of a context into parts, a task and its walk over the parts, and the
// softmax, whose exponentials are powers of two.
//
// A row's context is cut at fixed positions, whatever chunk or batch it comes in:
//
//     position  0        16        32   ...  128       144  ...  256
//               | step    | step    |        | step     |        |
//               |------------ part 0 --------|------- part 1 ----|
//
// A part has one maximum, one sum and one vector of weighted values, summed step by step; parts are merged in ascending
// order. So one thread over all parts and many threads over one each have the same bits, and so has any chunking:
// a position that a row may not see adds exact zeros.
#pragma once
#include <type_traits>
#include <vector>

#include "cache_layout.h"
#include "scratch.h"

namespace qserve {

constexpr int kPart = 128, kSteps = kPart / kStep;
constexpr int kQueries = 16;        // computed together: as many as a tile has rows
constexpr float kNothing = -1e30f;  // a maximum over no position

// Runs body(std::integral_constant<int, count>()), of four at most.
template <class Body>
QSERVE_INLINE void with_count(int64_t count, const Body& body) {
  if (count >= 4) return body(std::integral_constant<int, 4>());
  if (count == 3) return body(std::integral_constant<int, 3>());
  if (count == 2) return body(std::integral_constant<int, 2>());
  return body(std::integral_constant<int, 1>());
}

// Query rows [begin, end) of one chunk with kv heads [kv_head, kv_end), over parts [part, part_end).
struct Task {
  int chunk;
  int64_t begin, end;
  int part, part_end;
  int kv_head, kv_end;
  int64_t slot;  // of kv head 0's partial result, or -1: the task is the whole of its rows' context
};

// Up to eight steps of a part for one kv head. The last step may reach past `end`: there the cache holds anything.
struct Piece {
  int kv_head;
  int64_t begin, end;  // positions; begin is a multiple of kStep
  int steps;           // 0: no piece at all
  const char* keys[kSteps];
  const char* values[kSteps];
  const float* key_scales[kSteps];  // of codes
  const float* value_scales[kSteps];
};

// The running softmax of some queries, a group's heads after another's, row by row. Space for whole vectors of queries.
struct States {
  float* maxima;
  float* sums;
  float* values;  // (queries, padded_dim), not yet divided by the sums
};

struct Layout {
  const Stage& stage;
  const Attention& attention;
  const Cache& cache;
  CacheLayout blocks;
  int group;
  int64_t padded_dim;

  explicit Layout(const Stage& s)
      : stage(s),
        attention(*s.attention),
        cache(*s.cache),
        blocks(attention, cache),
        group(attention.heads_per_kv()),
        padded_dim((attention.head_dim + kLanes - 1) / kLanes * kLanes) {}

  int64_t count_queries(const Task& task) const { return (task.end - task.begin) * group; }
  const float* query(const Task& task, int kv_head, int64_t index) const {
    const int64_t row = task.begin + index / group, head = kv_head * group + index % group;
    return (const float*)stage.input + row * stage.input_stride + head * attention.head_dim;
  }
  float* output(const Task& task, int kv_head, int64_t index) const {
    const int64_t row = task.begin + index / group, head = kv_head * group + index % group;
    return stage.output + row * stage.output_stride + (int64_t)head * attention.head_dim;
  }
  int64_t last_position(int64_t row) const { return stage.step->positions[row]; }
  int64_t first_position(int64_t row) const {
    const int64_t first = last_position(row) + 1 - attention.window;
    return attention.window > 0 && first > 0 ? first : 0;
  }
  int64_t head_start(int chunk, int64_t position, int kv_head) const {
    const int32_t* table = stage.step->block_tables + (int64_t)chunk * stage.step->max_blocks;
    return blocks.head_start(table[position / blocks.block_size], kv_head);
  }
};

inline Piece make_piece(const Layout& layout, const Task& task, int kv_head, int part) {
  const CacheLayout& blocks = layout.blocks;
  const int64_t seen = layout.first_position(task.begin) / kStep * kStep, last = layout.last_position(task.end - 1) + 1;
  const int64_t start = (int64_t)part * kPart;
  Piece piece = {kv_head, seen > start ? seen : start, last < start + kPart ? last : start + kPart, 0, {}, {}, {}, {}};
  piece.steps = (int)((piece.end - piece.begin + kStep - 1) / kStep);
  if (!blocks.has_whole_steps()) return piece;
  for (int s = 0; s < piece.steps; ++s) {
    const int64_t position = piece.begin + s * kStep, at = position % blocks.block_size;
    const int64_t start_of_head = layout.head_start(task.chunk, position, kv_head);
    piece.keys[s] = (const char*)layout.cache.keys + start_of_head + blocks.key_offset(at) * blocks.element;
    piece.values[s] = (const char*)layout.cache.values + start_of_head + blocks.value_offset(at) * blocks.element;
    if (layout.cache.type != kCodes) continue;
    piece.key_scales[s] = (const float*)((const char*)layout.cache.key_scales + start_of_head) + at;
    piece.value_scales[s] = (const float*)((const char*)layout.cache.value_scales + start_of_head) + at;
  }
  return piece;
}

// Which piece a task comes to after this part of this kv head.
inline Piece next_piece(const Layout& layout, const Task& task, int kv_head, int part) {
  if (part + 1 < task.part_end) return make_piece(layout, task, kv_head, part + 1);
  if (kv_head + 1 < task.kv_end) return make_piece(layout, task, kv_head + 1, task.part);
  return Piece{};
}

// A block table leads anywhere, which no hardware foresees, so the kernels fetch ahead: a part's values while they
// score its keys, and the keys of the next part while they add up the values. Into the second level of the cache, which
// has more requests under way: 20 GB/s against 16 over blocks of 2 KiB on two cores.

QSERVE_INLINE void fetch_keys(const CacheLayout& blocks, const Piece& piece, int step) {
  if (step >= piece.steps || piece.keys[step] == nullptr) return;
  const int64_t stride = blocks.key_stride() * blocks.element;
  for (int64_t row = 0; row < blocks.key_rows(); ++row) __builtin_prefetch(piece.keys[step] + row * stride, 0, kSecondLevel);
  if (piece.key_scales[step] != nullptr) __builtin_prefetch(piece.key_scales[step], 0, kSecondLevel);
}

QSERVE_INLINE void fetch_values(const CacheLayout& blocks, const Piece& piece, int step) {
  if (piece.values[step] == nullptr) return;
  const int64_t bytes = kStep * blocks.head_dim * blocks.element;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(piece.values[step] + at, 0, kSecondLevel);
  if (piece.value_scales[step] != nullptr) __builtin_prefetch(piece.value_scales[step], 0, kSecondLevel);
}

inline States take_states(Scratch& scratch, int64_t count, int64_t padded_dim) {
  const int64_t whole = (count + kQueries - 1) / kQueries * kQueries;
  return {scratch.take<float>(whole), scratch.take<float>(whole), scratch.take<float>(whole * padded_dim)};
}

inline States states_from(const States& states, int64_t first, int64_t padded_dim) {
  return {states.maxima + first, states.sums + first, states.values + first * padded_dim};
}

void clear(const States& states, int64_t count, int64_t padded_dim);
// Takes later positions into a total. Where one of the two has seen nothing, the other comes out as it was.
void merge(const States& total, const States& part, int64_t count, int64_t padded_dim);
void finish(const Layout& layout, const Task& task, int kv_head, const States& states);

// From a product of query and key to the exponent of its weight: a factor that the query takes with it, then the cap.
struct Scale {
  float factor, cap;

  explicit Scale(const Attention& a)
      : factor(a.soft_cap == 0.0f ? a.scale * kLog2E : a.scale / a.soft_cap), cap(a.soft_cap * kLog2E) {}
};

// The positions [first, last] that a query sees, from a piece's begin on.
struct Span {
  int first = 0, last = 0;

  Span() = default;
  Span(const Layout& layout, const Task& task, const Piece& piece, int64_t query) {
    const int64_t row = task.begin + (int32_t)query / layout.group;
    first = (int)clamp(layout.first_position(row) - piece.begin);
    last = (int)clamp(layout.last_position(row) - piece.begin);
  }
  static int64_t clamp(int64_t place) { return place < -1 ? -1 : place > kPart ? kPart : place; }
  bool covers(int step) const { return first <= step * kStep && last >= step * kStep + kStep - 1; }
  QSERVE_INLINE F32 hide(F32 x, int step) const {
    constexpr I32 kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I32 place = kNumbers + splat((int32_t)(step * kStep));
    return (place >= splat((int32_t)first)) & (place <= splat((int32_t)last)) ? x : splat(kNothing);
  }
};

// Caps and hides the scores of a query; returns their maximum. Steps are made even by one that nobody sees.
QSERVE_INLINE float limit(const Scale& scale, const Span& span, float* scores, int steps) {
  const bool is_plain = scale.cap == 0.0f && span.covers(0) && span.covers(steps - 1);
  for (int s = 0; s < steps && !is_plain; ++s) {
    F32 x = load<F32>(scores + s * kStep);
    if (scale.cap != 0.0f) x = tanh_lanes(x) * splat(scale.cap);
    store(scores + s * kStep, span.covers(s) ? x : span.hide(x, s));
  }
  if (steps % 2 == 1) store(scores + steps * kStep, splat(kNothing));
  F32 most = splat(kNothing);
  for (int s = 0; s < steps; ++s) most = largest(most, load<F32>(scores + s * kStep));
  return max_lanes(most);
}

constexpr int kTogether = 4;  // queries whose softmax is computed at once

// Turns the scores of Count queries, kPart apart, into weights, two steps at a time: put(query, step, weights, weights of
// the next step). Several at once, for each waits long for its own maximum and sum.
template <int Count, class Put>
QSERVE_INLINE void weigh(const Scale& scale, const Span* spans, float* scores, int steps, const States& states,
                         const Put& put) {
  F32 shifts[Count], sums[Count] = {};
  for (int q = 0; q < Count; ++q) {
    const float maximum = limit(scale, spans[q], scores + q * kPart, steps);
    states.maxima[q] = maximum;
    shifts[q] = splat(maximum == kNothing ? 0.0f : maximum);  // so that nothing seen weighs nothing
  }
  for (int s = 0; s < steps; s += 2)
    for (int q = 0; q < Count; ++q) {
      const float* two = scores + q * kPart + s * kStep;
      const F32 first = power_of_two(load<F32>(two) - shifts[q]);
      const F32 second = power_of_two(load<F32>(two + kStep) - shifts[q]);
      sums[q] += first;
      sums[q] += second;
      put(q, s, first, second);
    }
  for (int q = 0; q < Count; ++q) states.sums[q] = sum_lanes(sums[q]);
}

// One task, by a kernel: Kernel(layout, task, scratch); start(kv_head) reads its queries; prepare(piece) may put better
// addresses into a piece; attend(piece, first, count, next, states) fills the states of up to kQueries queries from
// `first`, and fetches what `next` begins with.
template <class Kernel>
void attend_task(const Layout& layout, const Task& task, const States& partials) {
  Scratch& scratch = thread_scratch();
  scratch.reset();
  const int64_t count = layout.count_queries(task), padded_count = (count + kQueries - 1) / kQueries * kQueries;
  const bool is_whole = task.slot < 0;
  const States own = take_states(scratch, is_whole ? count : 0, layout.padded_dim);
  const States part = take_states(scratch, kQueries, layout.padded_dim);
  Piece piece = make_piece(layout, task, task.kv_head, task.part);
  for (int s = 0; s < piece.steps; ++s) fetch_keys(layout.blocks, piece, s);
  Kernel kernel(layout, task, scratch);
  for (int kv_head = task.kv_head; kv_head < task.kv_end; ++kv_head) {
    const States total =
        is_whole ? own : states_from(partials, task.slot + kv_head * padded_count, layout.padded_dim);
    clear(total, count, layout.padded_dim);
    kernel.start(kv_head);
    for (int p = task.part; p < task.part_end; ++p) {
      const Piece next = next_piece(layout, task, kv_head, p);
      kernel.prepare(piece);
      for (int64_t first = 0; first < count; first += kQueries) {
        const int64_t some = count - first < kQueries ? count - first : kQueries;
        kernel.attend(piece, first, some, first + some < count ? Piece{} : next, part);
        merge(states_from(total, first, layout.padded_dim), part, some, layout.padded_dim);
      }
      piece = next;
    }
    if (is_whole) finish(layout, task, kv_head, total);
  }
}

using Attend = void(const Layout& layout, const Task& task, const States& partials);
Attend attend_lanes, attend_tiles;            // over floats; tiles where blocks.is_tiles
Attend attend_code_lanes, attend_code_tiles;  // over int8

}  // namespace qserve
