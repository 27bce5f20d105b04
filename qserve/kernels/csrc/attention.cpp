// Attention of mixed rows, prompts and single tokens, each over the blocks of its own chunk.
//
// A row's context is cut at fixed positions, whatever chunk or batch it comes in:
//
//     position  0        16        32   ...  128       144  ...  256
//               | step    | step    |        | step     |        |
//               |------------ part 0 --------|------- part 1 ----|
//
// Inside a part the softmax runs step by step (running maximum, sum, weighted values); parts are merged in ascending
// order. So one thread over all parts and many threads over one each have the same bits, and so has any chunking:
// a position that a row may not see adds exact zeros.
#include "attention.h"

#include <vector>

namespace qserve {
namespace {

constexpr int kStep = kLanes, kPart = 128;
constexpr float kNothing = -1e30f;  // a maximum over no position
constexpr int kMaxHeads = 4;        // query heads computed together: as many as registers hold

// The running softmax of one query head. `values` are head_dim floats, padded to whole vectors.
struct State {
  float maximum;
  F32 sums;
  float* values;
};

// Query rows [begin, end) of one chunk that one task attends, over parts [part, part_end).
struct Item {
  int chunk;
  int64_t begin, end;
  int part, part_end;
  int slot;  // of the partial results, or -1: the item is the whole of its rows' context
};

struct Layout {
  const Stage& stage;
  const Attention& attention;
  const Cache& cache;
  int64_t padded_dim;

  explicit Layout(const Stage& s)
      : stage(s), attention(*s.attention), cache(*s.cache), padded_dim((attention.head_dim + 15) / 16 * 16) {}

