// Gradients that are made on the GPU before a step takes them: the sums of those of samples.
#pragma once

#include <cstdint>

#include "cuda/bodies.h"

namespace fusestep::cuda {

// One element of a sum, from where it is in the values of sample 0; without the noise.
template <class T>
FUSESTEP_HOST_DEVICE T sum_of_samples(const SamplesItem& item, const std::byte* from) {
  const DType dtype = item.operand(kGradient).dtype;
  const auto load = [&](std::int64_t i) {
    return Bits::load(from + item.samples[i].number * item.stride, item_size(dtype));
  };
  const auto product = [&](std::int64_t i, Bits bits) {
    return static_cast<T>(item.samples[i].times) * bits.as<T>(dtype);
  };
  T sum = gradients::kNoSamples<T>;
  std::int64_t i = 0;
  for (; i + gradients::kSamplesAtOnce <= item.count; i += gradients::kSamplesAtOnce) {
    const Bits a = load(i), b = load(i + 1), c = load(i + 2), d = load(i + 3);
    sum = gradients::plus_four(sum, product(i, a), product(i + 1, b), product(i + 2, c),
                               product(i + 3, d));
  }
  for (; i < item.count; ++i) sum += product(i, load(i));
  return sum;
}

// Makes a list of gradients: a block for each tile, and in a thread one element after the other, so
// that a few registers do, and many threads have loads under way.
struct AddUpSamples {
  using Item = SamplesItem;
  static constexpr Team kTeam = Team::thread;
  static constexpr Unit kUnit = Unit::tile;

  SamplesList list;

  FUSESTEP_HOST_DEVICE void operator()(std::int64_t block, int thread) const {
    const auto tile = tile_of<SamplesList>(block, thread);
    if (tile >= list.tiles) return;
    const SamplesItem& of_list = list.item_of(tile);
    visit_tile(list, of_list, tile - of_list.first_tile,
               [&](const SamplesItem& item, const auto& place, OneSource) {
                 FUSESTEP_DO_NOT_UNROLL
                 for (int i = thread; i < place.count(); i += kThreads)
                   if (item.in_double)
                     make<double>(item, place, i);
                   else
                     make<float>(item, place, i);
               });
  }

 private:
  template <class T, class Place>
  FUSESTEP_HOST_DEVICE static void make(const SamplesItem& item, const Place& place, int i) {
    std::byte* const to = place.at(kParameter, i, sizeof(T));
    T sum =
        sum_of_samples<T>(item, place.at(kGradient, i, item_size(item.operand(kGradient).dtype)));
    if (item.has_noise) {
      const auto element = (to - item.data[kParameter]) / static_cast<std::int64_t>(sizeof(T));
      sum += static_cast<T>(item.noise(element));
    }
    *reinterpret_cast<T*>(to) = sum;
  }
};

}  // namespace fusestep::cuda
