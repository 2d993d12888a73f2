// The Python module `_kernels`: kernels under the emulator, CPU kernels and plans on numpy arrays. Test only, never in a wheel.
#include "testing/bind.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "testing/conformance.h"
#include "testing/faults.h"
#include "testing/simt/runtime.h"

namespace tokensieve {
namespace testing {

void DeviceBuffer::Free::operator()(void* p) const { std::free(p); }

DeviceBuffer::DeviceBuffer(int64_t bytes) : bytes_(bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 256, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  std::memset(p, 0xFF, static_cast<size_t>(bytes));
  block_.reset(p);
  pointer_ = p;
}

DeviceBuffer DeviceBuffer::of(const py::object& array_or_none) { return of(array_or_none, 0); }

DeviceBuffer DeviceBuffer::of(const py::object& array_or_none, int64_t offset_bytes) {
  if (array_or_none.is_none()) return DeviceBuffer();
  const py::array array = py::array::ensure(array_or_none, py::array::c_style);
  if (!array) throw py::type_error("a DeviceBuffer needs a numpy array or None");
  DeviceBuffer buffer(offset_bytes + static_cast<int64_t>(array.nbytes()));
  buffer.pointer_ = buffer.as<char>() + offset_bytes;
  buffer.bytes_ -= offset_bytes;
  std::memcpy(buffer.as(), array.data(), static_cast<size_t>(array.nbytes()));
  return buffer;
}

py::array DeviceBuffer::numpy(const std::string& dtype, const std::vector<int64_t>& shape) const {
  py::array result(py::dtype(dtype), std::vector<py::ssize_t>(shape.begin(), shape.end()));
  if (static_cast<int64_t>(result.nbytes()) != bytes_) {
    throw std::runtime_error("the shape has " + std::to_string(result.nbytes()) + " bytes, the buffer " + std::to_string(bytes_));
  }
  if (bytes_ > 0) std::memcpy(result.mutable_data(), pointer_, static_cast<size_t>(bytes_));
  return result;
}

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "bool") return DType::kBool;
  throw std::invalid_argument("dtype must be float32, float16, bfloat16 or bool, got " + name);
}

namespace {

void configure(const std::string& order, uint64_t seed, int resident_blocks) {
  using simt::host::Order;
  simt::host::Config& config = simt::host::config();
  if (order == "ascending")
    config.order = Order::kAscending;
  else if (order == "descending")
    config.order = Order::kDescending;
  else if (order == "random")
    config.order = Order::kRandom;
  else
    throw std::invalid_argument("order must be ascending, descending or random, got " + order);
  config.seed = seed;
  config.resident_blocks = resident_blocks;
}

py::dict stats() {
  const simt::host::Stats& s = simt::host::stats();
  py::dict result;
  result["switches"] = s.switches;
  result["ldmatrix_conflicts"] = s.ldmatrix_conflicts;
  return result;
}

py::list conformance() {
  py::list result;
  for (const ConformanceResult& r : run_conformance()) {
    result.append(py::make_tuple(r.name, r.outcome == ConformanceResult::kPassed, r.detail));
  }
  return result;
}

}  // namespace

// One per csrc/testing/bind_<family>.cpp; the build makes the list.
#define TOKENSIEVE_FAMILY(name) void bind_##name(py::module_& m);
TOKENSIEVE_FAMILIES
#undef TOKENSIEVE_FAMILY

}  // namespace testing
}  // namespace tokensieve

PYBIND11_MODULE(_kernels, m) {
  using namespace tokensieve::testing;
  m.attr("sanitizer") = TOKENSIEVE_SANITIZER;
  m.def("configure", &configure, py::arg("order"), py::arg("seed") = 0, py::arg("resident_blocks") = 1);
  m.def("stats", &stats);
  m.def("conformance", &conformance);
  m.def("fault_names", &fault_names);
  m.def("run_fault", &run_fault, py::arg("name"), py::arg("faulty"));
#define TOKENSIEVE_FAMILY(name) bind_##name(m);
  TOKENSIEVE_FAMILIES
#undef TOKENSIEVE_FAMILY
}