  const float* query(int64_t row, int head) const {
    return (const float*)stage.input + row * attention.row_size() + (int64_t)head * attention.head_dim;
  }
  float* output(int64_t row, int head) const {
    return stage.output + (row * attention.num_heads + head) * (int64_t)attention.head_dim;
  }
  int64_t first_position(int64_t row) const {
    const int64_t first = stage.step->positions[row] + 1 - attention.window;
    return attention.window > 0 && first > 0 ? first : 0;
  }
  // Of the first element of a block's keys or values, for one head.
  int64_t block_start(int chunk, int64_t position, int kv_head) const {
    const int64_t block = stage.step->block_tables[(int64_t)chunk * stage.step->max_blocks + position / cache.block_size];
    return (block * attention.num_kv_heads + kv_head) * cache.block_size * attention.head_dim;
  }
};

template <int Type>
QSERVE_INLINE float load_one(const void* from, int64_t index) {
  if constexpr (Type == kF32) return ((const float*)from)[index];
  const uint32_t bits = (uint32_t)((const uint16_t*)from)[index] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Scores of Heads query heads against 16 positions: keys are (head_dim, stride) with a position a column.
template <int Type, int Heads>
QSERVE_INLINE void score(const float* const* queries, const void* keys, int64_t start, int64_t stride, int head_dim,
                         F32* scores) {
  F32 even[Heads] = {}, odd[Heads] = {};
  for (int d = 0; d < head_dim; d += 2) {
    const F32 first = load_float<Type>(keys, start + d * stride), second = load_float<Type>(keys, start + (d + 1) * stride);
    for (int h = 0; h < Heads; ++h) {
      even[h] = fused(splat(queries[h][d]), first, even[h]);
      odd[h] = fused(splat(queries[h][d + 1]), second, odd[h]);
    }
  }
  for (int h = 0; h < Heads; ++h) scores[h] = even[h] + odd[h];
}

// values[h] += sum over j < count, ascending, of weights[h][j] * V[j], four vectors of columns at a time.
template <int Type, int Heads>
QSERVE_INLINE void mix(const void* from, const int64_t* rows, const float (*weights)[kStep], int count, int head_dim,
                       State* states) {
  for (int column = 0; column < head_dim; column += 4 * kLanes) {
    const int vectors = head_dim - column < 4 * kLanes ? (head_dim - column + kLanes - 1) / kLanes : 4;
    const auto run = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      F32 sums[Heads][kWidth];
      for (int h = 0; h < Heads; ++h)
        for (int v = 0; v < kWidth; ++v) sums[h][v] = load<F32>(states[h].values + column + v * kLanes);
      for (int j = 0; j < count; ++j)
        for (int v = 0; v < kWidth; ++v) {
          const F32 value = load_float<Type>(from, rows[j] + column + v * kLanes);
          for (int h = 0; h < Heads; ++h) sums[h][v] = fused(splat(weights[h][j]), value, sums[h][v]);
        }
      for (int h = 0; h < Heads; ++h)
        for (int v = 0; v < kWidth; ++v) store(states[h].values + column + v * kLanes, sums[h][v]);
    };
    if (vectors == 4) run(std::integral_constant<int, 4>());
    if (vectors == 3) run(std::integral_constant<int, 3>());
    if (vectors == 2) run(std::integral_constant<int, 2>());
    if (vectors == 1) run(std::integral_constant<int, 1>());
  }
}

QSERVE_INLINE F32 lane_numbers() { return F32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Takes 16 scores into a running softmax; their weights go to `weights`. [first, last] are the lanes that the row sees.
QSERVE_INLINE void take_scores(const Attention& a, F32 scores, int64_t first, int64_t last, int64_t padded_dim,
                               State& state, float* weights) {
  scores *= splat(a.scale);
  if (a.soft_cap != 0.0f) scores = tanh_lanes(scores / splat(a.soft_cap)) * splat(a.soft_cap);
  const F32 lane = lane_numbers();
  const I32 is_seen = (lane >= splat((float)first)) & (lane <= splat((float)last));
  scores = is_seen ? scores : splat(kNothing);
  const float maximum = max_lanes(scores);
  if (maximum > state.maximum) {
    const F32 factor = exponential(splat(state.maximum - maximum));
    state.maximum = maximum;
    state.sums *= factor;
    for (int64_t i = 0; i < padded_dim; i += kLanes) store(state.values + i, load<F32>(state.values + i) * factor);
  }
  const F32 weight = is_seen ? exponential(scores - splat(state.maximum)) : F32{};
  state.sums += weight;
  store(weights, weight);
}

QSERVE_INLINE int64_t clamp_lane(int64_t position, int64_t base) {
  const int64_t lane = position - base;
  return lane < -1 ? -1 : lane > kStep ? kStep : lane;
}

// The query heads of an item that share one kv head, and the state of each.
struct Heads {
  std::vector<const float*> queries;
  std::vector<int64_t> rows;
  std::vector<State> states;
};

// Keys of 16 positions as (head_dim, 16) floats, where blocks are no multiple of 16 long.
template <int Type>
void collect_keys(const Layout& layout, const Item& item, int kv_head, int64_t base, int count, float* to) {
  const int64_t size = layout.cache.block_size;
  for (int j = 0; j < count; ++j) {
    const int64_t start = layout.block_start(item.chunk, base + j, kv_head) + (base + j) % size;
    for (int64_t d = 0; d < layout.attention.head_dim; ++d) {
      to[d * kStep + j] = load_one<Type>(layout.cache.keys, start + d * size);
    }
  }
}

template <int Type, int Count>
void score_step(const Layout& layout, const Item& item, int kv_head, int64_t base, int count, const float* const* queries,
                F32* scores) {
  const int64_t size = layout.cache.block_size;
  const int head_dim = layout.attention.head_dim;
  if (size % kStep == 0) {
    const int64_t start = layout.block_start(item.chunk, base, kv_head) + base % size;
    return score<Type, Count>(queries, layout.cache.keys, start, size, head_dim, scores);
  }
  std::vector<float> keys((size_t)head_dim * kStep);
  collect_keys<Type>(layout, item, kv_head, base, count, keys.data());
  score<kF32, Count>(queries, keys.data(), 0, kStep, head_dim, scores);
}

template <int Type, int Count>
void take_step(const Layout& layout, const Item& item, int kv_head, int64_t base, int64_t end, Heads& heads, int first) {
  const Attention& a = layout.attention;
  const int count = (int)(end - base < kStep ? end - base : kStep);
  F32 scores[Count];
  float weights[Count][kStep];
  score_step<Type, Count>(layout, item, kv_head, base, count, &heads.queries[first], scores);
  for (int h = 0; h < Count; ++h) {
    const int64_t row = heads.rows[first + h];
    take_scores(a, scores[h], clamp_lane(layout.first_position(row), base),
                clamp_lane(layout.stage.step->positions[row], base), layout.padded_dim, heads.states[first + h], weights[h]);
  }
  int64_t rows[kStep];
  for (int j = 0; j < count; ++j)
    rows[j] = layout.block_start(item.chunk, base + j, kv_head) + (base + j) % layout.cache.block_size * a.head_dim;
  mix<Type, Count>(layout.cache.values, rows, weights, count, a.head_dim, &heads.states[first]);
}

template <int Type>
void take_part(const Layout& layout, const Item& item, int kv_head, int part, Heads& heads) {
  const int64_t last = layout.stage.step->positions[item.end - 1] + 1;
  const int64_t seen = layout.first_position(item.begin) / kStep * kStep;
  const int64_t begin = seen > (int64_t)part * kPart ? seen : (int64_t)part * kPart;
  const int64_t end = last < (int64_t)(part + 1) * kPart ? last : (int64_t)(part + 1) * kPart;
  const int total = (int)heads.queries.size();
  for (int64_t base = begin; base < end; base += kStep) {
    int first = 0;
    for (; first + kMaxHeads <= total; first += kMaxHeads)
      take_step<Type, kMaxHeads>(layout, item, kv_head, base, last, heads, first);
    if (total - first == 3) take_step<Type, 3>(layout, item, kv_head, base, last, heads, first);
    if (total - first == 2) take_step<Type, 2>(layout, item, kv_head, base, last, heads, first);
    if (total - first == 1) take_step<Type, 1>(layout, item, kv_head, base, last, heads, first);
  }
}

void clear(State& state, int64_t padded_dim) {
  state.maximum = kNothing;
  state.sums = F32{};
  memset(state.values, 0, padded_dim * sizeof(float));
}

void merge(State& total, const State& part, int64_t padded_dim) {
  if (part.maximum == kNothing) return;
  const float maximum = total.maximum > part.maximum ? total.maximum : part.maximum;
  const F32 keep = exponential(splat(total.maximum - maximum)), add = exponential(splat(part.maximum - maximum));
  total.maximum = maximum;
  total.sums = total.sums * keep + part.sums * add;
  for (int64_t i = 0; i < padded_dim; i += kLanes)
    store(total.values + i, load<F32>(total.values + i) * keep + load<F32>(part.values + i) * add);
}

void finish(const State& state, float* output, int64_t head_dim) {
  const F32 factor = splat(1.0f / sum_lanes(state.sums));
  for (int64_t i = 0; i < head_dim; i += kLanes)
    store_some(output + i, load<F32>(state.values + i) * factor, (int)(head_dim - i));
}

// Partial results stand as (slot, num_heads, 1 + 16 + padded_dim) floats: maximum, sums, values.
struct Partials {
  float* data;
  int64_t size;
  float* at(int64_t slot, int num_heads, int head) const { return data + (slot * num_heads + head) * size; }
};

State state_at(float* partial) { return {partial[0], load<F32>(partial + 1), partial + 1 + kLanes}; }

Heads gather_heads(const Layout& layout, const Item& item, int kv_head, float* values) {
  Heads heads;
  const int group = layout.attention.heads_per_kv();
  for (int64_t row = item.begin; row < item.end; ++row)
    for (int h = 0; h < group; ++h, values += layout.padded_dim) {
      heads.queries.push_back(layout.query(row, kv_head * group + h));
      heads.rows.push_back(row);
      heads.states.push_back({kNothing, F32{}, values});
    }
  return heads;
}

void attend_item(const Layout& layout, const Item& item, int kv_head, const Partials& partials) {
  Scratch& scratch = thread_scratch();
  scratch.reset();
  const int group = layout.attention.heads_per_kv(), num_heads = layout.attention.num_heads;
  const int64_t floats = (item.end - item.begin) * group * layout.padded_dim;
  Heads heads = gather_heads(layout, item, kv_head, scratch.take<float>(floats));
  Heads totals = gather_heads(layout, item, kv_head, scratch.take<float>(floats));
  for (State& state : totals.states) clear(state, layout.padded_dim);
  const auto take = layout.cache.type == kF32 ? take_part<kF32> : take_part<kBF16>;
  for (int part = item.part; part < item.part_end; ++part) {
    for (State& state : heads.states) clear(state, layout.padded_dim);
    take(layout, item, kv_head, part, heads);
    for (size_t i = 0; i < heads.states.size(); ++i) merge(totals.states[i], heads.states[i], layout.padded_dim);
  }
  for (size_t i = 0; i < totals.states.size(); ++i) {
    const int head = kv_head * group + (int)i % group;
    if (item.slot < 0) {
      finish(totals.states[i], layout.output(totals.rows[i], head), layout.attention.head_dim);
      continue;
    }
    float* partial = partials.at(item.slot, num_heads, head);
    partial[0] = totals.states[i].maximum;
    store(partial + 1, totals.states[i].sums);
    memcpy(partial + 1 + kLanes, totals.states[i].values, layout.padded_dim * sizeof(float));
  }
}

// A single row's parts are shared out among tasks; the rows of a prompt go in blocks, each over all its parts.
void list_items(const Layout& layout, std::vector<Item>& items, std::vector<Item>& split) {
  const Step& step = *layout.stage.step;
  const int group = layout.attention.heads_per_kv();
  const int64_t block = group < 32 ? 32 / group : 1;
  int slot = 0;
  for (int chunk = 0; chunk < step.chunks; ++chunk) {
    const int64_t begin = step.query_starts[chunk], end = step.query_starts[chunk + 1];
    for (int64_t row = begin; row < end; row += block) {
      const int64_t stop = row + block < end ? row + block : end;
      const int first = (int)(layout.first_position(row) / kPart), last = (int)(step.positions[stop - 1] / kPart) + 1;
      if (end - begin > 1 || last - first == 1) {
        items.push_back({chunk, row, stop, first, last, -1});
        continue;
      }
      split.push_back({chunk, row, stop, first, last, slot});
      for (int part = first; part < last; ++part) items.push_back({chunk, row, stop, part, part + 1, slot++});
    }
  }
}

void merge_item(const Layout& layout, const Item& item, int head, const Partials& partials) {
  const int num_heads = layout.attention.num_heads;
  State total = state_at(partials.at(item.slot, num_heads, head));
  for (int part = 1; part < item.part_end - item.part; ++part)
    merge(total, state_at(partials.at(item.slot + part, num_heads, head)), layout.padded_dim);
  finish(total, layout.output(item.begin, head), layout.attention.head_dim);
}

}  // namespace

void run_attend(const Stage& stage, Scratch& scratch, Team& team) {
  const Layout layout(stage);
  std::vector<Item> items, split;
  list_items(layout, items, split);
  Partials partials = {nullptr, 1 + kLanes + layout.padded_dim};
  const int num_heads = layout.attention.num_heads, num_kv_heads = layout.attention.num_kv_heads;
  if (!split.empty()) partials.data = scratch.take<float>((int64_t)items.size() * num_heads * partials.size);
  team.run((int64_t)items.size() * num_kv_heads, [&](int64_t task) {  // the longest contexts of a prompt come last
    const int64_t item = (int64_t)items.size() - 1 - task / num_kv_heads;
    attend_item(layout, items[item], (int)(task % num_kv_heads), partials);
  });
  team.run((int64_t)split.size(), [&](int64_t task) {
    for (int head = 0; head < num_heads; ++head) merge_item(layout, split[task], head, partials);
  });
}

}  // namespace qserve
