// Results of conformance.cu, for its main program and for the Python module.
#pragma once

#include <string>
#include <vector>

namespace tokensieve {
namespace testing {

struct ConformanceResult {
  enum Outcome { kPassed, kFailed, kSkipped };
  std::string name;
  Outcome outcome;
  std::string detail;
};

std::vector<ConformanceResult> run_conformance();

}  // namespace testing
}  // namespace tokensieve
