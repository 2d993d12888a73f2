// Fibres: one stack per CUDA thread, switched in user space. A hand-written switch on x86-64 (19 ns with scheduling against ~300 ns of
// swapcontext, which makes a system call), ucontext elsewhere. Carries the annotations that AddressSanitizer and ThreadSanitizer need:
// the emulator is compiled without -fsanitize and told by SIMT_ASAN / SIMT_TSAN.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT 1
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace tokensieve {
namespace simt {
namespace host {

class Fiber {
 public:
  Fiber() = default;  // the launching thread itself: no stack of its own
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // A fresh stack whose first switch_to runs `entry`, which never returns. Call it on the launching thread: a fibre created by
  // another one would inherit its happens-before history and hide races. A second call drops what the fibre was doing.
  void start(void (*entry)(), int colour);
  void adopt_current_thread();
  void set_name(const char* name);  // for ThreadSanitizer's reports

  // Suspends `from` (the running one) and continues `to`.
  static void switch_fibers(Fiber* from, Fiber* to);
  static void entered(Fiber* main);  // the first thing that `entry` calls
  // Publishes what this suspended fibre did, on its behalf: it will never run again.
  void release_for(Fiber* main, void* address);

 private:
  void* stack_ = nullptr;  // mapping: guard page, then the stack
  size_t mapping_bytes_ = 0;
  const void* bottom_ = nullptr;  // what AddressSanitizer knows as this stack
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
#if defined(SIMT_UCONTEXT)
  ucontext_t context_;
#else
  void* sp_ = nullptr;
#endif
};

// ThreadSanitizer's happens-before edges; nothing in other builds.
#if defined(SIMT_TSAN)
void order_release(void* address);
void order_acquire(void* address);
#else
inline void order_release(void*) {}
inline void order_acquire(void*) {}
#endif
// While one lives, the emulator's own allocations, frees and memset are no events of the thread: ThreadSanitizer intercepts those.
struct Quiet {
  Quiet();
  ~Quiet();
};

}  // namespace host
}  // namespace simt
}  // namespace tokensieve
