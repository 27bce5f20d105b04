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
#include <algorithm>
#include <type_traits>
#include <utility>
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
  const float* query(const Task& task, int kv_head, int index) const {
    return (const float*)stage.input + place(task, kv_head, index, stage.input_stride);
  }
  float* output(const Task& task, int kv_head, int index) const {
    return stage.output + place(task, kv_head, index, stage.output_stride);
  }
  int64_t place(const Task& task, int kv_head, int index, int64_t stride) const {
    const int64_t head = kv_head * group + index % group;
    return (task.begin + index / group) * stride + head * attention.head_dim;
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

// A block's heads stand one behind the other.
inline Piece next_head(const Layout& layout, Piece piece) {
  ++piece.kv_head;
  const int64_t bytes = layout.blocks.head_bytes;
  if (!layout.blocks.has_whole_steps()) return piece;
  for (int s = 0; s < piece.steps; ++s) piece.keys[s] += bytes, piece.values[s] += bytes;
  if (layout.cache.type != kCodes) return piece;
  for (int s = 0; s < piece.steps; ++s) {
    piece.key_scales[s] += bytes / (int64_t)sizeof(float);
    piece.value_scales[s] += bytes / (int64_t)sizeof(float);
  }
  return piece;
}

// Kv heads [begin, end) whose queries are computed together: as many as a tile has rows for.
struct Heads {
  int begin, end;
  int count() const { return end - begin; }
};

// Where a thread is among its tasks.
struct Place {
  const Task* task;
  Heads heads;
  int part;
};

// The same part of the context for each of some heads.
struct HeadPieces {
  int count = 0;
  Piece of[kQueries];

  void set(const Layout& layout, const Place& place) {
    count = place.heads.count();
    if (count > 0) of[0] = make_piece(layout, *place.task, place.heads.begin, place.part);
    for (int h = 1; h < count; ++h) of[h] = next_head(layout, of[h - 1]);
  }
  int steps() const { return count > 0 ? of[0].steps : 0; }
};

// Fetches what a kernel comes to: a block table leads anywhere, which no hardware foresees. Memory is the limit of single
// rows, and is to have requests all the time: with each step that a kernel reads about one is fetched that it comes to some
// steps later, and a quarter with what it does in between. Into the second level of the cache, which has more requests
// under way.
class Fetcher {
 public:
  explicit Fetcher(const CacheLayout& blocks)
      : key_line_(kLine * blocks.block_size / kStep),
        lines_(kStep * blocks.head_dim * blocks.element / kLine / kQuarters) {}

  // A kernel comes to the keys of all heads, then to their values, then to the next keys.
  void set(const HeadPieces& now, const HeadPieces& next) {
    fetched_ = std::max<int64_t>(fetched_ - kQuarters * own_, 0), reached_ = 0, count_ = 0;
    add(now, true, kMostRuns);
    add(now, false, kMostRuns);
    own_ = count_;
    add(next, true, own_ + kAhead);
    if (fetched_ == 0) fetch(kQuarters * kAhead);
  }

  // The kernel comes to the keys, or the values, of its next step.
  void step() {
    const bool is_near = fetched_ < kQuarters * (++reached_ + kNear);
    fetch(is_near ? kQuarters : kQuarters - 1);
  }
  void steps(int count) {
    for (; count > 0; --count) step();
  }
  // It computes, and reads nothing.
  void idle() { fetch(1); }

 private:
  static constexpr int64_t kLine = 64, kQuarters = 4;
  static constexpr int64_t kNear = 4, kAhead = 8;  // runs; measured
  static constexpr int64_t kMostRuns = 2 * kQueries * kSteps;

  // The keys, or the values, of a step.
  struct Run {
    const char* begin;
    int64_t stride;  // from line to line
    const float* scales[2];
  };

  // Of pieces whose steps do not stand in one block each there is nothing to fetch.
  void add(const HeadPieces& pieces, bool are_keys, int64_t most) {
    for (int h = 0; h < pieces.count; ++h)
      for (int s = 0; s < pieces.steps() && count_ < most; ++s) {
        const Piece& piece = pieces.of[h];
        if (piece.keys[s] == nullptr) return;
        if (are_keys) runs_[count_++] = {piece.keys[s], key_line_, {piece.key_scales[s], piece.value_scales[s]}};
        if (!are_keys) runs_[count_++] = {piece.values[s], kLine, {}};
      }
  }

  QSERVE_INLINE void fetch(int64_t quarters) {
    for (; quarters > 0 && fetched_ < kQuarters * count_; --quarters, ++fetched_) {
      const Run& run = runs_[fetched_ / kQuarters];
      const char* at = run.begin + fetched_ % kQuarters * lines_ * run.stride;
      for (int64_t i = 0; i < lines_; ++i, at += run.stride) __builtin_prefetch(at, 0, kSecondLevel);
      if (fetched_ % kQuarters > 0 || run.scales[0] == nullptr) continue;
      for (const float* scales : run.scales) __builtin_prefetch(scales, 0, kSecondLevel);
    }
  }

  int64_t key_line_;                   // from one to the next, bytes
  int64_t lines_;                      // of a quarter
  int64_t own_ = 0, count_ = 0;        // runs: without the next keys, and all
  int64_t fetched_ = 0, reached_ = 0;  // quarters; runs
  Run runs_[kMostRuns + kAhead];
};

inline States take_states(Scratch& scratch, int64_t count, int64_t padded_dim) {
  const int64_t whole = (count + kQueries - 1) / kQueries * kQueries;
  return {scratch.take<float>(whole), scratch.take<float>(whole), scratch.take<float>(whole * padded_dim)};
}

inline States states_from(const States& states, int64_t first, int64_t padded_dim) {
  return {states.maxima + first, states.sums + first, states.values + first * padded_dim};
}

// Takes later positions into a total. Where one of the two has seen nothing, the other comes out as it was.
void merge(const States& total, const States& part, int64_t count, int64_t padded_dim);
void finish(const Layout& layout, const Task& task, int kv_head, const States& states);
// What a task knows of a kv head, to where it goes: partial results, or rows.
void put_states(const Layout& layout, const Task& task, int kv_head, const States& states, const States& partials);

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

// A thread's way through some tasks, by a kernel: Kernel(layout, task, scratch); start(heads) reads their queries;
// attend(pieces, first, count, fetcher, states) fills the states of up to kQueries queries from `first`, those of one head,
// or all those of some heads. Who is given a fetcher reads the pieces first; others find them in the caches.
template <class Kernel>
class Walk {
 public:
  Walk(const Layout& layout, const Task* end, const States& partials)
      : layout_(layout), end_(end), partials_(partials), fetcher_(layout.blocks) {}

  void go(const Task* begin) {
    Place place = start_of(begin, begin->kv_head);
    pieces_->set(layout_, place);
    while (place.task < end_) place = attend_task(place);
  }

 private:
  Place start_of(const Task* task, int kv_head) const {
    const int count = (int)layout_.count_queries(*task);
    const int together = Kernel::kIsForManyHeads ? std::max(kQueries / count, 1) : 1;
    return {task, {kv_head, std::min(kv_head + together, task->kv_end)}, task->part};
  }

  Place after(const Place& place) const {
    const Task* task = place.task;
    if (place.part + 1 < task->part_end) return {task, place.heads, place.part + 1};
    if (place.heads.end < task->kv_end) return start_of(task, place.heads.end);
    return task + 1 < end_ ? start_of(task + 1, task[1].kv_head) : Place{end_, {0, 0}, 0};
  }

  Place attend_task(Place place) {
    const Task* task = place.task;
    Scratch& scratch = thread_scratch();
    scratch.reset();
    total_ = take_states(scratch, layout_.count_queries(*task), layout_.padded_dim);
    part_ = take_states(scratch, kQueries, layout_.padded_dim);
    Kernel kernel(layout_, *task, scratch);
    while (place.task == task) place = attend_heads(kernel, place);
    return place;
  }

  Place attend_heads(Kernel& kernel, Place place) {
    const Task& task = *place.task;
    const Heads heads = place.heads;
    const int64_t count = layout_.count_queries(task);
    kernel.start(heads);
    for (int part = task.part; part < task.part_end; ++part) place = attend_part(kernel, place, count * heads.count());
    for (int h = 0; h < heads.count(); ++h)
      put_states(layout_, task, heads.begin + h, states_from(total_, h * count, layout_.padded_dim), partials_);
    return place;
  }

  Place attend_part(Kernel& kernel, const Place& place, int64_t count) {
    const Place next = after(place);
    next_->set(layout_, next);
    fetcher_.set(*pieces_, *next_);
    const bool is_first = place.part == place.task->part;
    for (int64_t first = 0; first < count; first += kQueries) {
      const int64_t some = std::min<int64_t>(count - first, kQueries);
      const States total = states_from(total_, first, layout_.padded_dim);
      kernel.attend(*pieces_, first, some, first == 0 ? &fetcher_ : nullptr, is_first ? total : part_);
      if (!is_first) merge(total, part_, some, layout_.padded_dim);
    }
    std::swap(pieces_, next_);
    return next;
  }

  const Layout& layout_;
  const Task* end_;
  const States& partials_;
  Fetcher fetcher_;
  HeadPieces buffers_[2], *pieces_ = buffers_, *next_ = buffers_ + 1;
  States total_ = {}, part_ = {};
};

using Attend = void(const Layout& layout, const Task* begin, const Task* end, const States& partials);
Attend attend_lanes, attend_tiles;            // over floats; tiles where blocks.is_tiles
Attend attend_code_lanes, attend_code_tiles;  // over int8

}  // namespace qserve
