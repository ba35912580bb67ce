// Threads that wait for work by spinning for a moment, then sleeping: a decode step makes dozens of
// calls a few microseconds apart.
#pragma once
#include <atomic>
#include <cstdint>

namespace growmoe {

struct Job {
  void (*run)(Job&, int thread) = nullptr;
  const void* call = nullptr;
  int threads = 1;
  // next piece of work in each phase
  std::atomic<int64_t> next[8] = {};
  std::atomic<int> arrived{0};
  std::atomic<int> generation{0};

  // All threads of the job have come here before any goes on.
  void barrier();
  // The next `chunk` pieces of `phase`: [begin, end), or false when all are taken.
  bool take(int phase, int64_t total, int64_t chunk, int64_t& begin, int64_t& end) {
    begin = next[phase].fetch_add(chunk, std::memory_order_relaxed);
    end = begin + chunk < total ? begin + chunk : total;
    return begin < total;
  }
};

// Held by a call from outside for as long as it uses threads or scratch memory: a second caller waits.
struct Alone {
  Alone();
  ~Alone();
};

// Runs job.run on job.threads threads, the caller being one; returns when all are done.
void run(Job& job);

// Scratch memory, kept between calls; null when there is none.
void* scratch(int slot, int64_t bytes);

}  // namespace growmoe
