// A rule chosen at run time: the host's handle on Options, names and coefficients.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/dtypes.h"
#include "rules/registry.h"

namespace fusestep::rules {

class AnyRule {
 public:
  virtual ~AnyRule() = default;

  // Options by name; an unknown name throws ValueError. Booleans are 0 or 1.
  virtual void set(std::string_view option, double value) = 0;

  virtual std::vector<std::string_view> state_names() const = 0;
  virtual std::vector<std::string_view> scalar_names() const = 0;
  virtual double initial_state() const = 0;

  // Whether a piece of state, by its place among the names, may be negative.
  virtual bool is_signed(std::size_t state) const = 0;

  // Whether the state has one element for each row (along the first axis) of the parameter.
  virtual bool is_rowwise() const = 0;

  virtual Progress advance(const Progress&) const = 0;

  // The coefficients of the update that `at` counts, for the loop over `states` state arrays: as
  // many as state_names() has, which the caller knows and need not ask for at every step.
  virtual Coefficients coefficients(const Progress& at, DType compute, double lr,
                                    std::size_t states) const = 0;

  // What this update does to a row without a gradient; see rules/idle.h.
  virtual IdleBytes idle(const Progress& at, double lr) const = 0;

  // Adds a later step to each of these.
  virtual void extend(std::span<IdleBytes> each, const IdleBytes& later) const = 0;

  // Options by name, in a fixed order, and their values.
  virtual std::vector<std::string_view> option_names() const = 0;
  virtual std::vector<double> option_values() const = 0;

  virtual std::unique_ptr<AnyRule> clone() const = 0;

  // What the coefficients are worked out from, for who does it elsewhere: the loop and the options.
  virtual std::size_t loop(std::size_t states) const = 0;
  virtual OptionBytes options() const = 0;
};

// Throws ValueError for a name that is not in kRules.
std::unique_ptr<AnyRule> make_rule(std::string_view name);

}  // namespace fusestep::rules
