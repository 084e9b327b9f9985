// SPDX-License-Identifier: Apache-2.0
// Host side of add_relu: check -> ElementwiseProblem -> launch. The guide for the next op's.
//
// The schemas are defined in resnet_fast/kernels/cuda.py; the device side is device/add_relu.cuh.
#include "../common/check.h"
#include "device/add_relu.cuh"
#include "launch.h"

namespace resnet_fast {
namespace {

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

Kernel& kernel_for(int formula, Dtype dtype, bool aligned) {
  return add_relu_kernels().all[(formula * 3 + static_cast<int>(dtype)) * 2 + aligned];
}

int64_t blocks_of(Dtype dtype, bool aligned, int64_t numel) {
  if (!aligned) return ElementwiseShape<float, false>::blocks(numel);
  return dtype == Dtype::kFloat32 ? ElementwiseShape<float, true>::blocks(numel)
                                  : ElementwiseShape<__half, true>::blocks(numel);
}

// 1. Check everything that the kernel takes for granted, the device last.
// 2. Fill the plain struct. 3. Launch the instantiation that fits.
void run(int formula, const Argument& x, const Argument& y, const Argument& out) {
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
  launch(kernel_for(formula, dtype, aligned), dim3(static_cast<uint32_t>(blocks)), problem, device,
         [&] { return x.describe(); });
}

void add_relu(const Tensor& x, const Tensor& y, const Tensor& out) {
  constexpr auto op = "_add_relu_cuda";
  run(0, {op, "x", x}, {op, "y", y}, {op, "out", out});
}

void add_relu_backward(const Tensor& grad, const Tensor& y, const Tensor& out) {
  constexpr auto op = "_add_relu_backward_cuda";
  run(1, {op, "grad", grad}, {op, "y", y}, {op, "out", out});
}

template <class Formula, class Element, bool kAligned>
void add(Kernels& kernels, const char* formula) {
  kernels.all.emplace_back(std::string(formula) + "<" + kElementName<Element> +
                               (kAligned ? ", 16 bytes>" : ", elements>"),
                           reinterpret_cast<const void*>(&elementwise<Formula, Element, kAligned>),
                           ElementwiseShape<Element, kAligned>::kThreads, 0);
}

template <class Formula, class... Elements>
void add_all(Kernels& kernels, const char* formula) {
  ((add<Formula, Elements, false>(kernels, formula),
    add<Formula, Elements, true>(kernels, formula)),
   ...);
}

}  // namespace

// THE TABLE: every instantiation, dtypes in the order of enum class Dtype.
Kernels& add_relu_kernels() {
  static Kernels* kernels = [] {
    auto* all = new Kernels;
    add_all<AddRelu, float, __half, __nv_bfloat16>(*all, "add_relu");
    add_all<ReluGradient, float, __half, __nv_bfloat16>(*all, "add_relu_backward");
    return all;
  }();
  return *kernels;
}

}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_add_relu_cuda", TORCH_BOX(&resnet_fast::add_relu));
  m.impl("_add_relu_backward_cuda", TORCH_BOX(&resnet_fast::add_relu_backward));
}
