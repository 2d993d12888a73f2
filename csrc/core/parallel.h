// How CPU kernels get threads: the caller hands in a parallel_for, so no kernel room knows a thread pool.
#pragma once

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

}  // namespace tokensieve
