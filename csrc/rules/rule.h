// What every rule has in common.
//
// A rule is a struct template over the type it computes in. Its members are coefficients, worked
// out once a step in double from the user's options; its call operator moves one element:
//
//     rule(w, g, state...)        w and state are changed in place, g is the gradient
//
// and may be overloaded on the number of state values (SGD without and with momentum). Beside it
// stand its Options and static functions, of which the host uses the first three alone:
//
//     state_names(options)        torch.optim's names, in the order of the call operator
//     scalar_names()              torch.optim's names of what it keeps of Progress, in its order
//     initial_state(options)      the value every state element starts from
//     is_signed(state)            whether a piece of state may be negative, in that order
//     advance(options, progress)  what a step does to the parameter's scalars
//
// Where it tests its options much, a rule may say
//
//     is_usual()                  they are those that most people choose: a loop that cannot test
//                                 them once for all elements is for these alone
//
// A rule that linear models use has its step in pieces, too. For an importance-aware step
// (linear/losses.h) the length of the move depends on the metric that the rule will apply:
//
//     observe(g, state...)        what the state learns of the size of the gradient
//     conditioned(g, state...)    what the gradient, in the end, takes from the weight: linear in g
//     advance(w, g, state...)     the rest of the step, where conditioned(g) is not all at once
//
// Host and device compile the same text. It uses + - * / and square_root on T, nothing else, so
// the result is a fixed sequence of correctly rounded operations (contraction is off in the build).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <tuple>
#include <vector>

#include "core/annotations.h"
#include "core/floating.h"

namespace fusestep::rules {

// Where one parameter stands: scalars that belong to it rather than to its elements.
struct Progress {
  std::int64_t step = 0;          // updates it has had, the current one included
  double momentum_product = 1.0;  // NAdam's product of mu_1 ... mu_step

  bool operator==(const Progress&) const = default;
};

// Names one member of an Options struct for Python.
template <class Options, class Value>
struct Field {
  std::string_view name;
  Value Options::* member;
};

template <class Options, class Value>
Field(std::string_view, Value Options::*) -> Field<Options, Value>;

FUSESTEP_HOST_DEVICE Progress next_step(Progress progress) {
  ++progress.step;
  return progress;
}

}  // namespace fusestep::rules
