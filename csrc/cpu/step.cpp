#include "cpu/step.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/fp_environment.h"
#include "cpu/thread_pool.h"
#include "cpu/tile_access.h"
#include "rules/registry.h"

namespace fusestep::cpu {
namespace {

// Below this many elements a second thread costs more than it saves: it has to be woken up.
constexpr std::int64_t kParallelElements = 1 << 17;

// The least that a thread claims at a time, in tiles.
constexpr std::int64_t kLeastChunk = 32;

// From this size on a run is worth starting at a cache line, so that no vector crosses one.
constexpr std::int64_t kAlignedRun = 4096;
constexpr std::uintptr_t kCacheLine = 64;

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
template <class Visit>
void for_each_tile_range(WorkList list, Visit visit, const Errand& errand = {}) {
  std::int64_t elements = 0;
  for (const Work* work : list) elements += work->iteration.size;

  if (elements < kParallelElements || num_threads() == 1) {
    if (errand) errand();
    const IeeeEnvironment ieee;
    std::int64_t before = 0;
    for (const Work* work : list) {
      const std::int64_t tiles = work->iteration.tiles();
      if (tiles > 0) visit(*work, std::int64_t{0}, tiles, before);
      before += tiles;
    }
    return;
  }

  std::vector<std::int64_t> ends;  // tiles of the list up to and including each parameter
  ends.reserve(list.size());
  std::int64_t total = 0;
  for (const Work* work : list) ends.push_back(total += work->iteration.tiles());

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
class Updater {
 public:
  Updater(const KernelTable& kernels, const Work& work, const StepOptions& options)
      : kernels_(kernels.of<T>()),
        access_(kernels_),
        iteration_(work.iteration),
        loop_(kernels_.update[work.rule->loop]),
        rule_(work.rule->bytes),
        factor_(static_cast<T>(work.gradient_factor * options.gradient_factor)),
        clear_(options.clear_gradients) {}

  void operator()(std::int64_t first, std::int64_t last) const {
    if (is_one_run(first, last)) return update_run(first, last);
    for (std::int64_t tile = first; tile < last; ++tile) update_tile(tile);
  }

 private:
  // True where the rule's loop can go straight through the arrays' own memory.
  bool is_one_run(std::int64_t first, std::int64_t last) const {
    if (iteration_.layout || (clear_ && last - first > 1)) return false;
    for (int i = 0; i < iteration_.operands; ++i)
      if (!TileAccess<T>::in_place(iteration_.dense(i, 0, 1))) return false;
    return true;
  }

  void update_run(std::int64_t first, std::int64_t last) const {
    const std::int64_t begin = first * kTileSize;
    const std::int64_t size = std::min(last * kTileSize, iteration_.size) - begin;
    std::array<T*, kMaxOperands> at{};
    for (int i = 0; i < iteration_.operands; ++i)
      at[i] = reinterpret_cast<T*>(iteration_.operand[i].data) + begin;

    const auto past_line = reinterpret_cast<std::uintptr_t>(at[kParameter]) % kCacheLine;
    if (size >= kAlignedRun && past_line != 0) {
      const auto head = static_cast<std::int64_t>((kCacheLine - past_line) / sizeof(T));
      call_loop(at, head);
      for (int i = 0; i < iteration_.operands; ++i) at[i] += head;
      call_loop(at, size - head);
    } else {
      call_loop(at, size);
    }
    if (clear_) access_.clear(iteration_.dense(kGradient, begin, size));
  }

  void update_tile(std::int64_t tile) const {
    alignas(kCacheLine) T buffer[kMaxOperands][kTileSize];
    std::array<Block, kMaxOperands> block;
    std::array<T*, kMaxOperands> at{};
    for (int i = 0; i < iteration_.operands; ++i) {
      block[i] = iteration_.block(i, tile);
      at[i] = access_.read(block[i], buffer[i]);
    }
    call_loop(at, block[0].size());
    for (int i = 0; i < iteration_.operands; ++i)
      if (i != kGradient && at[i] == buffer[i]) access_.store(buffer[i], block[i]);
    if (clear_) access_.clear(block[kGradient]);
  }

  void call_loop(const std::array<T*, kMaxOperands>& at, std::int64_t size) const {
    loop_(rule_, Run<T>{size,
                        at[kParameter],
                        {at[kGradient], factor_},
                        {at[kState], at[kState + 1], at[kState + 2]}});
  }

  const Kernels<T>& kernels_;
  TileAccess<T> access_;
  const Iteration& iteration_;
  typename Kernels<T>::Update loop_;
  const void* rule_;
  T factor_;
  bool clear_;
};

template <class T>
double sum_of_squares(const KernelTable& table, const Work& work, std::int64_t tile,
                      double prescale) {
  const Kernels<T>& kernels = table.of<T>();
  alignas(kCacheLine) T buffer[kTileSize];
  const Block block = work.iteration.block(kGradient, tile);
  const T* elements = TileAccess<T>(kernels).read(block, buffer);
  return kernels.sum_of_squares(elements, block.size(), prescale);
}

}  // namespace

std::vector<double> tile_sums(WorkList list, double prescale) {
  const KernelTable& table = *active_tier().kernels;
  std::int64_t tiles = 0;
  for (const Work* work : list) tiles += work->iteration.tiles();
  std::vector<double> sums(static_cast<std::size_t>(tiles));
  for_each_tile_range(
      list, [&](const Work& work, std::int64_t first, std::int64_t last, std::int64_t before) {
        in_compute_type(work, [&](auto type) {
          for (std::int64_t tile = first; tile < last; ++tile)
            sums[static_cast<std::size_t>(before + tile - first)] =
                sum_of_squares<decltype(type)>(table, work, tile, prescale);
        });
      });
  return sums;
}

void update(WorkList list, const StepOptions& options, const Errand& errand) {
  const KernelTable& kernels = *active_tier().kernels;
  for_each_tile_range(
      list,
      [&](const Work& work, std::int64_t first, std::int64_t last, std::int64_t) {
        in_compute_type(
            work, [&](auto type) { Updater<decltype(type)>(kernels, work, options)(first, last); });
      },
      errand);
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

void clear_gradients(WorkList list) {
  for_each_tile_range(
      list, [&](const Work& work, std::int64_t first, std::int64_t last, std::int64_t) {
        in_compute_type(work, [&](auto type) {
          const TileAccess<decltype(type)> access(active_tier().kernels->of<decltype(type)>());
          for (std::int64_t tile = first; tile < last; ++tile)
            access.clear(work.iteration.block(kGradient, tile));
        });
      });
}

}  // namespace fusestep::cpu
