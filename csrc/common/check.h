// SPDX-License-Identifier: Apache-2.0
// What the launchers refuse, always in the same form:
//
//   resnet_fast::op: argument must be <expected>, got <got>; <remedy>
//
// Only torch's stable headers are used, so one binary serves several releases of torch. No check
// reads a tensor's data, so the tests can run all of them with CPU tensors; whether the tensors are
// on a GPU is therefore checked last.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "conv_problem.h"

namespace resnet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor argument and every fact used about it: torch is called only once for each.
struct Argument {
  const char* op;
  std::string name;
  bool given;  // false for a Tensor? that is None
  void* data = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int device = -1;  // index of a CUDA device, or -1

  Argument(const char* op, std::string name, const Tensor& tensor)
      : op(op), name(std::move(name)), given(true) {
    data = tensor.data_ptr();
    dim = tensor.dim();
    sizes = tensor.sizes().data();
    strides = tensor.strides().data();
    dtype = tensor.scalar_type();
    device = tensor.is_cuda() ? tensor.get_device_index() : -1;
  }
  Argument(const char* op, std::string name, const OptionalTensor& tensor)
      : op(op), name(std::move(name)), given(false) {
    if (tensor) *this = Argument(op, this->name, *tensor);
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t axis = 0; axis < dim; ++axis) count *= sizes[axis];
    return count;
  }
  int element_size() const {
    return dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
  }

  [[noreturn]] void reject(const std::string& expected, const std::string& got,
                           const std::string& remedy) const {
    throw std::invalid_argument(std::string("resnet_fast::") + op + ": " + name + " must be " +
                                expected + ", got " + got + "; " + remedy);
  }
  [[noreturn]] void reject(const std::string& expected, const std::string& remedy) const {
    reject(expected, describe(), remedy);
  }

  std::string describe() const;  // "[2, 64, 56, 56] channels_last float16 on cuda:0"
};

