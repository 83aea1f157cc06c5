#include "engine/part_tables.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <span>
#include <tuple>
#include <utility>

#include "engine/stepper.h"
#include "selections/part.h"

namespace fusestep::engine {
namespace {

// Consecutive elements, in C order or in that of memory; and how far they have all come.
struct Stretch {
  std::int64_t begin, end;
  rules::Progress progress = {};

  auto age() const { return std::tuple(progress.step, progress.momentum_product); }
};
using Stretches = std::span<const Stretch>;

// Whether values change that are in one block of state with others that do not. Then all of the
// block moves, and a word of bits says whose value does.
bool tears_blocks(const selections::Part& part) {
  return part.has_blocks && part.tracks && part.selected.granule() % kBlockElements != 0;
}

// Adds to the last stretch what follows it.
void append(std::vector<Stretch>& stretches, std::int64_t begin, std::int64_t end) {
  if (!stretches.empty() && stretches.back().end == begin)
    stretches.back().end = end;
  else
    stretches.push_back({begin, end});
}

// What bits_of(i) says of each tile, in as few stretches as possible.
template <class BitsOf>
std::vector<Stretch> stretches_of(const selections::Part& part, BitsOf bits_of) {
  std::vector<Stretch> stretches;
  for (std::int64_t i = 0; i < part.tiles(); ++i) {
    const std::int64_t first = part.tile(i) * kTileSize;
    bits_of(i).for_each_run([&](std::int64_t begin, std::int64_t end) {
      append(stretches, first + begin, first + end);
    });
  }
  return stretches;
}

std::vector<Stretch> moved_stretches(const selections::Part& part) {
  return stretches_of(part, [&](std::int64_t i) { return part.moved(i); });
}

// Of what moves: the elements whose value changes, or those whose value is kept; but all of them at
// once where there are words that say which.
std::vector<Stretch> moved_stretches(const selections::Part& part, bool keeps_value) {
  if (tears_blocks(part)) return keeps_value ? std::vector<Stretch>{} : moved_stretches(part);
  return stretches_of(part, [&](std::int64_t i) {
    const TileBits moved = part.moved(i), written = part.written(part.tile(i), moved);
    return keeps_value ? moved.without(written) : written;
  });
}

// Cut where elements have not come as far; those that have stand together, the youngest first.
std::vector<Stretch> by_age(const selections::Part& part, const std::vector<Stretch>& stretches) {
  if (!part.progress) return stretches;
  std::vector<Stretch> cut;
  for (const auto& [begin, end, _] : stretches)
    for (std::int64_t at = begin; at < end; at = cut.back().end)
      cut.push_back({at, part.progress->end_of_equal(at, end), part.progress->of(at)});
  std::ranges::stable_sort(cut, {}, &Stretch::age);
  return cut;
}

// Places in the parameter, the gradient and the state, which has one layout: elements of each,
// counted from its first.
using Places = std::array<std::int64_t, 3>;

// How one of them lies in memory.
class InMemory {
 public:
  explicit InMemory(const FlatArray& array)
      : array_(array), item_(item_size(array.dtype())), first_(array.at(0)) {}

  std::int64_t place(std::int64_t element) const { return (array_.at(element) - first_) / item_; }

  // So many elements from this one on lie together.
  std::int64_t together(std::int64_t element) const {
    return array_.block(element, 1).column_stride == item_ ? array_.stretch(element) : 1;
  }

