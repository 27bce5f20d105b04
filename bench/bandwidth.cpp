// Reads memory as fast as this machine's cores can, and does next to nothing with it.
#include <cstdint>
#include <thread>
#include <vector>

// `ahead`: how many bytes before their use lines are fetched; 0 leaves that to the processor.
static uint64_t read_part(const uint64_t* words, int64_t count, int64_t ahead) {
  uint64_t sums[32] = {};  // independent sums, so that no addition waits for another
  for (int64_t i = 0; i + 32 <= count; i += 32) {
    if (ahead > 0)
      for (int64_t line = 0; line < 256; line += 64) __builtin_prefetch((const char*)(words + i) + ahead + line);
    for (int lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

extern "C" uint64_t read_all(const uint64_t* words, int64_t count, int num_threads, int num_passes, int64_t ahead) {
  std::vector<uint64_t> totals(num_threads);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t)
    threads.emplace_back([=, &totals] {
      const int64_t start = count * t / num_threads, end = count * (t + 1) / num_threads;
      for (int pass = 0; pass < num_passes; ++pass) totals[t] += read_part(words + start, end - start, ahead);
    });
  for (std::thread& thread : threads) thread.join();
  uint64_t total = 0;
  for (uint64_t part : totals) total += part;
  return total;
}
