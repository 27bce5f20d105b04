// Attention of mixed rows, prompts and single tokens, each over the blocks of its own chunk: what is shared out how.
#include "attention.h"

#include "attention_work.h"

namespace qserve {
namespace {

constexpr int64_t kTaskQueries = 64;    // rows times heads of a kv head: a part of the context is read once for them
constexpr int64_t kTasksPerThread = 8;  // so that threads end together

// The tasks of one stage, and the items that were split among several, whose results are merged afterwards.
struct Plan {
  std::vector<Task> tasks, split;
  int64_t slots = 0;
};

int64_t count_padded(const Layout& layout, const Task& task) {
  return (layout.count_queries(task) + kQueries - 1) / kQueries * kQueries;
}

// Blocks of rows that read the same keys, each over all its parts and heads.
std::vector<Task> list_items(const Layout& layout) {
  const Step& step = *layout.stage.step;
  const int64_t block = layout.group < kTaskQueries ? kTaskQueries / layout.group : 1;
  std::vector<Task> items;
  for (int chunk = 0; chunk < step.chunks; ++chunk) {
    const int64_t begin = step.query_starts[chunk], end = step.query_starts[chunk + 1];
    for (int64_t row = begin; row < end; row += block) {
      const int64_t stop = row + block < end ? row + block : end;
      const int first = (int)(layout.first_position(row) / kPart), last = (int)(layout.last_position(stop - 1) / kPart);
      items.push_back({chunk, row, stop, first, last + 1, 0, layout.attention.num_kv_heads, -1});
    }
  }
  return items;
}

void add_heads(Plan& plan, Task task, bool is_split) {
  if (!is_split) return plan.tasks.push_back(task);
  for (int kv_head = task.kv_head, end = task.kv_end; kv_head < end; ++kv_head) {
    task.kv_head = kv_head, task.kv_end = kv_head + 1;
    plan.tasks.push_back(task);
  }
}

void add_parts(Plan& plan, const Layout& layout, const Task& item, bool is_split) {
  const int64_t slots = count_padded(layout, item) * item.kv_end;
  plan.split.push_back(item);
  plan.split.back().slot = plan.slots;
  for (int part = item.part; part < item.part_end; ++part, plan.slots += slots) {
    Task task = item;
    task.part = part, task.part_end = part + 1, task.slot = plan.slots;
    add_heads(plan, task, is_split);
  }
}

// Few items are split by parts, and still few by heads; rows of a prompt always by heads, for they take long. In the
// order of their rows, so that a thread mostly reads what it wrote itself.
Plan make_plan(const Layout& layout, int64_t wanted) {
  const std::vector<Task> items = list_items(layout);
  int64_t parts = 0;
  for (const Task& item : items) parts += item.part_end - item.part;
  Plan plan;
  for (const Task& item : items) {
    const bool is_single = item.end - item.begin == 1;
    const int64_t heads = is_single ? 1 : item.kv_end;
    if ((int64_t)items.size() * heads >= wanted || item.part_end - item.part == 1)
      add_heads(plan, item, !is_single || (int64_t)items.size() < wanted);
    else
      add_parts(plan, layout, item, !is_single || parts < wanted);
  }
  return plan;
}

void merge_parts(const Layout& layout, const Task& item, int kv_head, const States& partials) {
  const int64_t padded = count_padded(layout, item), count = layout.count_queries(item);
  const auto at = [&](int64_t part) {
    return states_from(partials, item.slot + (part * item.kv_end + kv_head) * padded, layout.padded_dim);
  };
  for (int part = 1; part < item.part_end - item.part; ++part) merge(at(0), at(part), count, layout.padded_dim);
  finish(layout, item, kv_head, at(0));
}

}  // namespace

void merge(const States& total, const States& part, int64_t count, int64_t padded_dim) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const F32 old = load<F32>(total.maxima + first), added = load<F32>(part.maxima + first);
    const F32 maxima = largest(old, added), keep = power_of_two(old - maxima), add = power_of_two(added - maxima);
    store(total.maxima + first, maxima);
    store(total.sums + first, load<F32>(total.sums + first) * keep + load<F32>(part.sums + first) * add);
    for (int64_t i = 0; i < kLanes && first + i < count; ++i) {
      float *to = total.values + (first + i) * padded_dim, *from = part.values + (first + i) * padded_dim;
      for (int64_t d = 0; d < padded_dim; d += kLanes)
        store(to + d, load<F32>(to + d) * splat(keep[i]) + load<F32>(from + d) * splat(add[i]));
    }
  }
}

void finish(const Layout& layout, const Task& task, int kv_head, const States& states) {
  const int64_t head_dim = layout.attention.head_dim;
  for (int64_t i = 0; i < layout.count_queries(task); ++i) {
    const F32 factor = splat(1.0f / states.sums[i]);
    float* output = layout.output(task, kv_head, (int)i);
    for (int64_t d = 0; d < head_dim; d += kLanes)
      store_some(output + d, load<F32>(states.values + i * layout.padded_dim + d) * factor, (int)(head_dim - d));
  }
}

void put_states(const Layout& layout, const Task& task, int kv_head, const States& states, const States& partials) {
  if (task.slot < 0) return finish(layout, task, kv_head, states);
  const int64_t count = layout.count_queries(task), slot = task.slot + kv_head * count_padded(layout, task);
  const States to = states_from(partials, slot, layout.padded_dim);
  memcpy(to.maxima, states.maxima, count * sizeof(float));
  memcpy(to.sums, states.sums, count * sizeof(float));
  memcpy(to.values, states.values, count * layout.padded_dim * sizeof(float));
}

void run_attend(const Stage& stage, Scratch& scratch, Team& team) {
  const Layout layout(stage);
  const Plan plan = make_plan(layout, kTasksPerThread * team.size());
  const States partials = take_states(scratch, plan.slots, layout.padded_dim);
  const bool is_tiles = layout.blocks.is_tiles;
  const auto attend_floats = is_tiles ? attend_tiles : attend_lanes;
  const auto attend_codes = is_tiles ? attend_code_tiles : attend_code_lanes;
  const auto attend = layout.cache.type == kCodes ? attend_codes : attend_floats;
  // Neighbours together, for a thread fetches ahead from one to the next.
  const int64_t num_tasks = (int64_t)plan.tasks.size();
  const Pieces pieces = {num_tasks, share_out(num_tasks, kTasksPerThread * team.size())};
  team.run(pieces.count(), [&](int64_t piece) {
    attend(layout, &plan.tasks[pieces.begin(piece)], plan.tasks.data() + pieces.end(piece), partials);
  });
  const int num_kv_heads = layout.attention.num_kv_heads;
  team.run((int64_t)plan.split.size() * num_kv_heads, [&](int64_t task) {
    merge_parts(layout, plan.split[task / num_kv_heads], (int)(task % num_kv_heads), partials);
  });
}

}  // namespace qserve
