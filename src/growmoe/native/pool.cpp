#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define GM_PAUSE() _mm_pause()
#else
#define GM_PAUSE() sched_yield()
#endif

namespace growmoe {
namespace {

constexpr int kSpins = 4000;  // some 50 to 100 microseconds
constexpr uint64_t kMost = 1024;  // threads of a job

struct Pool {
  std::mutex lock;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> epoch{0};  // kMost times the number of jobs so far, plus threads of the last
  std::atomic<int> sleeping{0};
  std::atomic<int> running{0};
  Job* job = nullptr;
  std::pair<void*, int64_t> memory[16] = {};  // by slot

  void work(int thread, uint64_t seen) {
    for (;;) {
      uint64_t now = epoch.load(std::memory_order_acquire);
      for (int spin = 0; now == seen && spin < kSpins; ++spin) {
        GM_PAUSE();
        now = epoch.load(std::memory_order_acquire);
      }
      if (now == seen) {
        std::unique_lock<std::mutex> held(lock);
        sleeping.fetch_add(1);
        wake.wait(held, [&] { return epoch.load() != seen; });
        sleeping.fetch_sub(1);
        now = epoch.load(std::memory_order_acquire);
      }
      seen = now;
      // a thread that takes no part may come late, when the job is gone: it must not look at it
      if (thread < static_cast<int>(now % kMost)) {
        job->run(*job, thread);
        running.fetch_sub(1, std::memory_order_acq_rel);
      }
    }
  }
};

Pool* pool = new Pool;

std::mutex one_job;

// A forked child has none of the parent's threads.
void forget_threads() {
  pool = new Pool;
  new (&one_job) std::mutex;
}
struct AtFork {
  AtFork() { pthread_atfork(nullptr, nullptr, forget_threads); }
} at_fork;

}  // namespace

Alone::Alone() { one_job.lock(); }
Alone::~Alone() { one_job.unlock(); }

void Job::barrier() {
  if (threads == 1) return;
  int now = generation.load(std::memory_order_acquire);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
    arrived.store(0, std::memory_order_relaxed);
    generation.store(now + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; generation.load(std::memory_order_acquire) == now; ++spin) {
    if (spin < 2000) {
      GM_PAUSE();
    } else {
      sched_yield();
    }
  }
}

void run(Job& job) {
  Pool& p = *pool;
  if (job.threads >= static_cast<int>(kMost)) job.threads = kMost - 1;
  if (job.threads <= 1) {
    job.threads = 1;
    job.run(job, 0);
    return;
  }
  while (static_cast<int>(p.workers.size()) < job.threads - 1) {
    int thread = static_cast<int>(p.workers.size()) + 1;
    uint64_t seen = p.epoch.load();
    try {
      p.workers.emplace_back([&p, thread, seen] { p.work(thread, seen); });
    } catch (...) {  // no more threads are to be had
      break;
    }
    p.workers.back().detach();
  }
  job.threads = std::min<int>(job.threads, static_cast<int>(p.workers.size()) + 1);
  if (job.threads == 1) {
    job.run(job, 0);
    return;
  }
  p.job = &job;
  p.running.store(job.threads - 1, std::memory_order_release);
  uint64_t jobs = p.epoch.load(std::memory_order_relaxed) / kMost + 1;
  p.epoch.store(jobs * kMost + job.threads, std::memory_order_seq_cst);
  if (p.sleeping.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> held(p.lock);
    p.wake.notify_all();
  }
  job.run(job, 0);
  for (int spin = 0; p.running.load(std::memory_order_acquire) > 0; ++spin) {
    if (spin < 2000) {
      GM_PAUSE();
    } else {
      sched_yield();
    }
  }
}

void* scratch(int slot, int64_t bytes) {
  auto& [place, size] = pool->memory[slot];
  bytes = std::max<int64_t>(bytes, 1);
  if (size < bytes) {
    std::free(place);
    int64_t wanted = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    place = std::aligned_alloc(4096, wanted);
    size = place ? wanted : 0;
  }
  return place;
}

}  // namespace growmoe
