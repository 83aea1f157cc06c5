#include "cpu/step.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/fp_environment.h"
#include "cpu/part_step.h"
#include "cpu/row_tile.h"
#include "cpu/thread_pool.h"
#include "cpu/tile_access.h"
#include "cpu/updater.h"
#include "rules/registry.h"
#include "selections/part.h"

namespace fusestep::cpu {
namespace {

// Below this many elements a second thread costs more than it saves: it has to be woken up.
constexpr std::int64_t kParallelElements = 1 << 17;

// The least that a thread claims at a time, in tiles.
constexpr std::int64_t kLeastChunk = 32;

// Elements of a gradient that a thread clears before it takes others.
constexpr std::int64_t kClearedAtOnce = 1 << 16;

// Where each chunk ends. Each is half of a fair share of what is left: long runs for the
// prefetchers while there is much to do, short ones towards the end so that threads finish together
// (guided self-scheduling: Polychronopoulos & Kuck 1987).
std::vector<std::int64_t> cut_into_chunks(std::int64_t tiles, int threads) {
  std::vector<std::int64_t> ends;
  for (std::int64_t end = 0; end < tiles; ends.push_back(end))
    end = std::min(tiles, end + std::max(kLeastChunk, (tiles - end) / (2 * threads)));
  return ends;
}

// Calls visit(work, first tile, last tile, number of the first tile in the whole list) until every
// tile of the list has been visited once, from as many threads as the list is worth.
//
// `count` says how many tiles there are in a piece of work, or pieces of another kind.
template <class Visit>
void for_each_tile_range(WorkList list, Visit visit, const Errand& errand = {},
                         std::int64_t (Work::*count)() const = &Work::tiles) {
  std::int64_t elements = 0;
  for (const Work* work : list) elements += work->elements();

  if (elements < kParallelElements || num_threads() == 1) {
    if (errand) errand();
    const IeeeEnvironment ieee;
    std::int64_t before = 0;
    for (const Work* work : list) {
      const std::int64_t tiles = (work->*count)();
      if (tiles > 0) visit(*work, std::int64_t{0}, tiles, before);
      before += tiles;
    }
    return;
  }

  std::vector<std::int64_t> ends;  // tiles of the list up to and including each parameter
  ends.reserve(list.size());
  std::int64_t total = 0;
  for (const Work* work : list) ends.push_back(total += (work->*count)());

  const std::vector<std::int64_t> chunk_ends = cut_into_chunks(total, num_threads());
  auto work_on = [&](std::int64_t chunk) {
    const IeeeEnvironment ieee;
    const std::int64_t end = chunk_ends[static_cast<std::size_t>(chunk)];
    std::int64_t begin = chunk == 0 ? 0 : chunk_ends[static_cast<std::size_t>(chunk - 1)];
    auto i =
        static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    for (; begin < end; ++i) {
      const std::int64_t start = i == 0 ? 0 : ends[i - 1];
      const std::int64_t stop = std::min(end, ends[i]);
      if (begin < stop) visit(*list[i], begin - start, stop - start, begin);
      begin = stop;
    }
  };
  parallel_for(std::ssize(chunk_ends), num_threads(), work_on, errand);
}

// Calls visit(T{}) with the type a piece of work is computed in.
template <class Visit>
void in_compute_type(const Work& work, Visit visit) {
  if (work.compute == DType::float64)
    visit(double{});
  else
    visit(float{});
}

template <class T>
double sum_of_squares(const KernelTable& table, const Work& work, std::int64_t tile,
                      double prescale) {
  const Kernels<T>& kernels = table.of<T>();
  alignas(kCacheLine) T buffer[kTileSize];
  const TileAccess<T> access(kernels);
  if (work.rows) {
    const RowTile at(work, tile);
    return kernels.sum_of_squares(at.gradient(access, buffer), at.size(), prescale);
  }
  const Block block = work.iteration.block(kGradient, tile);
  return kernels.sum_of_squares(access.read(block, buffer), block.size(), prescale);
}

}  // namespace

std::vector<double> tile_sums(WorkList list, double prescale) {
  const KernelTable& table = *active_tier().kernels;
  std::int64_t tiles = 0;
  for (const Work* work : list) tiles += work->tiles();
  std::vector<double> sums(static_cast<std::size_t>(tiles));
  for_each_tile_range(
      list, [&](const Work& work, std::int64_t first, std::int64_t last, std::int64_t before) {
        double* const to = sums.data() + before;
        if (work.part) return sum_moved_squares(table, work, first, last, prescale, to);
        in_compute_type(work, [&](auto type) {
          for (std::int64_t tile = first; tile < last; ++tile)
            to[tile - first] = sum_of_squares<decltype(type)>(table, work, tile, prescale);
        });
      });
  return sums;
}

void update(WorkList list, const StepOptions& options, const Errand& errand) {
  const KernelTable& kernels = *active_tier().kernels;
  for_each_tile_range(
      list,
      [&](const Work& work, std::int64_t first, std::int64_t last, std::int64_t) {
        if (work.part) return update_part(kernels, work, options, first, last);
        in_compute_type(
            work, [&](auto type) { Updater<decltype(type)>(kernels, work, options)(first, last); });
      },
      errand, &Work::pieces);
}

void count_updates(WorkList list) {
  for_each_tile_range(
      list, [](const Work& work, std::int64_t first, std::int64_t last, std::int64_t) {
        const selections::Part& part = *work.part;
        for (std::int64_t i = first; i < last; ++i)
          part.progress->advance(*part.rule, part.tile(i) * kTileSize, part.moved(i));
      });
}

void announce(std::int64_t elements) {
  if (elements >= kParallelElements) rouse(num_threads());
}

GradientNorm gradient_norm(WorkList list) {
  const auto sum = [list](double prescale) {
    std::vector<double> sums = tile_sums(list, prescale);
    const IeeeEnvironment ieee;
    return sum_in_groups(sums.data(), std::ssize(sums));
  };
  const GradientNorm norm = norm_of(sum(1));
  // If not, either a gradient is not finite, or the square of a float64 gradient has overflowed.
  return norm.finite ? norm : norm_of_prescaled(sum(kPrescale));
}

namespace {

void clear_whole_gradient(const Work& work) {
  const auto [gradient, size] = work.whole_gradient;
  const TileAccess<float> access(active_tier().kernels->float32);
  parallel_for(ceil_div(size, kClearedAtOnce), num_threads(), [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * kClearedAtOnce;
    gradient->for_each_stretch(begin, std::min(kClearedAtOnce, size - begin),
                               [&](const Block& block, std::int64_t) { access.clear(block); });
  });
}

}  // namespace

void clear_whole_gradients(WorkList list) {
  for (const Work* work : list)
    if (work->whole_gradient.array) clear_whole_gradient(*work);
}

void clear_gradients(WorkList list) {
  clear_whole_gradients(list);
  for_each_tile_range(
      list, [&](const Work& work, std::int64_t first, std::int64_t last, std::int64_t) {
        if (work.whole_gradient.array) return;
        in_compute_type(work, [&](auto type) {
          const TileAccess<decltype(type)> access(active_tier().kernels->of<decltype(type)>());
          for (std::int64_t tile = first; tile < last; ++tile) {
            if (work.rows)
              RowTile(work, tile).clear(access);
            else
              access.clear(work.iteration.block(kGradient, tile));
          }
        });
      });
}

}  // namespace fusestep::cpu
