// A team of threads that shares out the tasks of one parallel loop after another, with no other synchronization.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace qserve {

class Team {
 public:
  explicit Team(int num_threads);
  ~Team();

  int size() const { return (int)ranges_.size(); }

  // Threads spin between begin and end, and sleep soon after end.
  void begin();
  void end();

  // body(task) for every task < num_tasks, in any order, on any thread of the team; returns when all are done. Every
  // thread begins with its own equal share of neighbours, the same in every loop of so many tasks.
  template <class Body>
  void run(int64_t num_tasks, const Body& body) {
    if (workers_.empty() || num_tasks <= 1) {
      for (int64_t task = 0; task < num_tasks; ++task) body(task);
      return;
    }
    for (int64_t first = 0; first < num_tasks; first += kMaxTasks) {
      const auto shifted = [&body, first](int64_t task) { body(first + task); };
      const int64_t rest = num_tasks - first;
      share(rest < kMaxTasks ? rest : kMaxTasks, call<decltype(shifted)>, &shifted);
    }
  }

 private:
  using Call = void (*)(const void*, int64_t);
  static constexpr int kFieldBits = 20;
  static constexpr int64_t kMaxTasks = (1 << kFieldBits) - 1;

  // A thread's own tasks of a loop, one after the other: it takes them from the front, and who is done with his from
  // the back. So threads read the same part of the data in loop after loop, and end together.
  //     generation : 24 | end : 20 | next : 20
  // A task is taken by compare-and-swap of the whole word, so a late thread can never take one of the wrong loop; and
  // while a taken task runs, the loop is not over, so call_ and body_ stand. A thread that the system has taken off
  // its core holds nothing up unless it was inside a task.
  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};
    int64_t take_first();
    int64_t take_last();
  };

  template <class Body>
  static void call(const void* body, int64_t task) {
    (*(const Body*)body)(task);
  }

  void share(int64_t num_tasks, Call call, const void* body);
  void do_task(int64_t task);
  int64_t work_alone(Range& range);
  int64_t help_others(int self);
  bool work(int self);
  void serve(int self);
  void sleep();

  std::vector<Range> ranges_;
  uint64_t generation_ = 0;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<Call> call_{nullptr};
  std::atomic<const void*> body_{nullptr};
  alignas(64) std::atomic<bool> is_active_{false};
  std::atomic<bool> is_closing_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

inline int64_t share_out(int64_t count, int64_t among) { return (count + among - 1) / among; }

// The range [begin, end) of each task, when `total` things are cut into pieces of `size`.
struct Pieces {
  int64_t total, size;
  int64_t count() const { return share_out(total, size); }
  int64_t begin(int64_t piece) const { return piece * size; }
  int64_t end(int64_t piece) const { return begin(piece + 1) < total ? begin(piece + 1) : total; }
};

// Rows of a stage that are many are cut alike in stage after stage, whole tiles of AMX each: then a thread mostly finds
// what it wrote itself, in its own cache.
inline int64_t count_share(int64_t num_rows, const Team& team) { return share_out(num_rows, team.size()); }

inline bool are_many(int64_t num_rows, const Team& team) { return count_share(num_rows, team) >= 32; }

inline Pieces share_rows(int64_t num_rows, const Team& team) {
  constexpr int64_t kMost = 256, kMultiple = 16;
  const int64_t share = count_share(num_rows, team), pieces = (share + kMost - 1) / kMost;
  return {num_rows, ((share + pieces - 1) / pieces + kMultiple - 1) / kMultiple * kMultiple};
}

}  // namespace qserve
