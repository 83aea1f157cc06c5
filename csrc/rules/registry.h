// The list of rules. A new rule adds its header and its lines here; nothing else in C++ changes.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/nadam.h"
#include "rules/sgd.h"

namespace fusestep::rules {

template <template <class> class Rule>
struct Named {
  const char* name;
  template <class T>
  using Of = Rule<T>;
};

// What Python may ask for.
inline constexpr auto kRules = std::tuple{Named<Sgd>{"sgd"}, Named<Adam>{"adam"},
                                          Named<NAdam>{"nadam"}, Named<Adagrad>{"adagrad"}};

// A loop that is compiled: a rule with a given number of state arrays.
template <template <class> class Rule, int states>
struct Loop {
  template <class T>
  using Of = Rule<T>;
  static constexpr int kStates = states;
};

template <class... Loops>
struct LoopList {
  static constexpr std::size_t size = sizeof...(Loops);
  template <class Wanted>
  static constexpr std::size_t index() {
    std::size_t i = 0;
    const bool found = ((std::is_same_v<Loops, Wanted> || (++i, false)) || ...);
    return found ? i : size;
  }
};

using Loops = LoopList<Loop<Sgd, 0>, Loop<Sgd, 1>, Loop<Adam, 2>, Loop<Adam, 3>, Loop<NAdam, 2>,
                       Loop<Adagrad, 1>>;

// A rule's coefficients with the type forgotten: what a driver hands to a loop, or to a GPU.
struct Coefficients {
  std::size_t loop;  // index in Loops
  alignas(16) unsigned char bytes[112];

  template <class Rule>
  static Coefficients of(std::size_t loop, const Rule& rule) {
    static_assert(sizeof(Rule) <= sizeof bytes && std::is_trivially_copyable_v<Rule>);
    Coefficients coefficients{loop, {}};
    memcpy(coefficients.bytes, &rule, sizeof rule);
    return coefficients;
  }
};

}  // namespace fusestep::rules
