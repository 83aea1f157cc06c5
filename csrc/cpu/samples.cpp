#include "cpu/samples.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/fp_environment.h"
#include "cpu/part_reader.h"
#include "cpu/thread_pool.h"

namespace fusestep::cpu {
namespace {

template <class T>
void add_up(const selections::Part& part, T* sums) {
  const Kernels<T>& kernels = active_tier().kernels->of<T>();
  constexpr std::int64_t kTilesOfChunk = 16;
  const std::int64_t tiles = ceil_div(part.size, kTileSize);
  parallel_for(ceil_div(tiles, kTilesOfChunk), num_threads(), [&](std::int64_t chunk) {
    const IeeeEnvironment ieee;
    PartReader<T> reader(kernels, part);
    const std::int64_t end = std::min(tiles, (chunk + 1) * kTilesOfChunk);
    for (std::int64_t tile = chunk * kTilesOfChunk; tile < end; ++tile) {
      T* const sum = sums + tile * kTileSize;
      const std::int64_t size = part.size_of(tile);
      const T* const made = reader.read(kGradient, tile * kTileSize, size, sum);
      if (made != sum) std::copy_n(made, size, sum);
    }
  });
}

}  // namespace

void add_up_samples(const selections::Part& part, DType compute, std::byte* sums) {
  if (compute == DType::float64)
    add_up(part, reinterpret_cast<double*>(sums));
  else
    add_up(part, reinterpret_cast<float*>(sums));
}

}  // namespace fusestep::cpu
