// Instruction levels of the CPU kernels. Every *_cpu.cpp is compiled once per level into namespace TS_ISA; the public entry switches at run
// time.
#pragma once

namespace tokensieve {

enum class CpuLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };  // kAvx2 = AVX2+FMA+F16C; kAvx512 = F+BW+DQ+VL

}  // namespace tokensieve

// TS_ISA is one of baseline, avx2, avx512 and comes from the build. TS_ISA_LEVEL is 0, 1 or 2.
#if defined(TS_ISA)
#define TS_ISA_BEGIN     \
  namespace tokensieve { \
  namespace TS_ISA {
#define TS_ISA_END \
  }                \
  }
#endif

// In the translation unit of the baseline level: declare a function of the other levels, and switch. On non-x86 only the baseline exists.
#if defined(TS_HAVE_X86_LEVELS)
#define TS_CPU_LEVELS(...) \
  namespace avx2 {         \
  __VA_ARGS__;             \
  }                        \
  namespace avx512 {       \
  __VA_ARGS__;             \
  }
#define TS_CPU_SWITCH(level, call) \
  switch (level) {                 \
    case CpuLevel::kAvx512:        \
      return avx512::call;         \
    case CpuLevel::kAvx2:          \
      return avx2::call;           \
    default:                       \
      return baseline::call;       \
  }
#else
#define TS_CPU_LEVELS(...)
#define TS_CPU_SWITCH(level, call) \
  (void)(level);                   \
  return baseline::call;
#endif
