#include "engine/part_tables.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <span>
#include <tuple>
#include <utility>

#include "engine/stepper.h"
#include "selections/part.h"

namespace fusestep::engine {
namespace {

// Consecutive elements, in C order; and how far they have all come.
struct Stretch {
  std::int64_t begin, end;
  rules::Progress progress = {};

  auto age() const { return std::tuple(progress.step, progress.momentum_product); }
};
using Stretches = std::span<const Stretch>;

// What a part moves, in as few stretches as possible.
std::vector<Stretch> moved_stretches(const selections::Part& part) {
  std::vector<Stretch> stretches;
  for (std::int64_t i = 0; i < part.tiles(); ++i) {
    const std::int64_t first = part.tile(i) * kTileSize;
    part.moved(i).for_each_run([&](std::int64_t begin, std::int64_t end) {
      if (!stretches.empty() && stretches.back().end == first + begin)
        stretches.back().end = first + end;
      else
        stretches.push_back({first + begin, first + end});
    });
  }
  return stretches;
}

// The same where those that have come equally far stand together, the youngest first.
std::vector<Stretch> moved_stretches_by_age(const selections::Part& part) {
  std::vector<Stretch> stretches;
  for (const auto& [begin, end, _] : moved_stretches(part))
    for (std::int64_t at = begin; at < end; at = stretches.back().end)
      stretches.push_back({at, part.progress->end_of_equal(at, end), part.progress->of(at)});
  std::ranges::stable_sort(stretches, {}, &Stretch::age);
  return stretches;
}

// Stretches, cut into pieces of one length; what is left at the end of the parameter is shorter.
struct Pieces {
  std::int64_t length = 0;
  std::vector<std::int64_t> first;  // the element that each begins with
  Stretch rest{0, 0};

  Pieces(Stretches stretches, std::int64_t piece) : length(piece) {
    for (const auto& [begin, end, _] : stretches) {
      std::int64_t at = begin;
      for (; at + length <= end; at += length) first.push_back(at);
      if (at < end) rest = {at, end};
    }
  }

  bool has_rest() const { return rest.begin < rest.end; }

