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

Team::Team(int num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { serve(); });
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
  const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> (2 * kFieldBits)) + 1;
  ticket_.store(generation << (2 * kFieldBits) | (uint64_t)num_tasks << kFieldBits, std::memory_order_release);
  while (work()) {
  }
  for (int round = 0; done_.load(std::memory_order_acquire) < num_tasks; ++round) pause_briefly(round);
}

// Takes one task and does it; false when none is left.
bool Team::work() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if ((ticket & kMaxTasks) >= (ticket >> kFieldBits & kMaxTasks)) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
  call_.load(std::memory_order_relaxed)(body_.load(std::memory_order_relaxed), (int64_t)(ticket & kMaxTasks));
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void Team::serve() {
  auto idle_since = std::chrono::steady_clock::now();
  for (int round = 0; !is_closing_.load(std::memory_order_relaxed); ++round) {
    if (work()) {
      round = 0;
    } else if (is_active_.load(std::memory_order_relaxed)) {
      idle_since = std::chrono::steady_clock::now();
      for (int spin = 0; spin < 64; ++spin) {
        if (work()) break;
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
