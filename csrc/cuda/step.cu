#include "cuda/step.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "core/errors.h"
#include "cuda/launch.h"

namespace fusestep::cuda {
namespace {

// A grid has at most 2^31 - 1 blocks.
constexpr std::int64_t kMostTiles = 0x7fffffff;

constexpr std::int64_t kSixteen = 16;

bool is_strided(const Work& work) { return work.iteration.layout != nullptr; }
bool is_anchored(const Work& work) { return work.anchor.reference != 0; }

// ---- lists of parameters -----------------------------------------------------------------------

// True where four elements can be had at once, wherever a multiple of four of them begins.
bool is_aligned(const Operand& operand) {
  const auto bytes = static_cast<std::uintptr_t>(kPerThread * item_size(operand.dtype));
  return reinterpret_cast<std::uintptr_t>(operand.data) %
             std::min<std::uintptr_t>(bytes, kSixteen) ==
         0;
}

template <class ItemList>
int axes_in(const ItemList& list) {
  if (list.count == 0) return 0;
  const auto& last = list.item[list.count - 1];
  return last.first_axis + last.axes;
}

int axes_of(const Work& work) {
  return is_strided(work) ? work.iteration.layout->tiling().count : 0;
}

template <class ItemList>
bool has_room(const ItemList& list, const Work& work) {
  if (work.iteration.tiles() > kMostTiles)
    throw Error("an array has more elements than a CUDA grid can walk");
  return list.count < ItemList::kItems && axes_in(list) + axes_of(work) <= ItemList::kAxes &&
         list.tiles + work.iteration.tiles() <= kMostTiles;
}

// The anchor of an item that has room for one.
template <class Item>
void add_anchor([[maybe_unused]] Item& item, [[maybe_unused]] const Work& work) {
  if constexpr (kIsAnchored<Item>) {
    item.lambda = work.anchor.lambda;
    item.lr = work.anchor.lr;
    item.has_importance = work.anchor.importance != 0;
  }
}

template <class ItemList>
void add(ItemList& list, const Work& work, std::uint32_t rule) {
  using Item = typename ItemList::Item;
  const Iteration& iteration = work.iteration;
  Item item{};
  item.size = iteration.size;
  item.first_tile = list.tiles;
  item.rule = rule;
  item.first_axis = static_cast<std::uint8_t>(axes_in(list));  // of dense ones, too: see axes_in
  item.is_aligned = true;
  item.in_double = work.compute == DType::float64;
  for (int i = 0; i < std::min(iteration.operands, Item::kOperands); ++i) {
    const Operand& operand = iteration.operand[static_cast<std::size_t>(i)];
    item.data[i] = operand.data;
    item.dtypes =
        static_cast<std::uint16_t>(item.dtypes | static_cast<int>(operand.dtype) << 2 * i);
    item.is_aligned = item.is_aligned && is_aligned(operand);
  }
  if (is_strided(work)) {
    const Tiling tiling = iteration.layout->tiling();
    item.axes = static_cast<std::uint8_t>(tiling.count);
    item.row_axis = static_cast<std::uint8_t>(tiling.row_axis);
    item.column_axis = static_cast<std::uint8_t>(tiling.column_axis);
    std::copy_n(tiling.axes, tiling.count, list.axis + item.first_axis);
  }
  add_anchor(item, work);
  list.item[list.count++] = item;
  list.tiles += static_cast<std::uint32_t>(iteration.tiles());
}

template <class ItemList>
void clear(ItemList& list) {
  list.count = 0;
  list.tiles = 0;
}

// Calls visit(list type) with the smallest list that a number of parameters may fit in.
template <class Item, class Visit>
void with_list(bool strided, std::size_t count, Visit visit) {
  using Lists = ListsOf<Item>;
  if (strided) return visit.template operator()<typename Lists::Strided>();
  if (count <= Lists::Short::kItems) return visit.template operator()<typename Lists::Short>();
  visit.template operator()<typename Lists::Long>();
}

// ---- updates -----------------------------------------------------------------------------------

// One parameter, and the place of its coefficients in the table on the device.
struct Entry {
  const Work* work;
  std::uint32_t place;
  std::uint32_t loop;

