#include "pool.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

namespace motet {
namespace {

constexpr uint64_t REMAINING = 0xffffffffu;
// A task follows the last one within a few microseconds; what waits longer is between two steps.
constexpr std::chrono::microseconds SPIN{50};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether the condition came true within the bounded time.
template <class Condition>
bool spin(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int i = 0; i < 32; i++) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
  stopping_ = true;
  signal_.fetch_add(1);
  signal_.notify_all();
  for (auto &worker : workers_) worker.join();
}

void Pool::run(int64_t chunks, Task task, void *context) {
  if (chunks <= 1 || workers_.empty()) {
    for (int64_t i = 0; i < chunks; i++) task(context, i, 0);
    return;
  }
  task_ = task;
  context_ = context;
  chunks_ = chunks;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(epoch << 32 | static_cast<uint64_t>(chunks));
  if (sleepers_.load() > 0) {
    signal_.fetch_add(1);
    signal_.notify_all();
  }
  work(0);
  const auto finished = [&] { return done_.load(std::memory_order_acquire) == chunks; };
  while (!spin(finished)) std::this_thread::yield();
}

void Pool::work(int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (ticket & REMAINING) {
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    // The task cannot end before this chunk is done, so its description stays.
    task_(context_, chunks_ - static_cast<int64_t>(ticket & REMAINING), thread);
    done_.fetch_add(1, std::memory_order_release);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void Pool::serve(int thread) {
  const auto called = [this] { return (ticket_.load() & REMAINING) != 0 || stopping_.load(); };
  while (!stopping_) {
    if (spin(called)) {
      work(thread);
      continue;
    }
    const uint32_t seen = signal_.load();
    sleepers_.fetch_add(1);
    if (!called()) signal_.wait(seen);
    sleepers_.fetch_sub(1);
  }
}

Buffer::~Buffer() { std::free(memory_); }

void *Buffer::reserve(size_t bytes) {
  if (bytes > bytes_) {
    std::free(memory_);
    bytes_ = 0;
    memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
  }
  return memory_;
}

void Buffer::fill(int byte) {
  if (memory_ != nullptr) std::memset(memory_, byte, bytes_);
}

}  // namespace motet
