// Bits of tiles, draws, the progress of blocks; and parts of a parameter against the same elements
// by themselves.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/tile_bits.h"
#include "cpu/places.h"
#include "cpu/step.h"
#include "cpu/thread_pool.h"
#include "cpu/top.h"
#include "rules/block_progress.h"
#include "selections/blocks.h"
#include "selections/part.h"
#include "testing.h"

namespace fusestep::testing {
namespace {

using Numbers = std::vector<std::int64_t>;
using Flags = std::vector<bool>;

// ---- bits ----

TileBits bits_of(const Flags& flags) {
  TileBits bits;
  for (std::size_t i = 0; i < flags.size(); ++i)
    if (flags[i]) bits.set(static_cast<std::int64_t>(i), static_cast<std::int64_t>(i) + 1);
  return bits;
}

void check_bits(const Flags& flags) {
  const TileBits bits = bits_of(flags);
  const auto bytes = bits.bytes();
  Flags from_runs(flags.size());
  std::int64_t runs = 0;
  bits.for_each_run([&](std::int64_t begin, std::int64_t end) {
    ++runs;
    CHECK(bits.all(begin, end));
    CHECK(end == kTileSize || !bits[end]);
    for (; begin < end; ++begin) from_runs[static_cast<std::size_t>(begin)] = true;
  });
  CHECK(from_runs == flags);
  CHECK(bits.runs() == runs);
  CHECK(bits.count() == std::ranges::count(flags, true));
  CHECK(bits.any() == (bits.count() > 0));
  for (std::size_t i = 0; i < flags.size(); ++i) CHECK((bytes[i] != 0) == flags[i]);
  if (bits.any()) CHECK(bits[bits.first_set()]);
}

void test_bits() {
  Random random(1);
  for (const int density : {0, 1, 30, 500, 970, 999, 1000}) {
    Flags flags(static_cast<std::size_t>(kTileSize));
    for (std::size_t i = 0; i < flags.size(); ++i) flags[i] = random.below(1000) < density;
    check_bits(flags);
  }
  for (int i = 0; i < 200; ++i) {
    const std::int64_t a = random.below(kTileSize + 1), b = random.below(kTileSize + 1);
    TileBits range;
    range.set(std::min(a, b), std::max(a, b));
    CHECK(range.count() == std::abs(a - b));
    CHECK(range.all(std::min(a, b), std::max(a, b)));
    CHECK(range.runs() == (a != b));
  }
}

void test_places() {
  Random random(2);
  for (const std::int64_t most : {1, 2, 255, 256, 257, 70000}) {
    cpu::Places places;
    std::vector<std::uint32_t> keys(static_cast<std::size_t>(kTileSize));
    for (auto& key : keys) key = 4000000000u + static_cast<std::uint32_t>(random.below(most));
    for (std::int64_t i = 0; i < kTileSize; i += 1 + random.below(3)) places.add(i, i + 1);
    places.sort_by([&](std::int64_t place) { return keys[static_cast<std::size_t>(place)]; });
    const auto key = [&](std::int64_t i) { return keys[static_cast<std::size_t>(places[i])]; };
    for (std::int64_t i = 1; i < places.count(); ++i)
      CHECK(key(i - 1) < key(i) || (key(i - 1) == key(i) && places[i - 1] < places[i]));
  }
}

// ---- draws ----

void test_draws() {
  for (const std::int64_t blocks : {0, 1, 2, 10, 1000, 4097})
    for (const double fraction : {0.0, 1e-9, 0.1, 0.5, 0.75, 1.0}) {
      const Numbers drawn = selections::draw_blocks(blocks, fraction, {5, 7, 9});
      const double expected = fraction * static_cast<double>(blocks);
      CHECK(std::abs(static_cast<double>(drawn.size()) - expected) < 1);
      CHECK(std::ranges::adjacent_find(drawn, std::ranges::greater_equal{}) == drawn.end());
      CHECK(drawn.empty() || (drawn.front() >= 0 && drawn.back() < blocks));
      CHECK(drawn == selections::draw_blocks(blocks, fraction, {5, 7, 9}));
    }
  CHECK(selections::draw_blocks(1000, 0.1, {5, 7, 9}) !=
        selections::draw_blocks(1000, 0.1, {5, 8, 9}));
}

// ---- the progress of blocks ----

void test_progress() {
  const auto rule = RuleCase{"nadam", {}}.make();
  const std::int64_t size = 5000;
  Random random(3);
  std::vector<rules::Progress> expected(static_cast<std::size_t>(size));
  rules::BlockProgress progress;
  progress.split(size, 640, {}, *rule);
  for (const std::int64_t block : {640, 640, 1280, 96, 96, 5, 5, 3, 1}) {
    progress.refine(block);
    Flags flags(static_cast<std::size_t>(size));
    for (std::int64_t i = 0; i < size; ++i)
      flags[static_cast<std::size_t>(i)] =
          i % block == 0 ? random.below(2) == 0 : flags[static_cast<std::size_t>(i - 1)];
    for (std::int64_t first = 0; first < size; first += kTileSize) {
      const auto begin = flags.begin() + first;
      progress.advance(*rule, first,
                       bits_of(Flags(begin, begin + std::min(kTileSize, size - first))));
    }
    for (std::size_t i = 0; i < flags.size(); ++i)
      if (flags[i]) expected[i] = rule->advance(expected[i]);
    for (std::int64_t i = 0; i < size; ++i)
      CHECK(progress.of(i) == expected[static_cast<std::size_t>(i)]);
  }
  progress.resize(2 * size);
  CHECK(progress.of(size) == rules::Progress{});
  CHECK(progress.of(size - 1) == expected.back());
}

// ---- a part of a parameter ----

struct Adam {
  explicit Adam(std::int64_t size) : size(size), arrays(4) {
    Random random(4);
    for (auto& array : arrays) {
      array.resize(static_cast<std::size_t>(size));
      for (float& x : array) x = static_cast<float>(std::abs(random.number()));
    }
    work.compute = DType::float32;
    coefficients = rule->coefficients({7, 1}, DType::float32, 1e-3, 2);
    work.rule = &coefficients;
    part.size = size;
    part.operands = 4;
    part.selected.select_all(size);
    part.everything.select_all(size);
    for (int i = 0; i < 4; ++i) part.operand[static_cast<std::size_t>(i)].view(operand(i), shape());
    work.part = &part;
    count_operands(work, 2);
  }

