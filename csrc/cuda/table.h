// SPDX-License-Identifier: Apache-2.0
// From a table in an op's .cu to the op's kernels: each row becomes kernels for every dtype.
//
//   using ConvTiles = TileList<Tile<128, 128, 64, 3, 2, 2>, Tile<64, 64, 64, 3, 2, 2>>;
//
//   struct ConvBnAct {                                 // how a row becomes kernels
//     template <class Element, class Tile>
//     static void add(Kernels& kernels, Element, Tile tile) {
//       kernels.add(kernel_name<Element>("conv_bn_act", tile_name(tile)) + ">",
//                   &conv_bn_act<Element, Tile>, Tile::kThreads, Tile::kSharedBytes);
//     }
//   };
//   Kernels& kernels = enlist<ConvBnAct>("conv_bn_act", ConvTiles{});
//
//   launch(kernels.at(dtype, tile), ...);
//
// The rows are in view of Python too, as `resnet_fast._C.tiles[op]`, and the kernels' names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "kernel.h"

namespace resnet_fast {

template <class... Rows>
struct TileList {};

template <int... kNumbers>
struct Row {};

// The numbers of Tile<...> or Row<...>; a row that is something else has none.
template <template <int...> class Tile, int... kNumbers>
TileNumbers numbers_of(Tile<kNumbers...>) {
  return {kNumbers...};
}
inline TileNumbers numbers_of(...) { return {}; }

template <class Tile>
std::string tile_name(Tile tile) {
  const TileNumbers t = numbers_of(tile);
  auto text = [&](int i) { return std::to_string(t[i]); };
  return text(0) + "x" + text(1) + "x" + text(2) + " stages " + text(3) + " warps " + text(4) +
         "x" + text(5);
}

template <class T>
constexpr const char* kElementName = "float32";
template <>
inline constexpr const char* kElementName<__half> = "float16";
template <>
inline constexpr const char* kElementName<__nv_bfloat16> = "bfloat16";

// "conv_bn_act<float16, 128x128x64 stages 3 warps 2x2", for the caller to close.
template <class Element>
std::string kernel_name(const std::string& op, const std::string& row) {
  return op + "<" + kElementName<Element> + (row.empty() ? "" : ", ") + row;
}

// Adds a table to `tables()`. Op::add(kernels, Element{}, row) adds the kernels of one row and
// dtype, equally many each time.
template <class Op, class... Rows>
Kernels& enlist(const char* name, TileList<Rows...>) {
  std::vector<TileNumbers> tiles = {numbers_of(Rows{})...};
  if (tiles[0].empty()) tiles.clear();
  Kernels& made = tables().emplace_back(Kernels{name, std::move(tiles), sizeof...(Rows)});
  auto add = [&](auto element) { (Op::add(made, element, Rows{}), ...); };
  add(float{}), add(__half{}), add(__nv_bfloat16{});  // in the order of enum class Dtype
  made.variants = made.all.size() / (3 * made.rows);
  return made;
}

}  // namespace resnet_fast
