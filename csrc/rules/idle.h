// What steps with a zero gradient do, several of them put together.
//
// A dense optimizer moves every row of a table in every step, those without a gradient, too: the
// momentum goes on, the moments fade, the weight decays. To do the same when only some rows are
// looked at in a step, a row has to be brought up to date before it is used: by all the steps it
// has missed at once. Each rule's header says how (its Idle), as numbers that
//
//     describe one step           Idle::step(options, progress)
//     can be joined               earlier.then(later)
//     move one element            IdleMove<T>(idle)(w, state...)
//
// and whether they do so precisely enough (`suits`); if not, the steps are taken one by one, by the
// rule itself. So it is with numbers that are not finite, which each rule meets in its own way.
#pragma once

#include "core/annotations.h"
#include "core/floating.h"

namespace fusestep::rules {

// 1 - (1 - a)(1 - b), which keeps the digits of shares that are far below 1.
FUSESTEP_HOST_DEVICE double joined_shares(double a, double b) { return a + b - a * b; }

template <class T>
FUSESTEP_HOST_DEVICE bool is_ordinary(T x) {
  return (x >= -largest(x)) & (x <= largest(x));
}

// Of rules that are at rest without a gradient, unless there is weight decay, which passes through
// their state: for that there is no closed form.
struct IdleAtRest {
  bool is_closed = true;

  FUSESTEP_HOST_DEVICE IdleAtRest then(const IdleAtRest& later) const {
    return {is_closed && later.is_closed};
  }

  template <class T>
  struct Move {
    FUSESTEP_HOST_DEVICE explicit Move(const IdleAtRest&) {}
    template <class... State>
    FUSESTEP_HOST_DEVICE bool suits(T, State...) const {
      return true;
    }
    template <class... State>
    FUSESTEP_HOST_DEVICE void operator()(T&, State&...) const {}
  };
};

}  // namespace fusestep::rules
