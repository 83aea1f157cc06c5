// The steps that rows of a table have missed, so that they can be made up for when a row is used.
//
// Which rows see a gradient is not known beforehand, so for every past step t the effect of steps
// t + 1 to the present one must be at hand, and each new step changes all of them. They are kept in
// blocks: the effect up to the end of its own block for every step, and the effect of everything
// after it for every block. A new step extends those of the last block and one for each block
// before; a row's is two of them joined.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "rules/any_rule.h"

namespace fusestep::rules {

class RowHistory : public std::enable_shared_from_this<RowHistory> {
 public:
  explicit RowHistory(std::int64_t rows) : current_at_(static_cast<std::size_t>(rows), 0) {}

  // From now on the rows' missed steps are made up for in this type. Throws ValueError where some
  // were missed with another number of state arrays than `states`.
  void compute_in(DType compute, std::size_t states);

  // One step that has been taken: to be called before the rows that it moved are marked.
  struct Step {
    double lr;
    Progress progress;
  };
  void record(const AnyRule& rule, const Step& step, const Coefficients& coefficients);

  // True where it has become so long that all rows should be brought up to date.
  bool is_full() const { return size() >= kMostSteps; }

  std::int64_t rows() const { return static_cast<std::int64_t>(current_at_.size()); }
  void resize(std::int64_t rows);  // new rows are up to date

  // Whether any row is behind.
  bool has_missed_steps() const { return behind_ > 0; }

  bool is_behind(std::int64_t row) const { return missed(row) > 0; }

  // Asks for the memory that tells what a row has missed.
  [[gnu::always_inline]] void prefetch(std::int64_t row) const {
    __builtin_prefetch(&current_at_[static_cast<std::size_t>(row)]);
  }
  std::vector<std::int64_t> rows_behind() const;

  void mark(std::int64_t row) {
    if (!is_behind(row)) return;
    current_at_[static_cast<std::size_t>(row)] = now_;
    if (--behind_ == 0) mark_all();
  }
  void mark_all();

  // What a row that is behind has missed: put together, and one by one.
  IdleBytes missed_steps(std::int64_t row) const;
  struct MissedStep {
    double lr;
    Coefficients coefficients;
  };
  std::span<const MissedStep> each_missed_step(std::int64_t row) const;

  // All steps that rows may have missed, for who keeps a copy of them: as long as the number of the
  // series is the same, they have only become more.
  std::span<const MissedStep> each_step() const { return replay_; }
  std::int64_t series() const { return series_; }

  // ---- for state dicts ----

  // How many of the last steps each row has missed, and all that is known of these: of each its
  // rate and progress, and the rule's options in their order.
  std::vector<std::int64_t> all_missed() const;
  std::vector<std::vector<double>> steps() const;

  // Takes them back, for a rule of the same kind.
  void restore(const AnyRule& rule, DType compute, std::size_t states,
               std::span<const std::vector<double>> steps, std::span<const std::int64_t> missed);

 private:
  static constexpr std::int64_t kBlock = 256, kMostSteps = kBlock * kBlock;

  std::int64_t size() const { return static_cast<std::int64_t>(steps_.size()); }
  std::int64_t missed(std::int64_t row) const {
    const std::int64_t behind = now_ - current_at_[static_cast<std::size_t>(row)];
    return behind < size() ? behind : size();
  }

  DType compute_ = DType::float32;
  std::int64_t behind_ = 0;  // rows that have missed any
  std::int64_t now_ = 0;     // steps ever recorded
  std::int64_t series_ = 0;
  std::vector<std::int64_t>
      current_at_;  // for each row: the steps that it has had, or was marked at

  // Of each step since all rows were up to date.
  std::vector<Step> steps_;
  std::vector<std::shared_ptr<const AnyRule>> rules_;  // one for all steps with the same options
  std::vector<MissedStep> replay_;
  std::vector<IdleBytes> to_end_of_block_;

  std::vector<IdleBytes> after_block_;  // of each block but the last
};

}  // namespace fusestep::rules
