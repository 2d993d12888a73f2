#include "testing/simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

extern "C" {
#if defined(SIMT_ASAN)
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(void const volatile* address, size_t size);
#endif
#if defined(SIMT_TSAN)
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif
}

#if !defined(SIMT_UCONTEXT)
// Saves the callee-saved registers on the old stack, takes them from the new one. jmp instead of ret: the return predictor is always
// wrong here (0.30 against 0.38 ms on a shuffle-heavy block).
extern "C" void tokensieve_simt_switch(void** save, void* load);
asm(R"(
  .text
  .type tokensieve_simt_switch, @function
tokensieve_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size tokensieve_simt_switch, .-tokensieve_simt_switch
)");
#endif

namespace tokensieve {
namespace simt {
namespace host {
namespace {

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr size_t kStackBytes = 256 * 1024;  // red zones make frames larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

}  // namespace

Fiber::~Fiber() {
#if defined(SIMT_TSAN)
  if (stack_ != nullptr && tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
#endif
  if (stack_ != nullptr) munmap(stack_, mapping_bytes_);
}

void Fiber::start(void (*entry)(), int colour) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (stack_ == nullptr) {
    mapping_bytes_ = kStackBytes + page;
    stack_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) {
      stack_ = nullptr;
      throw std::bad_alloc();
    }
    mprotect(stack_, page, PROT_NONE);
    bottom_ = static_cast<char*>(stack_) + page;
    bytes_ = kStackBytes;
  }
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(bottom_, bytes_);  // what an abandoned run left behind
  fake_stack_ = nullptr;
#endif
#if defined(SIMT_TSAN)
  if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
  tsan_ = __tsan_create_fiber(0);
#endif
  // Neighbouring stacks start 64 bytes apart in their pages, or all of them would fight for the same cache sets.
  const size_t usable = bytes_ - static_cast<size_t>(colour % 32) * 64;
#if defined(SIMT_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = const_cast<void*>(bottom_);
  context_.uc_stack.ss_size = usable;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  void** top = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(bottom_)) + usable);
  *--top = nullptr;  // the return address of `entry`; also the alignment that the ABI wants at a function's entry
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  sp_ = top;
#endif
}

void Fiber::adopt_current_thread() {
#if defined(SIMT_TSAN)
  tsan_ = __tsan_get_current_fiber();
#endif
}

void Fiber::set_name([[maybe_unused]] const char* name) {
#if defined(SIMT_TSAN)
  __tsan_set_fiber_name(tsan_, name);
#endif
}

void Fiber::switch_fibers(Fiber* from, Fiber* to) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from->fake_stack_, to->bottom_, to->bytes_);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to->tsan_, 1);  // 1 = no ordering: only barriers and atomics order CUDA threads
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&from->context_, &to->context_);
#else
  tokensieve_simt_switch(&from->sp_, to->sp_);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from->fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::release_for([[maybe_unused]] Fiber* main, [[maybe_unused]] void* address) {
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(tsan_, 1);
  __tsan_release(address);
  __tsan_switch_to_fiber(main->tsan_, 1);
#endif
}

void Fiber::entered([[maybe_unused]] Fiber* main) {
#if defined(SIMT_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main->bottom_ == nullptr) {  // the first fibre of a launch is always entered from the launching thread
    main->bottom_ = bottom;
    main->bytes_ = bytes;
  }
#endif
}

#if defined(SIMT_TSAN)
void order_release(void* address) { __tsan_release(address); }
void order_acquire(void* address) { __tsan_acquire(address); }
Quiet::Quiet() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Quiet::~Quiet() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
Quiet::Quiet() {}
Quiet::~Quiet() {}
#endif

}  // namespace host
}  // namespace simt
}  // namespace tokensieve
