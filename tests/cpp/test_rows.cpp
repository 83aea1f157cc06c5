// Lists of rows against the obvious way to make them, and missed steps against taking them.

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <utility>

#include "core/errors.h"
#include "cpu/step.h"
#include "cpu/thread_pool.h"
#include "gradients/rows.h"
#include "rules/row_history.h"
#include "testing.h"

namespace fusestep::testing {
namespace {

using Numbers = std::vector<std::int64_t>;

void check_plan(const Numbers& numbers, std::int64_t rows) {
  std::map<std::int64_t, Numbers> expected;
  for (std::size_t i = 0; i < numbers.size(); ++i)
    expected[numbers[i]].push_back(static_cast<std::int64_t>(i));

  gradients::Rows plan;
  plan.plan(numbers, rows);
  CHECK(plan.count() == std::ssize(expected));
  std::int64_t i = 0;
  for (const auto& [row, sources] : expected) {
    CHECK(plan.row(i) == row);
    CHECK(plan.sources(i) == std::ssize(sources));
    for (std::int64_t k = 0; k < plan.sources(i); ++k)
      CHECK(plan.source(i, k) == sources[static_cast<std::size_t>(k)]);
    ++i;
  }
}

void test_plans() {
  Random random(1);
  for (const std::int64_t rows : {1, 2, 100, 2047, 2048, 2049, 1 << 22, (1 << 22) + 1})
    for (const int count : {0, 1, 2, 255, 256, 257, 5000}) {
      Numbers numbers;
      for (int i = 0; i < count; ++i) numbers.push_back(random.below(rows));
      check_plan(numbers, rows);
      std::ranges::sort(numbers);
      check_plan(numbers, rows);
      numbers.erase(std::ranges::unique(numbers).begin(), numbers.end());
      check_plan(numbers, rows);
      std::ranges::reverse(numbers);
      check_plan(numbers, rows);
    }
  check_plan({(std::int64_t{1} << 40) + 5, 3, (std::int64_t{1} << 40) + 5}, std::int64_t{1} << 41);
}

void test_rows_that_do_not_exist() {
  for (const std::int64_t row : {std::int64_t{-1}, std::int64_t{3}, INT64_MIN, INT64_MAX}) {
    gradients::Rows plan;
    plan.plan(Numbers{0, 2}, 3);
    bool refused = false;
    try {
      plan.plan(Numbers{1, row}, 3);
    } catch (const IndexError&) {
      refused = true;
    }
    CHECK(refused && plan.count() == 2 && plan.row(1) == 2);
  }
}

// A table of one column, and a gradient that is zero wherever no row is listed.
struct Table {
  static constexpr std::int64_t kRows = 5;

  std::unique_ptr<rules::AnyRule> rule;
  std::vector<std::array<double, kRows>> arrays;  // parameter, then state
  rules::Progress progress;

  explicit Table(const RuleCase& rule_case) : rule(rule_case.make()) {
    arrays.resize(1 + rule->state_names().size());
    Random random(2);
    for (double& w : arrays[0]) w = random.number();
    for (std::size_t s = 1; s < arrays.size(); ++s) arrays[s].fill(rule->initial_state());
  }

  Work work(double* values, gradients::Rows* rows, const rules::RowHistory* history) {
    Work work;
    work.compute = DType::float64;
    work.rows = rows;
    work.history = history;
    work.iteration.plan_dense(rows ? 1 : kRows, static_cast<int>(1 + arrays.size()));
    count_operands(work, arrays.size() - 1);
    work.iteration.operand[kGradient] = {reinterpret_cast<std::byte*>(values), DType::float64};
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      const std::size_t operand = i == 0 ? kParameter : kState + i - 1;
      work.iteration.operand[operand] = {reinterpret_cast<std::byte*>(arrays[i].data()),
                                         DType::float64};
    }
    if (rows) rows->stride.fill(sizeof(double));
    return work;
  }

  rules::Coefficients advance(double lr) {
    progress = rule->advance(progress);
    return rule->coefficients(progress, DType::float64, lr, arrays.size() - 1);
  }
};

void run(Work& work, const rules::Coefficients& coefficients) {
  work.rule = &coefficients;
  const Work* const list[] = {&work};
  cpu::update(list, {});
}

// Rows that are brought up to date when they are used, beside rows that take every step.
void test_missed_steps(const RuleCase& rule_case) {
  Table dense(rule_case), exact(rule_case);
  rules::RowHistory history(Table::kRows);
  Random random(3);
  for (int step = 0; step < 1500; ++step) {
    const double lr = 0.01 * (2 + random.number());
    const std::int64_t row = std::min(random.below(40), random.below(40));
    const bool listed = row < Table::kRows - 1;  // the last one never is
    double value = random.number();

    std::array<double, Table::kRows> gradient{};
    if (listed) gradient[static_cast<std::size_t>(row)] = value;
    Work all = dense.work(gradient.data(), nullptr, nullptr);
    run(all, dense.advance(lr));

    gradients::Rows rows;
    rows.plan(listed ? Numbers{row} : Numbers{}, Table::kRows);
    Work some = exact.work(&value, &rows, &history);
    const rules::Coefficients coefficients = exact.advance(lr);
    run(some, coefficients);
    history.record(*exact.rule, {lr, exact.progress}, coefficients);
    if (listed) history.mark(row);
  }
  // The type may change between a step and its being made up for, and back.
  for (const DType compute : {DType::float64, DType::float32, DType::float64})
    history.compute_in(compute, exact.arrays.size() - 1);

  gradients::Rows behind;
  behind.plan(history.rows_behind(), Table::kRows);
  Work flush = exact.work(nullptr, &behind, &history);
  flush.only_catches_up = true;
  run(flush, {exact.rule->loop(exact.arrays.size() - 1), {}});
  for (std::size_t i = 0; i < dense.arrays.size(); ++i)
    for (std::size_t row = 0; row < Table::kRows; ++row)
      CHECK(std::fabs(dense.arrays[i][row] - exact.arrays[i][row]) <=
            1e-7 * (std::fabs(dense.arrays[i][row]) + 1e-6));
}

}  // namespace
}  // namespace fusestep::testing

int main() {
  using namespace fusestep::testing;
  fusestep::cpu::set_num_threads(1);
  test_plans();
  test_rows_that_do_not_exist();
  for (const RuleCase& rule_case : rule_cases()) test_missed_steps(rule_case);
}
