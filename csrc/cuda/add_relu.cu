// SPDX-License-Identifier: Apache-2.0
// Host side of add_relu: check -> ElementwiseProblem -> launch; the table of kernels stands at the
// end. The guide for the next op: a .cu like this one is all that it needs on the host.
//
// The schemas are defined in resnet_fast/kernels/cuda.py; the device side is device/add_relu.cuh.
#include <type_traits>

#include "../common/check.h"
#include "device/add_relu.cuh"
#include "launch.h"
#include "table.h"

namespace resnet_fast {
namespace {

extern Kernels& kernels;
constexpr int kAddRelu = 0, kReluGradient = 1;  // rows of the table

bool lie_alike(const Argument& a, const Argument& b) {
  for (int64_t axis = 0; axis < a.dim; ++axis) {
    if (a.sizes[axis] != 1 && a.strides[axis] != b.strides[axis]) return false;
  }
  return true;
}

void check_operand(const Argument& a, const Argument& x) {
  check_same_dtype(a, x);
  check_sizes(a, {x.sizes, x.sizes + x.dim}, "call .expand_as(" + x.name + ")");
  if (!lie_alike(a, x)) {
    a.reject("in the memory order of " + x.name + ", " + x.describe(),
             "call .contiguous(memory_format=...) on one of them");
  }
}

int64_t blocks_of(Dtype dtype, bool aligned, int64_t numel) {
  if (!aligned) return ElementwiseShape<float, false>::blocks(numel);
  return dtype == Dtype::kFloat32 ? ElementwiseShape<float, true>::blocks(numel)
                                  : ElementwiseShape<__half, true>::blocks(numel);
}

// 1. Check everything that the kernel takes for granted, the device last.
// 2. Fill the plain struct. 3. Launch the instantiation that fits.
void run(int row, const Argument& x, const Argument& y, const Argument& out) {
  Dtype dtype = kernel_dtype(x);
  int64_t numel = x.numel();
  if (numel != 0 && !is_dense(x)) x.reject("dense in memory", "call .contiguous()");
  check_operand(y, x);
  check_operand(out, x);
  check_apart(out, x, true);
  check_apart(out, y, true);
  int device = check_devices(x, {&y, &out});
  if (numel == 0) return;

  auto place = [](const Argument& a) { return reinterpret_cast<uintptr_t>(a.data) % 16; };
  bool aligned = place(x) == place(out) && place(y) == place(out);
  int64_t blocks = blocks_of(dtype, aligned, numel);
  check_range(x.op, "blocks", blocks, 1, INT32_MAX, "split the batch");
  ElementwiseProblem problem{x.data, y.data, out.data, numel};
  launch(kernels.at(dtype, row, aligned), dim3(static_cast<uint32_t>(blocks)), problem, device,
         [&] { return x.describe(); });
}

void add_relu(const Tensor& x, const Tensor& y, const Tensor& out) {
  constexpr auto op = "_add_relu_cuda";
  run(kAddRelu, {op, "x", x}, {op, "y", y}, {op, "out", out});
}

void add_relu_backward(const Tensor& grad, const Tensor& y, const Tensor& out) {
  constexpr auto op = "_add_relu_backward_cuda";
  run(kReluGradient, {op, "grad", grad}, {op, "y", y}, {op, "out", out});
}

struct Elementwise {
  template <class Element, class Formula>
  static void add(Kernels& to, Element, Formula) {
    const std::string op = std::is_same_v<Formula, AddRelu> ? "add_relu" : "add_relu_backward";
    to.add(kernel_name<Element>(op, "elements") + ">", &elementwise<Formula, Element, false>,
           ElementwiseShape<Element, false>::kThreads, 0);
    to.add(kernel_name<Element>(op, "16 bytes") + ">", &elementwise<Formula, Element, true>,
           ElementwiseShape<Element, true>::kThreads, 0);
  }
};

// THE TABLE: the formulas, each for one element and for 16 bytes at a time.
Kernels& kernels = enlist<Elementwise>("add_relu", TileList<AddRelu, ReluGradient>{});

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_add_relu_cuda", TORCH_BOX(&resnet_fast::add_relu));
  m.impl("_add_relu_backward_cuda", TORCH_BOX(&resnet_fast::add_relu_backward));
}
