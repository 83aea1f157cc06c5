// The list of rules. A new rule adds its header and its lines here; nothing else in C++ changes.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "core/annotations.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/nadam.h"
#include "rules/rowwise_adagrad.h"
#include "rules/sgd.h"

namespace fusestep::rules {

template <template <class> class Rule>
struct Named {
  const char* name;
  template <class T>
  using Of = Rule<T>;
};

// What Python may ask for.
inline constexpr auto kRules =
    std::tuple{Named<Sgd>{"sgd"}, Named<Adam>{"adam"}, Named<NAdam>{"nadam"},
               Named<Adagrad>{"adagrad"}, Named<RowwiseAdagrad>{"rowwise_adagrad"}};

// True for rules whose state belongs to rows rather than to elements.
template <class Rule>
inline constexpr bool kIsRowwise = requires { Rule::kRowwise; };

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

  // Calls visit(Loop{}) with the loop of this index.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // it may be a function of either side
#endif
  template <class Visit>
  FUSESTEP_HOST_DEVICE static void visit(std::size_t index, Visit visit) {
    std::size_t i = 0;
    static_cast<void>(((i++ == index && (visit(Loops{}), true)) || ...));
  }

  template <class Wanted>
  static constexpr std::size_t index() {
    std::size_t i = 0;
    const bool found = ((std::is_same_v<Loops, Wanted> || (++i, false)) || ...);
    return found ? i : size;
  }
};

using Loops = LoopList<Loop<Sgd, 0>, Loop<Sgd, 1>, Loop<Adam, 2>, Loop<Adam, 3>, Loop<NAdam, 2>,
                       Loop<Adagrad, 1>, Loop<RowwiseAdagrad, 0>>;

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

// Something small with its type forgotten.
template <std::size_t size>
struct Bytes {
  alignas(8) unsigned char bytes[size];

  template <class Value>
  FUSESTEP_HOST_DEVICE static Bytes of(const Value& value) {
    static_assert(sizeof(Value) <= size && std::is_trivially_copyable_v<Value>);
    Bytes result{};
    memcpy(result.bytes, &value, sizeof value);
    return result;
  }

  template <class Value>
  FUSESTEP_HOST_DEVICE Value as() const {
    Value value;
    memcpy(&value, bytes, sizeof value);
    return value;
  }
};

using IdleBytes = Bytes<88>;    // a rule's Idle
using OptionBytes = Bytes<64>;  // a rule's options: what a GPU works out coefficients by

}  // namespace fusestep::rules
