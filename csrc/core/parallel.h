// How CPU kernels get threads: the caller hands in a parallel_for, so no kernel room knows a thread pool.
#pragma once

#include <atomic>
#include <cstdint>

namespace tokensieve {

using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelForFn = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// parallel_for(threads, n, grain, [&](int64_t begin, int64_t end) {...}); runs inline when threads is null or one grain covers everything.
template <typename Body>
inline void parallel_for(ParallelForFn threads, int64_t n, int64_t grain, Body&& body) {
  if (n <= 0) return;
  if (threads == nullptr || n <= grain) {
    body(int64_t{0}, n);
    return;
  }
  threads(0, n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// parallel_tasks(threads, n, grain, [&](int64_t task) {...}) for tasks of unequal cost: a thread that is done takes the next one. Equal shares
// of 729 x 729 products in blocks of 144 gave one of two threads 71 % of the work. Worth it from about 10 us a task.
template <typename Task>
inline void parallel_tasks(ParallelForFn threads, int64_t n, int64_t grain, Task&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(threads, n, grain, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n; i = next.fetch_add(1, std::memory_order_relaxed)) task(i);
  });
}

}  // namespace tokensieve
