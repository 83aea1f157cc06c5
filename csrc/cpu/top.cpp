// How the k-th largest of many numbers is found in little more than one pass over them: a sample
// says between which two bounds it lies almost surely; one pass counts what is above and puts aside
// what is between, a few per cent. Where the sample has misled, or where more are equal than can be
// put aside, the bits of the k-th largest are found a few at a time instead, by counting.
//
// Another thread may write to the gradient meanwhile, so that passes do not agree. Then who knows
// what is selected; but no loop may rely on it.

#include "cpu/top.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/fp_environment.h"
#include "cpu/part_updater.h"
#include "cpu/thread_pool.h"

namespace fusestep::cpu {
namespace {

constexpr std::int64_t kSampledTiles = 64;
constexpr std::int64_t kTilesOfChunk = 64;

std::int64_t wanted(double fraction, std::int64_t size) {
  const double exact = fraction * static_cast<double>(size);
  constexpr double kRounding = 1e-12;  // 0.07 x 100 is more than 7
  return std::min(size, static_cast<std::int64_t>(std::ceil(exact - kRounding * exact)));
}

// Magnitudes as integers in the same order.
template <class T>
using Key = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;

template <class T>
class Top {
 public:
  Top(const Work& work, const StepOptions& options)
      : work_(work),
        part_(*work.part),
        options_(options),
        tiles_(ceil_div(part_.size, kTileSize)) {}

  std::vector<TileBits> select(std::int64_t count) {
    std::vector<TileBits> selected(static_cast<std::size_t>(tiles_));
    if (count == 0) return selected;
    const Key<T> least = count == part_.size ? 0 : kth_largest(count);
    std::atomic<std::int64_t> found = 0;
    for_each_tile([&](std::int64_t tile, const Key<T>* keys, std::int64_t size) {
      const TileBits bits = where([=](std::int64_t i) { return keys[i] >= least; }, size);
      selected[static_cast<std::size_t>(tile)] = bits;
      found += bits.count();
    });
    drop_last_equal(least, found - count, selected);
    return selected;
  }

 private:
  template <class Condition>
  static TileBits where(Condition condition, std::int64_t size) {
    TileBits::Bytes holds{};
    for (std::int64_t i = 0; i < size; ++i) holds[static_cast<std::size_t>(i)] = condition(i);
    return TileBits::of(holds);
  }

  // Of those that are equal to `least`, the last `count` are not selected after all.
  void drop_last_equal(Key<T> least, std::int64_t count, std::vector<TileBits>& selected) {
    const IeeeEnvironment ieee;
    Reader reader(*this);
    for (std::int64_t tile = tiles_; count > 0 && tile > 0;) {
      TileBits& bits = selected[static_cast<std::size_t>(--tile)];
      if (!bits.any()) continue;
      const Key<T>* const keys = reader.read(tile);
      for (std::int64_t i = part_.size_of(tile); i-- > 0 && count > 0;) {
        if (keys[i] != least) continue;
        bits.unset(i);
        --count;
      }
    }
  }

  struct Bounds {
    Key<T> least, most;
    bool hold(Key<T> key) const { return key >= least && key <= most; }
  };

  Key<T> kth_largest(std::int64_t k) {
    if (const std::optional<Key<T>> found = kth_largest_within(likely_bounds(k), k)) return *found;
    return kth_largest_by_counting(k);
  }

  // Between which the k-th largest would lie by what a sample says, five standard deviations apart.
  Bounds likely_bounds(std::int64_t k) {
    const IeeeEnvironment ieee;
    Reader reader(*this);
    std::vector<Key<T>> sample;
    const std::int64_t sampled = std::min(kSampledTiles, tiles_);
    for (std::int64_t i = 0; i < sampled; ++i) {
      const std::int64_t tile = i * tiles_ / sampled;
      const Key<T>* const keys = reader.read(tile);
      sample.insert(sample.end(), keys, keys + part_.size_of(tile));
    }
    const auto size = static_cast<double>(sample.size());
    const double share = static_cast<double>(k) / static_cast<double>(part_.size);
    const double margin = 5 * std::sqrt(size * share * (1 - share)) + 1;
    const auto of_rank = [&](double rank) {  // 0 is the largest
      const auto at = sample.begin() + static_cast<std::ptrdiff_t>(rank);
      std::ranges::nth_element(sample, at, std::greater());
      return *at;
    };
    const double low = size * share + margin, high = size * share - margin;
    return {low < size ? of_rank(low) : Key<T>{0},
            high >= 0 ? of_rank(high) : static_cast<Key<T>>(~Key<T>{0})};
  }

