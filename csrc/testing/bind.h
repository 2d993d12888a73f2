// For the bindings of kernel families: csrc/testing/bind_<family>.cpp defines `void bind_<family>(py::module_& m)` in this namespace, and
// the build finds it. A binding copies numpy arrays into DeviceBuffers, calls the launcher as bind/ does, and copies back.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"

namespace tokensieve {
namespace testing {

namespace py = pybind11;

// Memory of the emulated device: exactly as many bytes as asked for (AddressSanitizer guards both ends), 256-byte aligned as cudaMalloc's,
// filled with 0xFF (NaN, -1). Null for zero bytes of None, so it can stand for an optional tensor.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t bytes);
  // The elements of an array in C order; None gives a null buffer.
  static DeviceBuffer of(const py::object& array_or_none);
  // The same, `bytes` into a buffer, so that kernels see a less aligned pointer.
  static DeviceBuffer of(const py::object& array_or_none, int64_t offset_bytes);

  template <typename T = void>
  T* as() const {
    return static_cast<T*>(pointer_);
  }
  int64_t bytes() const { return bytes_; }
  // A numpy copy; dtype as numpy spells it, for example "float32", "int64", "uint16".
  py::array numpy(const std::string& dtype, const std::vector<int64_t>& shape) const;

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> block_;
  void* pointer_ = nullptr;
  int64_t bytes_ = 0;
};

void check(const Status& status);         // throws its message
DType dtype_of(const std::string& name);  // float32, float16, bfloat16, bool; bfloat16 arrays travel as uint16 bits

}  // namespace testing
}  // namespace tokensieve
