// Reading a test's dict of parameters.
#pragma once

#include "testing/bind.h"

namespace tokensieve {
namespace testing {

template <typename T>
T get(const py::dict& p, const char* name, T otherwise) {
  return p.contains(name) && !p[name].is_none() ? p[name].cast<T>() : otherwise;
}
inline py::object array_of(const py::dict& p, const char* name) { return p.contains(name) ? py::object(p[name]) : py::none(); }

}  // namespace testing
}  // namespace tokensieve