  std::optional<Key<T>> kth_largest_within(const Bounds& bounds, std::int64_t k) {
    std::atomic<std::int64_t> above = 0;
    std::vector<Key<T>> inside;
    std::mutex mutex;
    bool is_full = false;
    const std::int64_t room = part_.size / 8 + 16 * kTileSize;
    inside.reserve(static_cast<std::size_t>(room));  // nothing may be thrown in the loop
    for_each_tile([&](std::int64_t, const Key<T>* keys, std::int64_t size) {
      std::int64_t larger = 0;
      for (std::int64_t i = 0; i < size; ++i) larger += keys[i] > bounds.most;
      above += larger;
      const TileBits held = where([=](std::int64_t i) { return bounds.hold(keys[i]); }, size);
      if (!held.any()) return;
      const std::lock_guard lock(mutex);
      is_full = is_full || static_cast<std::int64_t>(inside.size()) + held.count() > room;
      if (is_full) return;
      held.for_each_run([&](std::int64_t begin, std::int64_t end) {
        inside.insert(inside.end(), keys + begin, keys + end);
      });
    });
    const std::int64_t rank = k - 1 - above;
    if (is_full || rank < 0 || rank >= std::ssize(inside)) return std::nullopt;
    std::ranges::nth_element(inside, inside.begin() + rank, std::greater());
    return inside[static_cast<std::size_t>(rank)];
  }

  // From the highest digit to the lowest.
  Key<T> kth_largest_by_counting(std::int64_t k) {
    constexpr int kDigitBits = 8, kBits = sizeof(Key<T>) * 8;
    Key<T> found = 0;
    for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
      std::array<std::int64_t, 1 << kDigitBits> counts{};
      std::mutex mutex;
      for_each_tile([&](std::int64_t, const Key<T>* keys, std::int64_t size) {
        std::array<std::int64_t, 1 << kDigitBits> here{};
        for (std::int64_t i = 0; i < size; ++i) {
          const Key<T> difference = (keys[i] >> shift) ^ (found >> shift);
          if (difference >> kDigitBits == 0) ++here[(keys[i] >> shift) % here.size()];
        }
        const std::lock_guard lock(mutex);
        for (std::size_t digit = 0; digit < here.size(); ++digit) counts[digit] += here[digit];
      });
      std::size_t digit = counts.size() - 1;
      for (; k > counts[digit] && digit > 0; --digit) k -= counts[digit];
      found |= static_cast<Key<T>>(digit) << shift;
    }
    return found;
  }

  // Magnitudes of one tile after the other.
  class Reader {
   public:
    explicit Reader(const Top& top)
        : top_(top),
          gradient_(active_tier().kernels->of<T>(), top.part_),
          updater_(*active_tier().kernels, top.work_, top.options_) {}

    const Key<T>* read(std::int64_t tile) {
      const std::int64_t size = top_.part_.size_of(tile);
      const T* values = values_.data();
      if (top_.part_.top->by == selections::Choice::Size::of_update)
        updater_.find_sizes(tile, values_.data());
      else
        values = gradient_.read(kGradient, tile * kTileSize, size, values_.data());
      constexpr Key<T> kAllButSign = static_cast<Key<T>>(~Key<T>{0}) >> 1;
      constexpr auto kInfinity = std::bit_cast<Key<T>>(std::numeric_limits<T>::infinity());
      for (std::int64_t i = 0; i < size; ++i) {
        const Key<T> magnitude = std::bit_cast<Key<T>>(values[i]) & kAllButSign;
        keys_[static_cast<std::size_t>(i)] = magnitude > kInfinity ? kAllButSign : magnitude;
      }
      return keys_.data();
    }

   private:
    const Top& top_;
    PartReader<T> gradient_;
    PartUpdater<T> updater_;
    std::array<T, static_cast<std::size_t>(kTileSize)> values_;
    std::array<Key<T>, static_cast<std::size_t>(kTileSize)> keys_;
  };

  // From several threads. visit(tile, keys, how many)
  template <class Visit>
  void for_each_tile(Visit visit) {
    parallel_for(ceil_div(tiles_, kTilesOfChunk), num_threads(), [&](std::int64_t chunk) {
      const IeeeEnvironment ieee;
      Reader reader(*this);
      const std::int64_t end = std::min(tiles_, (chunk + 1) * kTilesOfChunk);
      for (std::int64_t tile = chunk * kTilesOfChunk; tile < end; ++tile)
        visit(tile, reader.read(tile), part_.size_of(tile));
    });
  }

  const Work& work_;
  const selections::Part& part_;
  const StepOptions& options_;
  std::int64_t tiles_;
};

}  // namespace

selections::Selection find_top(const Work& work, const StepOptions& options) {
  const selections::Part& part = *work.part;
  const std::int64_t count = wanted(part.top->fraction, part.size);
  selections::Selection found;
  found.select_bits(part.size, work.compute == DType::float64
                                   ? Top<double>(work, options).select(count)
                                   : Top<float>(work, options).select(count));
  return found;
}

}  // namespace fusestep::cpu