inline std::string list_of(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// Dense, the last of `order` fastest; an axis of one element may have any stride.
inline bool lies_in_order(const Argument& a, std::initializer_list<int> order) {
  if (a.dim != static_cast<int64_t>(order.size())) return false;
  int64_t expected = 1;
  for (const int* axis = order.end(); axis-- != order.begin();) {
    if (a.sizes[*axis] != 1 && a.strides[*axis] != expected) return false;
    expected *= a.sizes[*axis];
  }
  return true;
}
inline bool is_channels_last(const Argument& a) { return lies_in_order(a, {0, 2, 3, 1}); }

// One element after another in some order of the axes.
inline bool is_dense(const Argument& a) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size)
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.sizes[i] != 1) axes.emplace_back(a.strides[i], a.sizes[i]);
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (auto [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline std::string Argument::describe() const {
  if (!given) return "None";
  std::string layout = is_channels_last(*this)              ? "channels_last"
                       : lies_in_order(*this, {0, 1, 2, 3}) ? "contiguous"
                       : dim < 2 && is_dense(*this)         ? "contiguous"
                                                            : "strided " + list_of(strides, dim);
  return list_of(sizes, dim) + " " + layout + " " + dtype_name(dtype) + " on " +
         (device < 0 ? "cpu" : "cuda:" + std::to_string(device));
}

inline std::string hexadecimal(const void* pointer) {
  std::ostringstream text;
  text << pointer;
  return text.str();
}

inline Dtype kernel_dtype(const Argument& a) {
  switch (a.dtype) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      a.reject("float16, bfloat16 or float32", "call .to(torch.float32)");
  }
}

inline void check_same_dtype(const Argument& a, const Argument& x) {
  if (a.dtype == x.dtype) return;
  std::string dtype = dtype_name(x.dtype);
  a.reject("of " + x.name + "'s dtype " + dtype, "call .to(torch." + dtype + ")");
}

inline void check_sizes(const Argument& a, const std::vector<int64_t>& sizes,
                        const std::string& remedy) {
  if (!std::equal(sizes.begin(), sizes.end(), a.sizes, a.sizes + a.dim)) {
    a.reject("of shape " + list_of(sizes.data(), sizes.size()), remedy);
  }
}

inline void check_four_dimensions(const Argument& a) {
  if (a.dim != 4) a.reject("4-D", "add or drop a dimension");
}

inline void check_channels_last(const Argument& a) {
  if (is_channels_last(a)) return;
  a.reject("dense channels_last", "call .contiguous(memory_format=torch.channels_last)");
}

// Kernels read and write vectors of 16 bytes.
inline void check_aligned(const Argument& a) {
  if (reinterpret_cast<uintptr_t>(a.data) % 16 == 0) return;
  a.reject("at a multiple of 16 bytes", "address " + hexadecimal(a.data), "call .clone()");
}

// A number among the arguments, or a limit of the kernels' 32-bit arithmetic.
inline void check_range(const char* op, const std::string& name, int64_t value, int64_t low,
                        int64_t high, const std::string& remedy) {
  if (value >= low && value <= high) return;
  throw std::invalid_argument(std::string("resnet_fast::") + op + ": " + name + " must be from " +
                              std::to_string(low) + " to " + std::to_string(high) + ", got " +
                              std::to_string(value) + "; " + remedy);
}

// From a tensor's first byte to the one past its last, gaps included.
inline std::pair<const char*, const char*> span_of(const Argument& a) {
  const char* first = static_cast<const char*>(a.data);
  int64_t last = 0;
  for (int64_t axis = 0; axis < a.dim; ++axis) {
    if (a.sizes[axis] == 0) return {first, first};
    last += (a.sizes[axis] - 1) * a.strides[axis];
  }
  return {first, first + (last + 1) * a.element_size()};
}

// `out` is written while the others are still being read. With `itself`, `other` may be exactly
// `out`: each element is then read by the thread that overwrites it.
inline void check_apart(const Argument& out, const Argument& other, bool itself = false) {
  if (!other.given) return;
  auto a = span_of(out), b = span_of(other);
  if (a.first >= b.second || b.first >= a.second || (itself && a == b)) return;
  out.reject("apart from " + other.name + " in memory",
             hexadecimal(a.first) + " to " + hexadecimal(a.second) + " beside " +
                 hexadecimal(b.first) + " to " + hexadecimal(b.second),
             itself ? "give another tensor, or exactly that one" : "give another tensor");
}

// A vector along output channels, [K], in any of the three dtypes.
inline ChannelVector channel_vector(const Argument& a, int64_t channels) {
  if (!a.given) return {nullptr, Dtype::kFloat32};
  Dtype dtype = kernel_dtype(a);
  check_sizes(a, {channels}, "give one value for each output channel");
  if (!is_dense(a)) a.reject("contiguous", "call .contiguous()");
  check_aligned(a);
  return {a.data, dtype};
}

inline Norm norm_of(const Argument& scale, const Argument& shift, const Argument& mean,
                    const Argument& var, double eps, int64_t channels) {
  if (mean.given && !var.given) var.reject("given beside mean", "give both, or neither");
  if (var.given && !mean.given) mean.reject("given beside var", "give both, or neither");
  return {channel_vector(scale, channels), channel_vector(shift, channels),
          channel_vector(mean, channels), channel_vector(var, channels), static_cast<float>(eps)};
}

// Writes a struct into a CPU tensor, for tests of what the host makes of its arguments.
template <class Struct>
void copy_bytes(const char* op, const Tensor& bytes, const Struct& value) {
  const Argument to(op, "bytes", bytes);
  if (to.dtype != ScalarType::Byte || to.device >= 0 || !is_dense(to) ||
      to.numel() != sizeof(value)) {
    to.reject("a uint8 CPU tensor of " + std::to_string(sizeof(value)) + " elements",
              "allocate it");
  }
  std::memcpy(to.data, &value, sizeof(value));
}

// The last check of all. Returns the index of x's device.
inline int check_devices(const Argument& x, std::initializer_list<const Argument*> others) {
  for (const Argument* other : others) {
    if (!other->given || other->device == x.device) continue;
    other->reject("on " + x.name + "'s device", other->describe() + " beside " + x.describe(),
                  "call .to(x.device)");
  }
  if (x.device < 0) x.reject("on a CUDA device", "call .cuda()");
  return x.device;
}

}  // namespace resnet_fast
