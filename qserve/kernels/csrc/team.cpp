#include "team.h"

#include <sched.h>

#include <chrono>

namespace qserve {
namespace {

constexpr auto kSpinAfterEnd = std::chrono::microseconds(50);

void pause_briefly(int round) {
  if (round % 256 == 255) {
    sched_yield();  // lets whoever else needs this core have it
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Team::Team(int num_threads) : ranges_(num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Team::~Team() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closing_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Team::begin() {
  is_active_.store(true);
  if (sleepers_.load() == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  wake_.notify_all();
}

void Team::end() { is_active_.store(false); }

void Team::share(int64_t num_tasks, Call call, const void* body) {
  call_.store(call, std::memory_order_relaxed);
  body_.store(body, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  ++generation_;
  const auto first = [&](int thread) { return (uint64_t)(num_tasks * thread / size()); };
  for (int i = size() - 1; i >= 0; --i)  // our own last: others can begin
    ranges_[i].ticket.store(generation_ << (2 * kFieldBits) | first(i + 1) << kFieldBits | first(i),
                            std::memory_order_release);
  int64_t done = work_alone(ranges_[0]) + help_others(0);
  done += done_.fetch_add(done, std::memory_order_acq_rel);
  for (int round = 0; done < num_tasks; ++round) {
    pause_briefly(round);
    done = done_.load(std::memory_order_acquire);
  }
}

int64_t Team::Range::take_first() {
  uint64_t now = ticket.load(std::memory_order_acquire);
  do {
    if ((now & kMaxTasks) >= (now >> kFieldBits & kMaxTasks)) return -1;
  } while (!ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel));
  return (int64_t)(now & kMaxTasks);
}

int64_t Team::Range::take_last() {
  uint64_t now = ticket.load(std::memory_order_acquire);
  do {
    if ((now & kMaxTasks) >= (now >> kFieldBits & kMaxTasks)) return -1;
  } while (!ticket.compare_exchange_weak(now, now - (1 << kFieldBits), std::memory_order_acq_rel));
  return (int64_t)(now >> kFieldBits & kMaxTasks) - 1;
}

void Team::do_task(int64_t task) {
  call_.load(std::memory_order_relaxed)(body_.load(std::memory_order_relaxed), task);
}

// How many of its own tasks a thread did.
int64_t Team::work_alone(Range& range) {
  int64_t done = 0;
  for (int64_t task; (task = range.take_first()) >= 0; ++done) do_task(task);
  return done;
}

int64_t Team::help_others(int self) {
  int64_t done = 0;
  for (int i = 1; i < size(); ++i)
    for (int64_t task; (task = ranges_[(self + i) % size()].take_last()) >= 0; ++done) do_task(task);
  return done;
}

// False when there was nothing of its own: nobody looks for others' tasks while there is no loop.
bool Team::work(int self) {
  const int64_t own = work_alone(ranges_[self]);
  if (own == 0) return false;
  done_.fetch_add(own + help_others(self), std::memory_order_release);
  return true;
}

void Team::serve(int self) {
  auto idle_since = std::chrono::steady_clock::now();
  for (int round = 0; !is_closing_.load(std::memory_order_relaxed); ++round) {
    if (work(self)) {
      round = 0;
    } else if (is_active_.load(std::memory_order_relaxed)) {
      idle_since = std::chrono::steady_clock::now();
      for (int spin = 0; spin < 64; ++spin) {
        if (work(self)) break;
        pause_briefly(++round);
      }
    } else if (std::chrono::steady_clock::now() - idle_since > kSpinAfterEnd) {
      sleep();
      idle_since = std::chrono::steady_clock::now();
    } else {
      pause_briefly(round);
    }
  }
}

void Team::sleep() {
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, [this] { return is_active_.load() || is_closing_.load(); });
  sleepers_.fetch_sub(1);
}

}  // namespace qserve
