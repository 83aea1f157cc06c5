// Tiles of random layouts: together they visit every element of every operand exactly once, in the
// same order for all operands, and nothing else.

#include <algorithm>
#include <numeric>
#include <set>

#include "core/layout.h"
#include "testing.h"

namespace fusestep::testing {
namespace {

// Where arrays without memory begin: only addresses are computed here.
std::byte* const kOrigin = reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40);

struct View {
  std::vector<std::int64_t> shape, strides;
  std::int64_t offset = 0;  // of the first element, in bytes
  DType dtype = DType::float32;
};

// A random transposed, sliced, reversed view that starts somewhere inside its memory.
View random_view(Random& random, const std::vector<std::int64_t>& shape) {
  const std::size_t ndim = shape.size();
  View view{shape, std::vector<std::int64_t>(ndim), 0, kAllDTypes[random.below(4)]};
  std::vector<std::size_t> order(ndim);
  std::iota(order.begin(), order.end(), 0);
  if (random.below(2))
    for (std::size_t i = ndim; i > 1; --i)
      std::swap(order[i - 1],
                order[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
  std::int64_t stride = item_size(view.dtype);
  const bool gaps = random.below(2), backwards = random.below(2);
  for (std::size_t i = ndim; i-- > 0;) {
    const std::size_t axis = order[i];
    const std::int64_t step = gaps ? 1 + random.below(3) : 1;
    const bool reversed = backwards && random.below(2);
    view.strides[axis] = reversed ? -stride * step : stride * step;
    if (reversed && shape[axis] > 0) view.offset += stride * step * (shape[axis] - 1);
    stride *= std::max<std::int64_t>(1, shape[axis]) * step;
  }
  return view;
}

// The byte offset of every element, by its index in C order.
std::vector<std::int64_t> offsets(const View& view) {
  std::vector<std::int64_t> result{view.offset};
  for (std::size_t axis = 0; axis < view.shape.size(); ++axis) {
    std::vector<std::int64_t> next;
    for (const std::int64_t base : result)
      for (std::int64_t i = 0; i < view.shape[axis]; ++i)
        next.push_back(base + i * view.strides[axis]);
    result = std::move(next);
  }
  return result;
}

void check(const std::vector<View>& views) {
  Iteration iteration;
  std::vector<Geometry> geometry;
  std::byte* const origin = kOrigin;
  for (std::size_t i = 0; i < views.size(); ++i) {
    iteration.operand[i] = {origin + views[i].offset, views[i].dtype};
    geometry.push_back({views[i].shape, views[i].strides});
  }
  iteration.plan(geometry);

  const auto expected0 = offsets(views[0]);
  CHECK(iteration.size == static_cast<std::int64_t>(expected0.size()));
  std::vector<std::vector<std::int64_t>> visited(views.size());
  for (std::int64_t tile = 0; tile < iteration.tiles(); ++tile) {
    for (std::size_t i = 0; i < views.size(); ++i) {
      const Block block = iteration.block(static_cast<int>(i), tile);
      CHECK(block.size() >= 1 && block.size() <= kTileSize);
      CHECK(block.dtype == views[i].dtype);
      for (std::int64_t r = 0; r < block.rows; ++r)
        for (std::int64_t c = 0; c < block.columns; ++c)
          visited[i].push_back(block.data - origin + r * block.row_stride +
                               c * block.column_stride);
    }
  }

  // Elements that are visited together belong together.
  std::vector<std::vector<std::int64_t>> all;
  for (const View& view : views) all.push_back(offsets(view));
  std::vector<std::size_t> by_offset(all[0].size());
  std::iota(by_offset.begin(), by_offset.end(), 0);
  std::sort(by_offset.begin(), by_offset.end(),
            [&](std::size_t a, std::size_t b) { return all[0][a] < all[0][b]; });
  CHECK(visited[0].size() == all[0].size());
  std::vector<bool> seen(all[0].size());
  for (std::size_t k = 0; k < visited[0].size(); ++k) {
    const auto at =
        std::lower_bound(by_offset.begin(), by_offset.end(), visited[0][k],
                         [&](std::size_t i, std::int64_t offset) { return all[0][i] < offset; });
    CHECK(at != by_offset.end() && all[0][*at] == visited[0][k] && !seen[*at]);
    seen[*at] = true;
    for (std::size_t i = 1; i < views.size(); ++i) CHECK(visited[i][k] == all[i][*at]);
  }
}

void run() {
  Random random(1);
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<std::int64_t> shape(static_cast<std::size_t>(random.below(6)));
    for (std::int64_t& extent : shape) extent = random.below(trial % 10 == 0 ? 40 : 7);
    std::int64_t size = 1;
    for (const std::int64_t extent : shape) size *= extent;
    if (size > 20'000) continue;
    std::vector<View> views;
    for (std::int64_t i = 0; i < 2 + random.below(4); ++i)
      views.push_back(random_view(random, shape));
    check(views);
  }

  // A broadcast gradient: a stride of zero.
  View parameter{{50, 60}, {240, 4}}, row{{50, 60}, {0, 4}}, column{{50, 60}, {4, 0}};
  check({parameter, row});
  check({parameter, column});

  // More axes than any sane array; extents of one everywhere.
  View deep{std::vector<std::int64_t>(64, 1), std::vector<std::int64_t>(64, 12345)};
  deep.shape[17] = 3;
  check({deep, deep});

  // Beyond 2^31 elements: only the arithmetic, no memory.
  const std::vector<std::int64_t> huge{3'000'000'000}, strides{2};
  Iteration iteration;
  iteration.operand[0] = iteration.operand[1] = {kOrigin, DType::float16};
  const Geometry geometry[] = {{huge, strides}, {huge, strides}};
  iteration.plan(geometry);
  CHECK(iteration.size == 3'000'000'000);
  const Block last = iteration.block(0, iteration.tiles() - 1);
  CHECK(last.data + 2 * last.columns == kOrigin + 6'000'000'000);

  const std::vector<std::int64_t> square{70'000, 70'000}, rows{140'000, 2}, columns{2, 140'000};
  const Geometry transposed[] = {{square, rows}, {square, columns}};
  iteration.plan(transposed);
  CHECK(iteration.layout && iteration.size == 4'900'000'000);
  const Block corner = iteration.block(1, iteration.tiles() - 1);
  CHECK(corner.data + (corner.rows - 1) * corner.row_stride +
            (corner.columns - 1) * corner.column_stride ==
        kOrigin + 2 * (4'900'000'000 - 1));

  // What overlaps itself, and what only looks as if it did.
  const auto disjoint = [](std::vector<std::int64_t> shape, std::vector<std::int64_t> s) {
    return elements_are_disjoint({shape, s}, 4);
  };
  CHECK(disjoint({3, 4}, {16, 4}));
  CHECK(disjoint({3, 4}, {4, 12}));
  CHECK(disjoint({3, 4}, {-16, 4}));
  CHECK(disjoint({0, 4}, {0, 0}));
  CHECK(disjoint({1, 4}, {0, 4}));
  CHECK(!disjoint({2}, {0}));
  CHECK(!disjoint({2}, {2}));
  CHECK(!disjoint({5, 5}, {4, 4}));
  CHECK(disjoint({2, 3}, {12, 8}));   // 0 8 16 and 12 20 28
  CHECK(disjoint({3, 3}, {12, 8}));   // and 24 32 40
  CHECK(!disjoint({3, 4}, {12, 8}));  // 24 twice
}

}  // namespace
}  // namespace fusestep::testing

int main() {
  fusestep::testing::run();
  std::puts("layout: passed");
}