  // What decides which kernel it takes.
  auto kind() const {
    return std::tuple(loop, work->compute, is_strided(*work), is_anchored(*work));
  }
};

struct Common {
  const AnyRuleEntry* table;
  const Decision* decision;
  StepOptions options;
  Stream stream;
};

template <class Rule, class Body>
bool is_last_rule(const Body& body, int count, const Entry& entry,
                  const rules::Coefficients* last) {
  return count > 0 && entry.work->rule == last &&
         body.rules[count - 1].gradient_factor == entry.work->gradient_factor;
}

template <class Loop, class T, class ItemList>
void update(std::span<const Entry> entries, const Common& common) {
  using Body = Update<Loop, T, ItemList>;
  using Rule = typename Body::Rule;
  Body body;  // 32 KB of which no more is written than is needed
  clear(body.list);
  body.table = common.table;
  body.decision = common.decision;
  body.gradient_factor = common.options.gradient_factor;
  body.clear_gradients = common.options.clear_gradients;
  int rules = 0;
  const rules::Coefficients* last = nullptr;
  const auto flush = [&] {
    launch(body, body.list.tiles, common.stream);
    clear(body.list);
    rules = 0;
  };
  for (const Entry& entry : entries) {
    const bool new_rule = !common.table && !is_last_rule<Rule>(body, rules, entry, last);
    if (!has_room(body.list, *entry.work) || (new_rule && rules == kRules<ItemList>)) flush();
    if (common.table) {
      add(body.list, *entry.work, entry.place);
      continue;
    }
    if (new_rule || rules == 0) {
      RuleEntry<Rule>& one = body.rules[rules++];
      std::memcpy(one.bytes, entry.work->rule->bytes, sizeof one.bytes);
      one.gradient_factor = entry.work->gradient_factor;
      last = entry.work->rule;
    }
    add(body.list, *entry.work, static_cast<std::uint32_t>(rules - 1));
  }
  flush();
}

void update_kind(std::span<const Entry> entries, const Common& common) {
  const Work& first = *entries.front().work;
  rules::Loops::visit(entries.front().loop, [&]<class Loop>(Loop) {
    const auto update_in = [&]<class ItemList>() {
      if (first.compute == DType::float64)
        update<Loop, double, ItemList>(entries, common);
      else
        update<Loop, float, ItemList>(entries, common);
    };
    if (is_anchored(first))
      with_list<AnchoredItem>(is_strided(first), entries.size(), update_in);
    else
      with_list<Item>(is_strided(first), entries.size(), update_in);
  });
}

void update_all(const Step& step, const Common& common) {
  std::vector<Entry> entries;
  entries.reserve(step.list.size());
  for (std::size_t i = 0; i < step.list.size(); ++i) {
    const Work* work = step.list[i];
    if (work->iteration.size == 0) continue;
    const std::size_t loop =
        common.table ? step.groups[step.progress[i].group].loop : work->rule->loop;
    entries.push_back({work, static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(loop)});
  }
  const auto kind = [](const Entry& entry) { return entry.kind(); };
  if (!std::ranges::is_sorted(entries, {}, kind)) std::ranges::stable_sort(entries, {}, kind);
  for (auto first = entries.begin(); first != entries.end();) {
    const auto last = std::find_if(first, entries.end(),
                                   [&](const Entry& e) { return e.kind() != first->kind(); });
    update_kind({first, last}, common);
    first = last;
  }
}

// ---- the norm ----------------------------------------------------------------------------------

std::int64_t tiles_of(WorkList list) {
  std::int64_t tiles = 0;
  for (const Work* work : list) tiles += work->iteration.tiles();
  return tiles;
}

template <class ItemList>
void sum_squares(WorkList list, Stream stream, double prescale, double* sums,
                 double* prescaled_sums) {
  using Body = SumSquares<ItemList>;
  Body body;
  clear(body.list);
  body.prescale = prescale;
  std::int64_t before = 0;
  const auto flush = [&] {
    body.sums = sums + before;
    body.prescaled_sums = prescaled_sums ? prescaled_sums + before : nullptr;
    before += body.list.tiles;
    launch(body, ceil_div(body.list.tiles, kWarps), stream);
    clear(body.list);
  };
  for (const Work* work : list) {
    if (work->iteration.size == 0) continue;
    if (!has_room(body.list, *work)) flush();
    add(body.list, *work, 0);
  }
  flush();
}

void sum_tiles(WorkList list, Stream stream, double prescale, double* sums,
               double* prescaled_sums) {
  const bool strided =
      std::ranges::any_of(list, [](const Work* work) { return is_strided(*work); });
  with_list<Item>(strided, list.size(), [&]<class ItemList>() {
    sum_squares<ItemList>(list, stream, prescale, sums, prescaled_sums);
  });
}

// All sums of sums, one after the other.
std::int64_t room_for_groups(std::int64_t count) {
  std::int64_t room = count;
  while (count > kReductionGroup) room += count = ceil_div(count, kReductionGroup);
  return room;
}

struct Group {
  const double* values;
  std::int64_t count;
};

// Sums groups of sums until they fit in one, which is returned.
Group sum_groups(double* sums, std::int64_t count, Stream stream) {
  while (count > kReductionGroup) {
    const std::int64_t groups = ceil_div(count, kReductionGroup);
    launch(SumGroups{sums, sums + count, count}, ceil_div(groups, kWarps), stream);
    sums += count;
    count = groups;
  }
  return {sums, count};
}

// Only squares of float64 can be too large for a float64.
bool may_overflow(WorkList list) {
  return std::ranges::any_of(list, [](const Work* work) {
    return work->compute == DType::float64 &&
           work->iteration.operand[kGradient].dtype == DType::float64;
  });
}

// ---- decisions on the device -------------------------------------------------------------------

void decide(const Step& step, Workspace::Record* record) {
  Decide body{};
  body.grad_scale = step.options.gradient_factor;
  body.loss_scale = step.loss_scale;
  body.found_inf = step.found_inf;
  body.clips = step.max_norm.has_value();
  body.max_norm = step.max_norm.value_or(0);
  body.skips_nonfinite = step.skip_nonfinite;
  body.counts = step.counts;
  body.decision = &record->decision;
  body.counters = &record->counters;
  if (step.needs_norm()) {
    const std::int64_t tiles = tiles_of(step.list);
    const auto room = static_cast<std::size_t>(room_for_groups(tiles));
    double* sums = step.workspace->sums(room, step.stream);
    double* prescaled =
        may_overflow(step.list) ? step.workspace->prescaled_sums(room, step.stream) : nullptr;
    sum_tiles(step.list, step.stream, 1, sums, prescaled);
    const Group group = sum_groups(sums, tiles, step.stream);
    body.sums = group.values;
    body.count = static_cast<std::int32_t>(group.count);
    if (prescaled) body.prescaled_sums = sum_groups(prescaled, tiles, step.stream).values;
  }
  launch(body, 1, step.stream);
}

template <class Body>
void advance(const Step& step, const Decision* decision, rules::Progress* progress,
             AnyRuleEntry* table) {
  Body body;
  body.count = 0;
  body.decision = decision;
  std::uint32_t groups = 0;
  std::uint32_t last = UINT32_MAX;
  const auto flush = [&] {
    launch(body, ceil_div(body.count, kThreads), step.stream);
    body.count = 0;
    groups = 0;
    last = UINT32_MAX;
  };
  for (std::size_t i = 0; i < step.list.size(); ++i) {
    const ProgressOnDevice& one = step.progress[i];
    if (body.count == Body::kItems || (one.group != last && groups == Body::kGroups)) flush();
    if (one.group != last) body.group[groups++] = step.groups[one.group];
    last = one.group;
    body.item[body.count++] = {progress + one.slot,
                               one.step,
                               one.momentum_product,
                               table + i,
                               step.list[i]->gradient_factor,
                               groups - 1,
                               step.list[i]->compute == DType::float64};
  }
  flush();
}

}  // namespace

void take(const Step& step) {
  const CurrentDevice current(step.workspace->device());
  Common common{nullptr, nullptr, step.options, step.stream};
  if (step.is_decided_on_device()) {
    Workspace::Record* record = step.workspace->record(step.stream);
    AnyRuleEntry* table = nullptr;
    rules::Progress* progress = nullptr;
    if (!step.progress.empty()) {  // all memory before the first launch
      table = step.workspace->table(step.list.size(), step.stream);
      progress = step.workspace->progress(1, step.stream);
    }
    decide(step, record);
    if (table && step.list.size() <= ShortAdvance::kItems)
      advance<ShortAdvance>(step, &record->decision, progress, table);
    else if (table)
      advance<LongAdvance>(step, &record->decision, progress, table);
    common.decision = &record->decision;
    common.table = table;
  }
  update_all(step, common);
}

std::vector<double> tile_sums(Workspace& workspace, Stream stream, WorkList list, double prescale) {
  const CurrentDevice current(workspace.device());
  std::vector<double> result(static_cast<std::size_t>(tiles_of(list)));
  if (result.empty()) return result;
  double* sums = workspace.sums(result.size(), stream);
  sum_tiles(list, stream, prescale, sums, nullptr);
  copy_to_host(result.data(), sums, result.size() * sizeof(double), stream);
  return result;
}

void clear_gradients(Workspace& workspace, Stream stream, WorkList list) {
  const CurrentDevice current(workspace.device());
  for (const Work* work : list) {
    if (work->iteration.size == 0) continue;
    with_list<Item>(is_strided(*work), 1, [&]<class ItemList>() {
      Clear<ItemList> body{};
      add(body.list, *work, 0);
      launch(body, body.list.tiles, stream);
    });
  }
}

void write_progress(Workspace& workspace, Stream stream, std::span<const rules::Progress> progress,
                    const Counters& counters) {
  const CurrentDevice current(workspace.device());
  Workspace::Record* record = workspace.record(stream);
  rules::Progress* to = workspace.progress(progress.size(), stream);
  launch(Write<Counters, 1>{&record->counters, 1, {counters}}, 1, stream);
  using Body = Write<rules::Progress, 128>;
  for (std::size_t i = 0; i < progress.size(); i += Body::kValues) {
    const std::size_t count = std::min<std::size_t>(Body::kValues, progress.size() - i);
    Body body{to + i, static_cast<std::int32_t>(count), {}};
    std::copy_n(progress.begin() + static_cast<std::ptrdiff_t>(i), count, body.value);
    launch(body, 1, stream);
  }
}

Counters read_progress(Workspace& workspace, Stream stream, std::span<rules::Progress> progress) {
  const CurrentDevice current(workspace.device());
  synchronize();  // a graph may have been replayed on any stream, and the last one may be gone
  constexpr Stream kDefault = 0;
  Counters counters;
  copy_to_host(&counters, &workspace.record(stream)->counters, sizeof counters, kDefault);
  if (!progress.empty())
    copy_to_host(progress.data(), workspace.progress(progress.size(), stream),
                 progress.size_bytes(), kDefault);
  return counters;
}

void write_rate(Workspace& workspace, Stream stream, double lr) {
  const CurrentDevice current(workspace.device());
  launch(Write<double, 1>{&workspace.record(stream)->lr, 1, {lr}}, 1, stream);
}

Scalar rate(Workspace& workspace, Stream stream) {
  const CurrentDevice current(workspace.device());
  return {&workspace.record(stream)->lr, true};
}

}  // namespace fusestep::cuda
