// Threads that share the chunks of one task after another, and the memory a task works in.
//
// Must not know: what a task computes. Whoever is running takes the next chunk, so a thread that the operating system
// keeps waiting holds up nothing but the chunk it is in; an idle thread spins for a bounded time and then sleeps.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace motet {

using Task = void (*)(void *context, int64_t chunk, int thread);

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  void run(int64_t chunks, Task task, void *context);

 private:
  void work(int thread);
  void serve(int thread);

  // Epoch of the task and its chunks that nobody took yet: one word, so that a late thread cannot take a chunk of
  // a task that is over.
  std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  Task task_ = nullptr;
  void *context_ = nullptr;
  int64_t chunks_ = 0;
  std::vector<std::thread> workers_;
};

// Memory that only grows; contents do not survive `reserve`.
class Buffer {
 public:
  ~Buffer();
  void *reserve(size_t bytes);
  void fill(int byte);

 private:
  void *memory_ = nullptr;
  size_t bytes_ = 0;
};

enum class Use { Hidden, Normed, Projected, Query, Attended, Activated, Shrunk, Segments, Scores, Sums, Widened, WidenedBeside, Count };

// One caller at a time; `lock` is for those who cannot know.
struct Engine {
  explicit Engine(int threads) : pool(threads) {}
  Pool pool;
  std::mutex lock;
  Buffer buffers[static_cast<int>(Use::Count)];
  template <class T>
  T *buffer(Use use, int64_t count) {
    return static_cast<T *>(buffers[static_cast<int>(use)].reserve(static_cast<size_t>(count) * sizeof(T)));
  }
};

}  // namespace motet
