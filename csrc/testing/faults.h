// Planted faults: kernels that are wrong on purpose, each with its right twin, to prove what the emulator and the sanitizers catch.
#pragma once

#include <string>
#include <vector>

namespace tokensieve {
namespace testing {

std::vector<std::string> fault_names();
// Runs a fault, or its right twin, and returns what it wrote: 64 floats, NaN where nothing was written.
std::vector<float> run_fault(const std::string& name, bool faulty);

}  // namespace testing
}  // namespace tokensieve
