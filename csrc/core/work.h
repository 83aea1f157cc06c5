// What a step has to do, whichever device does it.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "core/dtypes.h"
#include "core/flat_array.h"
#include "core/layout.h"
#include "core/random.h"
#include "gradients/rows.h"

namespace fusestep {

namespace rules {
struct Coefficients;
class RowHistory;
}  // namespace rules

namespace selections {
struct Part;
class Selection;
}  // namespace selections

// One parameter's share of a step.
struct Work {
  Iteration iteration;                    // with `rows`: of one row, at row 0 of every operand
  const gradients::Rows* rows = nullptr;  // the rows that move, where not all do
  DType compute;                          // the type the rule computes in
  const rules::Coefficients* rule = nullptr;

  // Where rows that have missed steps are brought up to date before they move: what they missed.
  // With only_catches_up that is all that happens, and there is no gradient.
  const rules::RowHistory* history = nullptr;
  bool only_catches_up = false;

  // Where the parameter is anchored (rules/anchor.h): which operands say where, and how much.
  struct Anchor {
    double lambda = 0, lr = 0;
    int reference = 0;   // 0: there is none
    int importance = 0;  // 0: that of all elements is 1
  };
  Anchor anchor;

  // What is written after the parameter, in the same pass: which operands, 0: there is none.
  struct Followers {
    int average = 0;  // of the parameter
    double decay = 0;
    int copy = 0;  // of the parameter, in another type
    bool any() const { return average != 0 || copy != 0; }
  };
  Followers followers;

  // The operand that has the lower half of a parameter which is kept in two (core/split.h).
  int lower_half = 0;

  // Operands are the parameter, its gradient and its state, which the rule sees; its anchor; and
  // then those that are only looked at afterwards.
  int rule_operands = kState, operands_read = kState;

  // How a parameter and a state of less than 32 bits are rounded: at random, or to nearest.
  struct Rounding {
    bool is_random_in_parameter = false, is_random_in_state = false;
    RandomStream stream{};  // of this step of the parameter

    bool is_random(int operand) const {
      return operand == kParameter ? is_random_in_parameter : is_random_in_state;
    }
    bool is_random() const { return is_random_in_parameter || is_random_in_state; }

    // For an operand and one of its tiles.
    TileRandom of(int operand, std::int64_t tile) const {
      return TileRandom::of(stream, operand, tile);
    }
  };
  Rounding rounding;

  // Each element is rounded by the random bits for its number: that of its tile times kTileSize,
  // and its place there. Parts of parameters have their tiles in C order, which on a GPU is not how
  // they are walked: then numbers are those in C order.
  struct Numbers {
    std::int64_t first = 0;  // that of the first element
    int operand = 0;         // whose strides say how they go on, in place of bytes; 0: one by one
  };
  Numbers numbers;

  // On a GPU, where parts of a parameter are counted in C order, and the gradient is one of rows:
  // the elements of a row.
  std::int64_t gradient_row = 0;

  // The state of a row-wise rule: one element for each row of the parameter.
  bool is_rowwise = false;
  Operand row_state;
  std::int64_t row_state_stride = 0;  // in bytes

  bool keeps_value = false;  // only the state moves; where work is cut up, see `part`

  // Of a row-wise rule: the rows whose value may change, where the others' does not.
  const selections::Selection* selected_rows = nullptr;

  // Where not all elements move, or not all have come as far: then neither `iteration` nor `rows`
  // says which, but this does.
  const selections::Part* part = nullptr;

  // Where less moves than the gradient has: all of it.
  struct WholeGradient {
    const FlatArray* array = nullptr;
    std::int64_t size = 0;
  };
  WholeGradient whole_gradient;

  double gradient_factor = 1;  // multiplies the gradient, besides the step's own factor

  std::int64_t elements() const {
    return part ? elements_of_part() : iteration.size * (rows ? rows->count() : 1);
  }

  // What a thread may be given: a row-wise rule has to see all of a row, and so has who decides how
  // the row makes up for missed steps.
  bool moves_whole_rows() const { return is_rowwise || (history && iteration.tiles() > 1); }
  std::int64_t pieces() const { return moves_whole_rows() ? rows->count() : tiles(); }

  // Of a table: those of its first row that moves, then those of the next, ...
  std::int64_t tiles() const {
    return part ? tiles_of_part() : iteration.tiles() * (rows ? rows->count() : 1);
  }

 private:
  std::int64_t tiles_of_part() const;
  std::int64_t elements_of_part() const;  // at most; more where each of them is more work
};

struct StepOptions {
  double gradient_factor = 1;  // multiplies every gradient
  bool clear_gradients = false;
  double gradient_bound = std::numeric_limits<double>::infinity();  // of each element, after that
};

using WorkList = std::span<const Work* const>;

}  // namespace fusestep
