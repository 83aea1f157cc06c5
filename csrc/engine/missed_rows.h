// Rows of tables on a GPU that are behind, with what they have missed, as its kernels want it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "core/work.h"
#include "cuda/step.h"
#include "engine/slot.h"
#include "gradients/rows.h"
#include "rules/any_rule.h"

namespace fusestep::engine {

class MissedRows {
 public:
  // Adds those of these rows that are behind, but for those that their missed steps have left where
  // they are.
  void add(const Slot& slot, const rules::AnyRule& rule, const gradients::Rows& rows);

  bool is_empty() const { return tables_.empty(); }
  std::vector<cuda::RowsBehind> tables() const;

  // They have been brought up to date.
  void mark() const;

 private:
  struct Table {
    std::shared_ptr<rules::RowHistory> history;
    rules::Coefficients loop{};  // of which only the number is read
    gradients::Rows rows;
    Work work;
    std::vector<cuda::RowsBehind::Missed> missed;  // rows that have missed as much share theirs
  };

  std::deque<Table> tables_;  // the work points to rows and loop
};

}  // namespace fusestep::engine
