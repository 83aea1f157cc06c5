#include "rules/row_history.h"

#include <algorithm>
#include <cstring>

#include "core/errors.h"

namespace fusestep::rules {

// The numbers of a loop are those of a rule with so many state arrays.
void RowHistory::compute_in(DType compute, std::size_t states) {
  if (!replay_.empty() && replay_.back().coefficients.loop != rules_.back()->loop(states))
    throw ValueError(
        "rows that have missed steps, which are to be made up for with the state of that time");
  if (compute == compute_) return;
  compute_ = compute;
  ++series_;
  for (std::size_t i = 0; i < replay_.size(); ++i)
    replay_[i].coefficients =
        rules_[i]->coefficients(steps_[i].progress, compute, steps_[i].lr, states);
}

void RowHistory::record(const AnyRule& rule, const Step& step, const Coefficients& coefficients) {
  const IdleBytes idle = rule.idle(step.progress, step.lr);
  const auto block_begin = static_cast<std::size_t>(size() / kBlock * kBlock);
  if (size() > 0 && static_cast<std::int64_t>(block_begin) == size()) {
    after_block_.push_back(idle);
    rule.extend(std::span(after_block_).first(after_block_.size() - 1), idle);
  } else {
    rule.extend(after_block_, idle);
  }
  rule.extend(std::span(to_end_of_block_).subspan(block_begin), idle);
  to_end_of_block_.push_back(idle);

  const bool options_are_known =
      !rules_.empty() && rules_.back()->option_values() == rule.option_values();
  rules_.push_back(options_are_known ? rules_.back() : rule.clone());
  steps_.push_back(step);
  replay_.push_back({step.lr, coefficients});
  ++now_;
  behind_ = rows();
}

void RowHistory::resize(std::int64_t rows) {
  current_at_.resize(static_cast<std::size_t>(rows), now_);
}

std::vector<std::int64_t> RowHistory::rows_behind() const {
  std::vector<std::int64_t> result;
  for (std::int64_t row = 0; size() > 0 && row < rows(); ++row)
    if (is_behind(row)) result.push_back(row);
  return result;
}

void RowHistory::mark_all() {
  behind_ = 0;
  if (size() > 0) ++series_;
  steps_.clear();
  rules_.clear();
  replay_.clear();
  to_end_of_block_.clear();
  after_block_.clear();
}

IdleBytes RowHistory::missed_steps(std::int64_t row) const {
  const auto first = static_cast<std::size_t>(size() - missed(row));
  const auto block = first / kBlock;
  IdleBytes idle = to_end_of_block_[first];
  if (block < after_block_.size()) rules_.back()->extend({&idle, 1}, after_block_[block]);
  return idle;
}

std::span<const RowHistory::MissedStep> RowHistory::each_missed_step(std::int64_t row) const {
  return std::span(replay_).last(static_cast<std::size_t>(missed(row)));
}

std::vector<std::int64_t> RowHistory::all_missed() const {
  std::vector<std::int64_t> result;
  for (std::int64_t row = 0; row < rows(); ++row) result.push_back(missed(row));
  return result;
}

std::vector<std::vector<double>> RowHistory::steps() const {
  std::vector<std::vector<double>> result;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const auto& [lr, progress] = steps_[i];
    std::vector<double>& values = result.emplace_back(
        std::vector{lr, static_cast<double>(progress.step), progress.momentum_product});
    const std::vector<double> options = rules_[i]->option_values();
    values.insert(values.end(), options.begin(), options.end());
  }
  return result;
}

void RowHistory::restore(const AnyRule& rule, DType compute, std::size_t states,
                         std::span<const std::vector<double>> steps,
                         std::span<const std::int64_t> missed) {
  mark_all();
  const std::vector<std::string_view> names = rule.option_names();
  for (const std::vector<double>& values : steps) {
    const std::unique_ptr<AnyRule> then = rule.clone();
    for (std::size_t i = 0; i < names.size(); ++i) then->set(names[i], values.at(3 + i));
    const Step step{values[0], {static_cast<std::int64_t>(values[1]), values[2]}};
    record(*then, step, then->coefficients(step.progress, compute, step.lr, states));
  }
  for (std::size_t row = 0; row < current_at_.size(); ++row) current_at_[row] = now_ - missed[row];
  behind_ = std::ranges::count_if(missed, [](std::int64_t steps) { return steps > 0; });
  if (behind_ == 0) mark_all();
}

}  // namespace fusestep::rules
