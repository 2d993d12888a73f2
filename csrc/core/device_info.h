// The few facts of a GPU that plans depend on. Filled by bind/ on a real device, by tests on none.
#pragma once

#include <cstdint>

namespace tokensieve {

struct DeviceInfo {
  int compute_capability = 90;          // 10 * major + minor
  int num_sms = 132;                    // H200
  int64_t smem_per_block = 227 * 1024;  // opt-in limit, bytes
  bool wgmma = false;                   // kernels on the warpgroup tensor cores of sm_90a are there and wanted
};

}  // namespace tokensieve
