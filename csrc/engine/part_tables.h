// A part of a parameter on a GPU, as the tables of rows that its kernels walk.
//
// A parameter is a table with a piece of its memory in each row, of which some rows move; a shorter
// last piece comes after it. Pieces are as long as what is selected and the layouts allow: blocks,
// the parameter's own rows, or single elements. What has come equally far is one table, since it
// shares its coefficients.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

#include "core/work.h"
#include "gradients/rows.h"
#include "rules/any_rule.h"

namespace fusestep::engine {

struct Update;

// Pieces of work, with what they point to.
class Tables {
 public:
  Tables() = default;
  Tables(Tables&&) = default;
  Tables& operator=(Tables&&) = default;

  // Adds work that is kept elsewhere; or keeps it here, with the rows that it is of.
  void add(const Work* work) { list_.push_back(work); }
  void add(const Work& work);
  void add(const Work& work, gradients::Rows rows);

  const rules::Coefficients* keep(const rules::Coefficients& coefficients) {
    return &coefficients_.emplace_back(coefficients);
  }

  WorkList list() const { return list_; }

 private:
  std::deque<Work> work_;
  std::deque<gradients::Rows> rows_;
  std::deque<rules::Coefficients> coefficients_;
  std::vector<const Work*> list_;
};

// Adds what an update moves, once it is known how far its blocks have come.
void add_moving(const Update& update, Tables& tables);

// Adds all of a gradient, to be cleared.
void add_whole_gradient(const Update& update, Tables& tables);

// The gradients that a norm is of, in tiles of the parameters in C order as on the CPU, so that
// sums have the same bits. What is selected seldom consists of such tiles: then it is copied to
// scratch memory first, in which the rest of each tile is 0.
class SummedGradients {
 public:
  // How much scratch memory an update takes.
  static std::size_t scratch_bytes(const Update& update);

  // Adds an update that has so much there.
  void add(const Update& update, std::byte* scratch);

  // What is to be cleared first; then to be stepped, by which gradients are copied; then summed.
  WorkList cleared() const { return cleared_.list(); }
  WorkList copied() const { return copied_.list(); }
  WorkList summed() const { return summed_.list(); }

 private:
  void add_copies(const Update& update, const Operand& scratch);

  Tables cleared_, copied_, summed_;
};

}  // namespace fusestep::engine
