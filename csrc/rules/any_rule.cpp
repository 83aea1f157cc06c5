#include "rules/any_rule.h"

#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/errors.h"

namespace fusestep::rules {
namespace {

template <template <class> class Rule>
class Chosen final : public AnyRule {
  using Options = typename Rule<float>::Options;

 public:
  void set(std::string_view option, double value) override {
    visit(option, [&](auto member) {
      options_.*member = static_cast<std::decay_t<decltype(options_.*member)>>(value);
    });
  }

  std::vector<std::string_view> state_names() const override {
    return Rule<float>::state_names(options_);
  }

  std::vector<std::string_view> scalar_names() const override {
    return Rule<float>::scalar_names();
  }

  double initial_state() const override { return Rule<float>::initial_state(options_); }

  bool is_signed(std::size_t state) const override { return Rule<float>::is_signed(state); }

  Progress advance(const Progress& progress) const override {
    return Rule<float>::advance(options_, progress);
  }

  Coefficients coefficients(const Progress& at, DType compute, double lr,
                            std::size_t states) const override {
    Options options = options_;
    options.lr = lr;
    return compute == DType::float64 ? Coefficients::of(loop(states), Rule<double>(options, at))
                                     : Coefficients::of(loop(states), Rule<float>(options, at));
  }

  IdleBytes idle(const Progress& at, double lr) const override {
    Options options = options_;
    options.lr = lr;
    return IdleBytes::of(Rule<double>::idle(options, at));
  }

  void extend(std::span<IdleBytes> each, const IdleBytes& later) const override {
    using Idle = typename Rule<double>::Idle;
    const Idle step = later.as<Idle>();
    for (IdleBytes& earlier : each) earlier = IdleBytes::of(earlier.as<Idle>().then(step));
  }

  std::vector<std::string_view> option_names() const override {
    return std::apply([](auto... field) { return std::vector{field.name...}; }, Options::fields());
  }

  std::vector<double> option_values() const override {
    return std::apply(
        [&](auto... field) { return std::vector{static_cast<double>(options_.*field.member)...}; },
        Options::fields());
  }

  std::unique_ptr<AnyRule> clone() const override { return std::make_unique<Chosen>(*this); }

  bool is_rowwise() const override { return kIsRowwise<Rule<float>>; }

  std::size_t loop(std::size_t states) const override {
    if (is_rowwise()) states = 0;  // the loop meets elements only
    static constexpr std::size_t index[] = {
        Loops::index<Loop<Rule, 0>>(), Loops::index<Loop<Rule, 1>>(), Loops::index<Loop<Rule, 2>>(),
        Loops::index<Loop<Rule, 3>>()};
    if (states >= std::size(index) || index[states] == Loops::size)
      throw std::logic_error("a rule has no loop for its number of states: see registry.h");
    return index[states];
  }

  OptionBytes options() const override { return OptionBytes::of(options_); }

 private:
  template <class Visitor>
  static void visit(std::string_view option, Visitor visitor) {
    const bool found = std::apply(
        [&](auto... field) {
          return ((field.name == option && (visitor(field.member), true)) || ...);
        },
        Options::fields());
    if (!found) throw ValueError("unknown option '" + std::string(option) + "'");
  }

  Options options_;
};

template <template <class> class Rule>
std::unique_ptr<AnyRule> make(Named<Rule>) {
  return std::make_unique<Chosen<Rule>>();
}

}  // namespace

std::unique_ptr<AnyRule> make_rule(std::string_view name) {
  std::unique_ptr<AnyRule> rule;
  std::apply(
      [&](auto... named) {
        (static_cast<void>(named.name == name && (rule = make(named), true)), ...);
      },
      kRules);
  if (!rule) throw ValueError("unknown rule '" + std::string(name) + "'");
  return rule;
}

}  // namespace fusestep::rules