 private:
  const FlatArray& array_;
  std::int64_t item_;
  const std::byte* first_;
};

// Elements that lie together, in C order and in memory.
struct Run {
  std::int64_t element, count;
  Places place{};
};

// Of these operands; the places in others remain 0. Runs may be single elements.
std::vector<Run> runs_in_memory(const selections::Part& part, Stretches stretches,
                                std::initializer_list<int> operands) {
  std::vector<Run> runs;
  for (const auto& [begin, end, _] : stretches) {
    for (std::int64_t at = begin; at < end; at += runs.back().count) {
      Run run{at, end - at};
      for (const int i : operands) {
        if (i >= part.operands) continue;
        const auto operand = static_cast<std::size_t>(i);
        const InMemory memory(part.operand[operand]);
        run.place[operand] = memory.place(at);
        run.count = std::min(run.count, memory.together(at));
      }
      runs.push_back(run);
    }
  }
  return runs;
}

std::vector<Run> runs_in_c_order(Stretches stretches) {
  std::vector<Run> runs;
  for (const auto& [begin, end, _] : stretches)
    runs.push_back({begin, end - begin, {begin, begin, begin}});
  return runs;
}

// Runs, cut into pieces of one length, the largest that there is; or the largest that divides
// `whole`, if that is not 0. Where the last run ends with the parameter, its end may be shorter.
struct Pieces {
  std::int64_t length = 0;
  bool are_rows = false;  // the parameter's own, in whatever layout
  std::vector<Run> runs;  // of that length
  Run rest{0, 0};

  Pieces(const std::vector<Run>& whole_runs, std::int64_t size, std::int64_t whole)
      : length(whole) {
    for (const Run& run : whole_runs) {
      for (const std::int64_t place : run.place) length = std::gcd(length, place);
      length = std::gcd(length, run.element);
      if (run.element + run.count != size) length = std::gcd(length, run.count);
    }
    if (length == 0) length = std::max(size, std::int64_t{1});
    for (const Run& run : whole_runs) {
      std::int64_t at = 0;
      for (; at + length <= run.count; at += length) runs.push_back(part_of(run, at, length));
      if (at < run.count) rest = part_of(run, at, run.count - at);
    }
  }

  static Run part_of(const Run& run, std::int64_t begin, std::int64_t count) {
    Run part{run.element + begin, count, run.place};
    for (std::int64_t& place : part.place) place += begin;
    return part;
  }

  std::vector<std::int64_t> first_elements() const {
    std::vector<std::int64_t> result;
    result.reserve(runs.size());
    for (const Run& run : runs) result.push_back(run.element);
    return result;
  }