  std::vector<std::int64_t> numbers() const {
    std::vector<std::int64_t> result;
    result.reserve(first.size());
    for (const std::int64_t element : first) result.push_back(element / length);
    return result;
  }
};

// The largest length of such pieces.
std::int64_t common_length(Stretches stretches, std::int64_t size) {
  std::int64_t length = 0;
  for (const auto& [begin, end, _] : stretches)
    length = std::gcd(length, std::gcd(begin, end == size ? 0 : end));
  return length == 0 ? size : length;
}

// What `whole` walks in C order, cut down to one stretch.
Work one_stretch(const Work& whole, const Stretch& stretch) {
  Work work = whole;
  work.iteration.plan_dense(stretch.end - stretch.begin, whole.iteration.operands);
  for (Operand& operand :
       std::span(work.iteration.operand).first(static_cast<std::size_t>(whole.iteration.operands)))
    operand.data += stretch.begin * item_size(operand.dtype);
  return work;
}

// The same, cut down to several.
void add_in_c_order(const Work& whole, Stretches stretches, std::int64_t size, Tables& tables) {
  if (stretches.size() == 1) return tables.add(one_stretch(whole, stretches.front()));
  const Pieces pieces(stretches, common_length(stretches, size));
  Work work = whole;
  work.iteration.plan_dense(pieces.length, whole.iteration.operands);
  gradients::Rows rows;
  rows.plan_pairs(pieces.numbers(), pieces.numbers());
  for (std::size_t i = 0; i < rows.stride.size(); ++i)
    rows.stride[i] = pieces.length * item_size(whole.iteration.operand[i].dtype);
  tables.add(work, std::move(rows));
  if (pieces.has_rest()) tables.add(one_stretch(whole, pieces.rest));
}

// The same in any layout, where the stretches consist of the parameter's rows.
void add_own_rows(const Update& update, const Work& whole, Stretches stretches, Tables& tables) {
  const Pieces pieces(stretches, whole.part->row_size);
  gradients::Rows rows;
  Work work = update.slot->work_on_rows(update.gradient, rows);
  work.rule = whole.rule;
  work.anchor = whole.anchor;
  work.gradient_factor = whole.gradient_factor;
  rows.plan_pairs(pieces.numbers(), pieces.numbers());
  tables.add(work, std::move(rows));
}

// Stretches that have come equally far; `work` is all of the update, with their coefficients.
void add_stretches(const Update& update, Work work, Stretches stretches, Tables& tables) {
  const std::int64_t size = work.part->size;
  const bool are_all = stretches.front().begin == 0 && stretches.front().end == size;
  if (!are_all && !update.slot->is_in_c_order(update.gradient))
    return add_own_rows(update, work, stretches, tables);
  work.part = nullptr;
  if (are_all) return tables.add(work);
  add_in_c_order(work, stretches, size, tables);
}

Work of_two(const Operand& parameter, const Operand& gradient, DType compute) {
  Work work;
  work.compute = compute;
  work.iteration.operand[kParameter] = parameter;
  work.iteration.operand[kGradient] = gradient;
  return work;
}

// A step of zeros by SGD with a learning rate of 1: they become the gradient with its sign
// reversed, which no square shows.
rules::Coefficients copying(DType compute) {
  return rules::make_rule("sgd")->coefficients({.step = 1}, compute, 1, 0);
}

// Where elements, which ascend, are among the tiles that a part visits.
std::vector<std::int64_t> places_in_tiles(const selections::Part& part,
                                          const std::vector<std::int64_t>& elements) {
  std::vector<std::int64_t> places;
  places.reserve(elements.size());
  std::int64_t visited = 0;
  for (const std::int64_t element : elements) {
    while (part.tile(visited) < element / kTileSize) ++visited;
    places.push_back(visited * kTileSize + element % kTileSize);
  }
  return places;
}

// Rows of scratch memory begin at any element; and so do those of a gradient in C order.
gradients::Rows copied_rows(const selections::Part& part, const Pieces& pieces, bool in_c_order) {
  gradients::Rows rows;
  rows.plan_pairs(places_in_tiles(part, pieces.first),
                  in_c_order ? pieces.first : pieces.numbers());
  return rows;
}

void plan_copy(const arrays::Array& gradient, std::int64_t length, Work& copy,
               gradients::Rows& rows) {
  const std::int64_t item = item_size(copy.compute);
  rows.stride[kParameter] = item;
  if (gradient.c_contiguous) {
    rows.stride[kGradient] = item_size(gradient.dtype);
    return copy.iteration.plan_dense(length, 2);
  }
  const auto [shape, strides] = gradient.geometry();
  const std::vector<std::int64_t> dense = c_strides(shape, item);
  rows.stride[kGradient] = strides[0];
  copy.iteration.plan(std::array{Geometry{shape.subspan(1), std::span(dense).subspan(1)},
                                 Geometry{shape.subspan(1), strides.subspan(1)}});
}

}  // namespace

void Tables::add(const Work& work) { list_.push_back(&work_.emplace_back(work)); }

void Tables::add(const Work& work, gradients::Rows rows) {
  add(work);
  work_.back().rows = &rows_.emplace_back(std::move(rows));
}

void add_moving(const Update& update, Tables& tables) {
  const Work& work = update.slot->work;
  if (!work.part) return tables.add(&work);
  const selections::Part& part = *work.part;
  const std::vector<Stretch> stretches = moved_stretches_by_age(part);
  for (auto first = stretches.begin(); first != stretches.end();) {
    const auto last = std::find_if(
        first, stretches.end(), [&](const Stretch& other) { return other.age() != first->age(); });
    Work equal = work;
    equal.rule = tables.keep(part.rule->coefficients(part.rule->advance(first->progress),
                                                     work.compute, part.lr, part.states));
    add_stretches(update, equal, {first, last}, tables);
    first = last;
  }
}

void add_whole_gradient(const Update& update, Tables& tables) {
  const Work& work = update.slot->work;
  if (!work.whole_gradient.array) return tables.add(&work);
  const Operand gradient = update.gradient.operand();
  Work whole = of_two(gradient, gradient, work.compute);
  whole.iteration.plan(std::array{update.gradient.geometry(), update.gradient.geometry()});
  tables.add(whole);
}

std::size_t SummedGradients::scratch_bytes(const Update& update) {
  const Work& work = update.slot->work;
  if (!work.part) return 0;
  const std::int64_t granule = work.part->visited().granule();
  const bool are_tiles = granule % kTileSize == 0 || granule >= work.part->size;
  if (are_tiles && update.slot->is_in_c_order(update.gradient)) return 0;
  return static_cast<std::size_t>(work.part->tiles() * kTileSize * item_size(work.compute));
}

void SummedGradients::add(const Update& update, std::byte* scratch) {
  const Work& work = update.slot->work;
  if (!work.part) return summed_.add(&work);
  if (scratch_bytes(update) > 0) return add_copies(update, {scratch, work.compute});
  const std::vector<Stretch> stretches = moved_stretches(*work.part);
  if (!stretches.empty()) add_stretches(update, work, stretches, summed_);
}

void SummedGradients::add_copies(const Update& update, const Operand& scratch) {
  const Work& work = update.slot->work;
  const selections::Part& part = *work.part;
  const arrays::Array& gradient = update.gradient;
  Work tiles = of_two(scratch, scratch, work.compute);
  tiles.iteration.plan_dense(part.tiles() * kTileSize, 2);
  cleared_.add(tiles);
  summed_.add(tiles);

  const std::vector<Stretch> stretches = moved_stretches(part);
  const Pieces pieces(stretches,
                      gradient.c_contiguous ? common_length(stretches, part.size) : part.row_size);
  Work copy = of_two(scratch, gradient.operand(), work.compute);
  copy.rule = copied_.keep(copying(work.compute));
  if (pieces.has_rest()) {
    Work rest = copy;
    rest.iteration.plan_dense(pieces.rest.end - pieces.rest.begin, 2);
    rest.iteration.operand[kParameter].data +=
        places_in_tiles(part, {pieces.rest.begin}).front() * item_size(scratch.dtype);
    rest.iteration.operand[kGradient].data += pieces.rest.begin * item_size(gradient.dtype);
    copied_.add(rest);
  }
  gradients::Rows rows = copied_rows(part, pieces, gradient.c_contiguous);
  plan_copy(gradient, pieces.length, copy, rows);
  copied_.add(copy, std::move(rows));
}

}  // namespace fusestep::engine
