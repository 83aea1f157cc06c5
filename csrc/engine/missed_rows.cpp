#include "engine/missed_rows.h"

#include <iterator>
#include <type_traits>
#include <utility>

#include "rules/registry.h"

namespace fusestep::engine {
namespace {

// True where missed steps have left a row where it is.
bool is_at_rest(const rules::IdleBytes& idle, const Work& work) {
  bool at_rest = false;
  rules::Loops::visit(work.rule->loop, [&]<class Loop>(Loop) {
    using Idle = typename Loop::template Of<double>::Idle;
    if constexpr (std::is_same_v<Idle, rules::IdleAtRest>)
      at_rest = idle.as<Idle>().is_closed && work.anchor.reference == 0;
  });
  return at_rest;
}

}  // namespace

void MissedRows::add(const Slot& slot, const rules::AnyRule& rule, const gradients::Rows& rows) {
  const rules::RowHistory& history = *slot.history;
  if (!history.has_missed_steps()) return;
  Table& table = tables_.emplace_back();
  table.history = slot.history;
  table.loop.loop = rule.loop(slot.states());
  table.work = slot.catch_up_work(table.rows);
  table.work.rule = &table.loop;

  constexpr std::int64_t kUnknown = -1, kAtRest = -2;
  std::vector<std::int64_t> place_of(history.each_step().size() + 1, kUnknown);
  std::vector<std::int64_t> behind, places;
  for (std::int64_t i = 0; i < rows.count(); ++i) {
    const std::int64_t row = rows.row(i);
    if (!history.is_behind(row)) continue;
    const auto steps = history.each_missed_step(row).size();
    std::int64_t& place = place_of[steps];
    if (place == kUnknown) {
      const rules::IdleBytes idle = history.missed_steps(row);
      place = is_at_rest(idle, table.work) ? kAtRest : std::ssize(table.missed);
      if (place != kAtRest) table.missed.push_back({idle, static_cast<std::int64_t>(steps)});
    }
    if (place == kAtRest) continue;
    behind.push_back(row);
    places.push_back(place);
  }
  if (behind.empty()) return tables_.pop_back();
  table.rows.plan_pairs(std::move(behind), std::move(places));
  table.rows.stride[kGradient] = sizeof(cuda::MissedSteps);
}

std::vector<cuda::RowsBehind> MissedRows::tables() const {
  std::vector<cuda::RowsBehind> tables;
  for (const Table& table : tables_) tables.push_back({&table.work, table.missed});
  return tables;
}

void MissedRows::mark() const {
  for (const Table& table : tables_)
    for (std::int64_t i = 0; i < table.rows.count(); ++i) table.history->mark(table.rows.row(i));
}

}  // namespace fusestep::engine
