// The backstop checks: "tokensieve.<op>: <argument> must <rule>, got <value>". Python raises the same rules first, as TypeError or
// ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace tokensieve::bind {

using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "tokensieve." << op << ": ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ")";
  return text.str();
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* shape) {
  if (t.dim() != rank) fail(op, name, " must be ", shape, ", got shape ", shape_of(t));
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) {
    fail(op, name, " must be contiguous in its last dimension (stride 1), got stride ", t.stride(last), "; call .contiguous()");
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& reference) {
  if (t.device() != reference.device()) fail(op, name, " must be on the device of the first argument");
}

}  // namespace tokensieve::bind