  Operand operand(int i) {
    return {reinterpret_cast<std::byte*>(arrays[static_cast<std::size_t>(i)].data()),
            DType::float32};
  }
  Geometry shape() const { return {{&size, 1}, {&stride, 1}}; }
  void update() {
    const Work* const list[] = {&work};
    cpu::update(list, {});
  }

  std::int64_t size, stride = sizeof(float);
  std::unique_ptr<rules::AnyRule> rule = RuleCase{"adam", {}}.make();
  rules::Coefficients coefficients;
  std::vector<std::vector<float>> arrays;
  selections::Part part;
  Work work;
};

void check_part(const Flags& flags, bool tracks) {
  const auto size = std::ssize(flags);
  Adam all(size), part(size), before(size);
  std::vector<TileBits> tiles;
  for (std::int64_t first = 0; first < size; first += kTileSize) {
    const auto begin = flags.begin() + first;
    tiles.push_back(bits_of(Flags(begin, begin + std::min(kTileSize, size - first))));
  }
  part.part.selected.select_bits(size, tiles);
  part.part.tracks = tracks;
  all.update();
  part.update();
  for (std::size_t k = 0; k < 4; ++k)
    for (std::size_t i = 0; i < flags.size(); ++i) {
      const bool moves = flags[i] || (tracks && k >= kState);
      CHECK(part.arrays[k][i] == (moves ? all : before).arrays[k][i]);
    }
}

void test_parts() {
  for (const int threads : {1, 3}) {
    cpu::set_num_threads(threads);
    for (const int density : {0, 20, 300, 700, 990, 1000}) {
      Random random(5);
      Flags scattered(200'001), blocks(200'001);
      for (std::size_t i = 0; i < scattered.size(); ++i) {
        scattered[i] = random.below(1000) < density;
        blocks[i] = i % 300 == 0 ? random.below(1000) < density : blocks[i - 1];
      }
      for (const bool tracks : {false, true}) {
        check_part(scattered, tracks);
        check_part(blocks, tracks);
      }
    }
  }
}

void check_top(std::vector<float> gradient, double fraction) {
  const auto size = std::ssize(gradient);
  Adam adam(size);
  adam.arrays[1] = gradient;
  adam.part.operand[kGradient].view(adam.operand(1), adam.shape());
  const selections::Choice choice{.kind = selections::Choice::Kind::top, .fraction = fraction};
  adam.part.top = &choice;
  const selections::Selection found = cpu::find_top(adam.work, {});

  Numbers order(gradient.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::ranges::greater{}, [&](std::int64_t i) {
    return std::abs(gradient[static_cast<std::size_t>(i)]);
  });
  const auto count = static_cast<std::size_t>(std::ceil(fraction * static_cast<double>(size)));
  Flags expected(gradient.size());
  for (std::size_t i = 0; i < count; ++i) expected[static_cast<std::size_t>(order[i])] = true;
  for (std::int64_t i = 0; i < size; ++i)
    CHECK(found.holds(i) == expected[static_cast<std::size_t>(i)]);
}

void test_tops() {
  Random random(6);
  for (const int threads : {1, 3}) {
    cpu::set_num_threads(threads);
    for (const std::size_t size : {1u, 1000u, 300'000u}) {
      std::vector<float> random_numbers(size), ascending(size), few(size), equal(size, -2.0f);
      for (std::size_t i = 0; i < size; ++i) {
        random_numbers[i] = static_cast<float>(random.number());
        ascending[i] = static_cast<float>(i);
        few[i] = static_cast<float>(random.below(3) - 1);
      }
      for (const double fraction : {0.0, 0.125, 0.5, 1.0})
        for (const auto& numbers : {random_numbers, ascending, few, equal})
          check_top(numbers, fraction);
    }
  }
}

}  // namespace
}  // namespace fusestep::testing

int main() {
  using namespace fusestep::testing;
  test_bits();
  test_places();
  test_draws();
  test_progress();
  for_each_tier([](const char*) {
    test_parts();
    test_tops();
  });
}
