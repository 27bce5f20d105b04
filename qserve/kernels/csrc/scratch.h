// Memory that a stage needs only while it runs: taken piece by piece, given back at once, kept for the next stage.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace qserve {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (const Piece& piece : pieces_) free(piece.data);
  }

  // Uninitialized, 64-byte aligned, with a tile row to spare behind: kernels may read a little past the end.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = ((size_t)count * sizeof(T) + kSpare + 63) / 64 * 64;
    while (next_ < pieces_.size() && pieces_[next_].bytes < bytes) drop(next_);
    if (next_ == pieces_.size()) pieces_.push_back({allocate(bytes), bytes});
    return (T*)pieces_[next_++].data;
  }

  void reset() { next_ = 0; }

 private:
  struct Piece {
    void* data;
    size_t bytes;
  };
  static constexpr size_t kSpare = 4096;

  static void* allocate(size_t bytes) {
    void* data = aligned_alloc(64, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }

  void drop(size_t index) {
    free(pieces_[index].data);
    pieces_.erase(pieces_.begin() + (long)index);
  }

  std::vector<Piece> pieces_;
  size_t next_ = 0;
};

// One for each thread, for what a task needs.
inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace qserve
