// SPDX-License-Identifier: Apache-2.0
// The module resnet_fast._C: what the binary holds, and which resources its kernels take. Importing
// it registers the kernels with torch, which must have been imported before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_facts.h"  // written by resnet_fast/build.py
#include "cuda/kernel.h"

namespace py = pybind11;

namespace resnet_fast {
namespace {

std::vector<Kernel*> kernels_of(const std::string& op) {
  std::vector<Kernel*> all;
  for (Kernels& table : tables()) {
    if (table.op != op) continue;
    for (Kernel& kernel : table.all) all.push_back(&kernel);
  }
  return all;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(
      std::string("resnet_fast: a kernel's resources are asked of a GPU, but: ") +
      cudaGetErrorString(error) + "; `resnet-fast build` prints registers and spills without one");
}

std::vector<std::string> names(const std::string& op) {
  std::vector<std::string> all;
  for (const Kernel* kernel : kernels_of(op)) all.push_back(kernel->name);
  return all;
}

// Why the CUDA runtime that is linked in here cannot use the driver, or "".
std::string driver_error() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Makes a device the current one, and restores the previous one at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~CurrentDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

py::dict resources(const std::string& op, int index, int device) {
  Kernel& kernel = *kernels_of(op).at(index);
  const CurrentDevice current(device);
  cudaFuncAttributes attributes;
  int blocks = 0, threads_per_sm = 0;
  check(kernel.prepare(device));
  check(cudaFuncGetAttributes(&attributes, kernel.function));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads,
                                                      kernel.shared_bytes));
  check(cudaDeviceGetAttribute(&threads_per_sm, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  py::dict result;
  result["registers"] = attributes.numRegs;
  result["shared_bytes"] = static_cast<int>(attributes.sharedSizeBytes) + kernel.shared_bytes;
  result["local_bytes"] = static_cast<int>(attributes.localSizeBytes);
  result["threads"] = kernel.threads;
  result["blocks_per_sm"] = blocks;
  result["occupancy"] = static_cast<double>(blocks) * kernel.threads / threads_per_sm;
  return result;
}

}  // namespace
}  // namespace resnet_fast

PYBIND11_MODULE(_C, m) {
  using namespace resnet_fast;
  m.doc() = "What the CUDA C++ extension holds; importing it registers its kernels with torch.";
  // Compute capabilities times ten: machine code, and PTX that a newer GPU's driver can compile.
  m.attr("architectures") = std::vector<int>{RESNET_FAST_ARCHITECTURES};
  m.attr("ptx") = RESNET_FAST_PTX;
  m.attr("built_for") = RESNET_FAST_BUILT_FOR;
  m.attr("sources") = RESNET_FAST_SOURCES;                // a digest of csrc
  std::map<std::string, std::vector<TileNumbers>> tiles;  // by op, its table's rows
  for (const Kernels& table : tables()) {
    if (!table.tiles.empty()) tiles[table.op] = table.tiles;
  }
  m.attr("tiles") = tiles;
  m.def("driver_error", &driver_error,
        "Why this binary's CUDA runtime cannot use the machine's driver, or an empty string.");
  m.def("kernels", &names, py::arg("op"), "The names of an op's instantiations.");
  m.def(
      "resources", &resources, py::arg("op"), py::arg("kernel"), py::arg("device"),
      "Registers, shared and local memory, threads, blocks per SM and occupancy of the `kernel`-th "
      "instantiation of an op on a GPU; RuntimeError without one.");
}