  // Where they are in an array, counted in pieces.
  std::vector<std::int64_t> numbers(std::size_t operand) const {
    std::vector<std::int64_t> result;
    result.reserve(runs.size());
    for (const Run& run : runs) result.push_back(run.place[operand] / length);
    return result;
  }
};

// A piece does not go beyond a row of a gradient that is one of rows, nor is it torn there.
Pieces pieces_of(const Update& update, const std::vector<Run>& runs) {
  const selections::Part& part = *update.slot->work.part;
  if (!part.rows) return {runs, part.size, 0};
  return {runs, part.size, update.slot->moved_by(update).c_contiguous ? part.row_size : 1};
}

Pieces rows_as_pieces(const selections::Part& part, Stretches stretches) {
  Pieces rows{runs_in_c_order(stretches), part.size, part.row_size};
  rows.are_rows = true;
  return rows;
}

bool are_rows(const selections::Part& part, Stretches stretches) {
  return std::ranges::all_of(stretches, [&](const Stretch& stretch) {
    return stretch.begin % part.row_size == 0 && stretch.end % part.row_size == 0;
  });
}

// A table in which each piece is the row `to`, and moves by its row of a dense gradient; or by the
// sum of its part of the rows that are listed for it.
gradients::Rows table_of(const selections::Part& part, const Pieces& pieces,
                         std::vector<std::int64_t> to) {
  gradients::Rows table;
  if (!part.rows) {
    std::vector<std::int64_t> from = pieces.numbers(kGradient);
    if (from == to)
      table.plan_in_place(std::move(to));
    else
      table.plan_pairs(std::move(to), std::move(from));
    return table;
  }
  const InMemory values(part.operand[kGradient]);
  std::vector<std::int64_t> first{0}, sources;
  for (const Run& run : pieces.runs) {
    const std::int64_t i = part.rows->find(run.element / part.row_size);
    for (std::int64_t k = 0; k < part.rows->sources(i); ++k) {
      const std::int64_t row = part.rows->source(i, k);
      const std::int64_t element = row * part.row_size + run.element % part.row_size;
      sources.push_back(pieces.are_rows ? row : values.place(element) / pieces.length);
    }
    first.push_back(std::ssize(sources));
  }
  table.plan_sums(std::move(to), std::move(first), std::move(sources));
  return table;
}

void shift(Operand& operand, std::int64_t elements) {
  operand.data += elements * item_size(operand.dtype);
  operand.powers = operand.powers_at(elements);
}

// What `whole` is to do with so many elements from the first of each array on.
Work from_first_element(const selections::Part& part, const Work& whole, std::int64_t count) {
  Work work = whole;
  for (std::size_t i = 0; i < static_cast<std::size_t>(part.operands); ++i)
    work.iteration.operand[i] = part.operand[i].operand();
  work.iteration.plan_dense(count, part.operands);
  work.numbers = {};
  return work;
}

Work one_run(const selections::Part& part, const Work& whole, const Run& run) {
  Work work = from_first_element(part, whole, run.count);
  for (std::size_t i = 0; i < static_cast<std::size_t>(part.operands); ++i)
    shift(work.iteration.operand[i], run.place[std::min<std::size_t>(i, kState)]);
  work.numbers.first = run.element;
  return work;
}

// Of each block of runs that consist of blocks: the elements whose value changes.
std::vector<std::int64_t> written_words(const selections::Part& part, std::span<const Run> runs) {
  std::vector<std::int64_t> words;
  for (const Run& run : runs)
    for (std::int64_t at = run.element; at < run.element + run.count; at += kBlockElements) {
      const TileBits bits = part.selected.bits(at / kTileSize);
      words.push_back(static_cast<std::int64_t>(
          bits.words[static_cast<std::size_t>(at % kTileSize / kBlockElements)]));
    }
  return words;
}

// Adds work on one run.
void add_run(const selections::Part& part, const Work& work, const Run& run, Tables& tables) {
  if (!tears_blocks(part)) return tables.add(work);
  gradients::Rows row;
  row.plan_all(1);
  row.plan_written(written_words(part, {&run, 1}));
  tables.add(work, std::move(row));
}

// What `whole` does, cut down to stretches.
void add_pieces(const Update& update, const Work& whole, Stretches stretches, Tables& tables) {
  const selections::Part& part = *update.slot->work.part;
  const std::vector<Run> runs =
      part.rows ? runs_in_memory(part, stretches, {kParameter, kState})
                : runs_in_memory(part, stretches, {kParameter, kGradient, kState});
  if (runs.size() == 1 && !part.rows)
    return add_run(part, one_run(part, whole, runs.front()), runs.front(), tables);
  const Pieces pieces = pieces_of(update, runs);
  gradients::Rows table = table_of(part, pieces, pieces.numbers(kParameter));
  table.plan_state(pieces.numbers(kState));
  if (whole.rounding.is_random()) table.plan_numbers(pieces.first_elements());
  if (tears_blocks(part)) table.plan_written(written_words(part, pieces.runs));
  for (std::size_t i = 0; i < static_cast<std::size_t>(part.operands); ++i)
    table.stride[i] = pieces.length * item_size(part.operand[i].dtype());
  tables.add(from_first_element(part, whole, pieces.length), std::move(table));
  if (pieces.rest.count > 0) add_run(part, one_run(part, whole, pieces.rest), pieces.rest, tables);
}

// The same where state is in blocks, and not all is in C order, in which pieces are counted then.
void add_counted_pieces(const Update& update, const Work& whole, Stretches stretches,
                        Tables& tables) {
  const selections::Part& part = *update.slot->work.part;
  Pieces pieces{runs_in_c_order(stretches), part.size, part.rows ? part.row_size : 0};
  pieces.are_rows = part.rows != nullptr;  // what they are moved by
  gradients::Rows table = table_of(part, pieces, pieces.numbers(kParameter));
  table.plan_numbers(pieces.first_elements());
  if (tears_blocks(part)) table.plan_written(written_words(part, pieces.runs));
  Work work = whole;
  if (part.rows) {
    work.gradient_row = part.row_size;
    table.stride[kGradient] = update.slot->moved_by(update).geometry().strides[0];
  }
  work.iteration.size = pieces.length;
  tables.add(work, std::move(table));
  if (pieces.rest.count == 0) return;
  work.iteration.size = pieces.rest.count;
  work.numbers.first = pieces.rest.element;
  add_run(part, work, pieces.rest, tables);
}

// The same in any layout, where the stretches consist of the parameter's rows.
void add_own_rows(const Update& update, const Work& whole, Stretches stretches, Tables& tables) {
  const Pieces pieces = rows_as_pieces(*update.slot->work.part, stretches);
  gradients::Rows strides;
  Work work = update.slot->work_on_rows(update.slot->moved_by(update), strides, true);
  work.rule = whole.rule;
  work.anchor = whole.anchor;
  work.followers = whole.followers;
  work.rounding = whole.rounding;
  work.gradient_factor = whole.gradient_factor;
  work.keeps_value = whole.keeps_value;
  gradients::Rows table = table_of(*update.slot->work.part, pieces, pieces.numbers(kParameter));
  table.stride = strides.stride;
  if (whole.rounding.is_random()) table.plan_numbers(pieces.first_elements());
  tables.add(work, std::move(table));
}

// A step that moves nothing counts, too, where that is done for each piece of work.
void add_nothing(const Work& whole, Tables& tables) {
  Work work = whole;
  work.part = nullptr;
  tables.add(work, gradients::Rows{});
}

// As by a dense gradient, in whatever layout.
bool moves_as_a_whole(const selections::Part& part) {
  return part.selected.is_everything() && !part.rows && !part.progress;
}

// Stretches that have come equally far; `work` is all of the update, with their coefficients.
void add_stretches(const Update& update, Work work, Stretches stretches, Tables& tables) {
  const selections::Part& part = *work.part;
  work.part = nullptr;
  const bool are_all = stretches.front().begin == 0 && stretches.front().end == part.size;
  if (are_all && !part.rows && !tears_blocks(part)) return tables.add(work);
  if (!update.slot->is_in_c_order(update.slot->moved_by(update))) {
    if (part.has_blocks) return add_counted_pieces(update, work, stretches, tables);
    if (are_rows(part, stretches)) return add_own_rows(update, work, stretches, tables);
  }
  add_pieces(update, work, stretches, tables);
}

// By a row-wise rule: rows whose value changes, and rows whose value is kept.
void add_selected_rows(const Work& work, Tables& tables) {
  for (const bool keeps_value : {false, true}) {
    Work half = work;
    half.keeps_value = keeps_value;
    half.selected_rows = nullptr;
    gradients::Rows rows = *work.rows;
    rows.filter([&](std::int64_t row) {
      return work.selected_rows->holds(row * work.iteration.size) != keeps_value;
    });
    tables.add(half, std::move(rows));
  }
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

// Where runs, which ascend, begin in the tiles that a part visits.
std::vector<std::int64_t> places_in_tiles(const selections::Part& part, std::span<const Run> runs) {
  std::vector<std::int64_t> places;
  places.reserve(runs.size());
  std::int64_t visited = 0;
  for (const Run& run : runs) {
    while (part.tile(visited) < run.element / kTileSize) ++visited;
    places.push_back(visited * kTileSize + run.element % kTileSize);
  }
  return places;
}

// The pieces of a gradient that stretches are, and how one is copied: from where it lies to scratch
// memory, in which a piece begins at any element.
Pieces plan_copy(const Update& update, Stretches stretches, Work& copy, gradients::Rows& strides) {
  const selections::Part& part = *update.slot->work.part;
  const arrays::Array& gradient = update.slot->moved_by(update);
  const std::int64_t item = item_size(copy.compute);
  strides.stride[kParameter] = item;
  if (!gradient.c_contiguous && are_rows(part, stretches)) {
    const auto [shape, from] = gradient.geometry();
    const std::vector<std::int64_t> dense = c_strides(shape, item);
    strides.stride[kGradient] = from[0];
    copy.iteration.plan(std::array{Geometry{shape.subspan(1), std::span(dense).subspan(1)},
                                   Geometry{shape.subspan(1), from.subspan(1)}});
    return rows_as_pieces(part, stretches);
  }
  const Pieces pieces = pieces_of(update, part.rows ? runs_in_c_order(stretches)
                                                    : runs_in_memory(part, stretches, {kGradient}));
  strides.stride[kGradient] = pieces.length * item_size(gradient.dtype);
  copy.iteration.plan_dense(pieces.length, 2);
  return pieces;
}

}  // namespace

void Tables::add(const Work& work) { list_.push_back(&work_.emplace_back(work)); }

void Tables::add(const Work& work, gradients::Rows rows) {
  add(work);
  work_.back().rows = &rows_.emplace_back(std::move(rows));
}

void add_moving(const Update& update, Tables& tables) {
  const Work& work = update.slot->work;
  if (work.selected_rows) return add_selected_rows(work, tables);
  if (!work.part) return tables.add(&work);
  const selections::Part& part = *work.part;
  if (moves_as_a_whole(part)) {
    Work whole = work;
    whole.part = nullptr;
    return tables.add(whole);
  }
  const std::size_t before = tables.list().size();
  for (const bool keeps_value : {false, true}) {
    const std::vector<Stretch> stretches = by_age(part, moved_stretches(part, keeps_value));
    for (auto first = stretches.begin(); first != stretches.end();) {
      const auto last = std::find_if(first, stretches.end(), [&](const Stretch& other) {
        return other.age() != first->age();
      });
      Work equal = work;
      equal.keeps_value = keeps_value;
      if (part.progress)
        equal.rule = tables.keep(part.rule->coefficients(part.rule->advance(first->progress),
                                                         work.compute, part.lr, part.states));
      add_stretches(update, equal, {first, last}, tables);
      first = last;
    }
  }
  if (tables.list().size() == before) add_nothing(work, tables);
}

void add_whole_gradient(const Update& update, Tables& tables) {
  const Work& work = update.slot->work;
  if (update.is_outer) return;  // its factors are not for clearing
  if (!work.whole_gradient.array) return tables.add(&work);
  const Operand gradient = update.gradient.operand();
  Work whole = of_two(gradient, gradient, work.compute);
  whole.iteration.plan(std::array{update.gradient.geometry(), update.gradient.geometry()});
  tables.add(whole);
}

std::size_t SummedGradients::scratch_bytes(const Update& update) {
  const Work& work = update.slot->work;
  if (!work.part) return 0;
  const selections::Part& part = *work.part;
  const std::int64_t granule = part.visited().granule();
  const bool is_all_or_none = granule >= part.size && (part.tiles() == 0 || part.moved(0).any());
  const bool are_tiles = granule % kTileSize == 0 || is_all_or_none;
  if (are_tiles && !part.rows && update.slot->is_in_c_order(update.slot->moved_by(update)))
    return 0;
  return static_cast<std::size_t>(part.tiles() * kTileSize * item_size(work.compute));
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
  Work tiles = of_two(scratch, scratch, work.compute);
  tiles.iteration.plan_dense(part.tiles() * kTileSize, 2);
  cleared_.add(tiles);
  summed_.add(tiles);

  Work copy = of_two(scratch, update.slot->moved_by(update).operand(), work.compute);
  copy.rule = copied_.keep(copying(work.compute));
  gradients::Rows strides;
  const Pieces pieces = plan_copy(update, moved_stretches(part), copy, strides);
  gradients::Rows table = table_of(part, pieces, places_in_tiles(part, pieces.runs));
  table.stride = strides.stride;
  copied_.add(copy, std::move(table));
  if (pieces.rest.count == 0) return;
  copy.iteration.plan_dense(pieces.rest.count, 2);
  shift(copy.iteration.operand[kParameter], places_in_tiles(part, {&pieces.rest, 1}).front());
  shift(copy.iteration.operand[kGradient], pieces.rest.place[kGradient]);
  copied_.add(copy);
}

}  // namespace fusestep::engine
