// One parameter of an optimizer: its array, its state, and how far it has come.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "arrays/array.h"
#include "cpu/step.h"
#include "cuda/arguments.h"
#include "engine/memory.h"
#include "rules/any_rule.h"
#include "rules/block_progress.h"
#include "rules/row_history.h"
#include "rules/rule.h"
#include "selections/choice.h"
#include "selections/part.h"

namespace fusestep::engine {

struct Update;

class Slot {
 public:
  Slot(std::string name, const rules::AnyRule& rule);

  // Says where the parameter and its state lie: pinned views. State in 8 bits comes with the
  // powers that its blocks share (core/blocks.h), one array for each piece of state. Throws
  // TypeError or ValueError for arrays that a step could not update, and leaves the slot as it was.
  void bind(arrays::Array parameter, std::vector<arrays::Array> states,
            std::vector<arrays::Array> powers = {});

  const std::string& name() const { return name_; }
  const std::string& state_label(std::size_t i) const { return state_labels_.at(i); }
  const arrays::Array& parameter() const { return parameter_; }
  const arrays::Array& state(std::size_t i) const { return states_[i]; }
  const arrays::Array& powers(std::size_t i) const { return powers_[i]; }

  // Adds the parameter and its state to the memory that gradients must not touch.
  void occupy(OccupiedMemory& memory) const;

  // Checks everything about a gradient and works out how to walk it together with the parameter.
  // Changes nothing that a caller can see.
  void prepare(const arrays::Array& gradient, const OccupiedMemory& memory, bool clears_gradient);

  // The same for a rule that looks at whole rows.
  void prepare_all_rows(const arrays::Array& gradient, const OccupiedMemory& memory,
                        bool clears_gradient);

  // The same for a gradient of some rows. Throws IndexError for a row that does not exist.
  void prepare_rows(const arrays::Array& values, std::span<const std::int64_t> numbers,
                    const OccupiedMemory& memory, bool clears_gradient);

  // The same where a part of the parameter moves: what is chosen of it, or, where its blocks have
  // come differently far, all; or where the gradient is made as it is used.
  void prepare_part(const Update& update, const OccupiedMemory& memory, bool clears_gradient);

  // Before a part moves: by which rule. From now on its blocks may come differently far.
  void begin_part(const rules::AnyRule& rule, double lr);

  // Where samples are added up before the step, rather than piece by piece as it goes: for a rule
  // that has to see all of a row, and on a GPU, whose kernels take arrays.
  bool adds_up_before() const { return is_rowwise_ || is_on_gpu(); }

  // How much memory the sum takes then.
  std::size_t bytes_of_sum() const;

  // On the CPU: adds up samples, of which it is known by now how much each counts, if it is to be
  // done before the step.
  void add_up_samples();

  // The array that an update moves the parameter by: its gradient, or the sum of its samples.
  const arrays::Array& moved_by(const Update& update) const;

  // Brings copies of so many bytes that are on a GPU.
  using Fetch = std::function<void(void* to, const void* from, std::size_t bytes)>;

  // How long the gradient of each sample is that is made from factors. On a GPU, of copies of
  // these.
  std::vector<double> norms_of_outer(const Update& update, const Fetch& fetch) const;

  // Selects what depends on the gradients, of which the factor is known by now. That happens here:
  // of what is on a GPU, `fetch` brings copies of so many bytes.
  void find_top(const arrays::Array& gradient, const StepOptions& options, const Fetch& fetch);

  // The work on rows of the parameter, which `rows` is to list, by those of a gradient.
  // Elements are numbered in C order if that is asked for, and matters.
  Work work_on_rows(const arrays::Array& gradient, gradients::Rows& rows,
                    bool is_numbered = false) const;

  // The work of bringing these rows up to date, which points to them.
  Work catch_up_work(gradients::Rows& rows) const;

  // True where the parameter, its state and what else there is are in C order, and so is the
  // gradient.
  bool is_in_c_order(const arrays::Array& gradient) const {
    return all_in_c_order_ && gradient.c_contiguous;
  }

  // From now on rows that a step does not touch miss it, and are brought up to date when used.
  void keep_history();

  // Pulls the parameter to `reference` in each step (rules/anchor.h); without `importance`, that of
  // every element is 1. Throws and changes nothing where the arrays do not fit.
  void set_anchor(double lambda, arrays::Array reference, std::optional<arrays::Array> importance);
  void release_anchor();
  const arrays::Array& anchor_reference() const { return anchor_->reference; }
  const arrays::Array& anchor_importance() const { return *anchor_->importance; }

  // Keeps an average of the parameter in this array, and a copy in that one, from the next step on.
  // Throws and changes nothing where they do not fit.
  void set_average(arrays::Array average);
  void set_copy(arrays::Array copy);
  const arrays::Array& average() const { return *average_; }
  const arrays::Array& copy() const { return *copy_; }

  // The parameter, of bfloat16, is the upper half of float32 numbers; this array of 16-bit integers
  // has the lower ones (core/split.h).
  void set_lower_half(arrays::Array lower_half);
  const arrays::Array& lower_half() const { return *lower_half_; }

  // What is rounded at random: narrow state, and a parameter of 16 bits if that is asked for.
  Work::Rounding rounding(bool of_parameter) const;

  // Throws ValueError where the parameter or its state is no longer what it was at the beginning.
  void check_is_current() const;

  // Whether its state is in blocks (core/blocks.h), which a step moves whole, in C order.
  bool has_blocks() const { return !powers_.empty(); }

  // Whether it has to be walked like a part, for that reason alone.
  bool is_walked_in_c_order(const arrays::Array& gradient) const {
    return has_blocks() && !is_in_c_order(gradient);
  }

  // Whether its state has less than 32 bits, and is rounded at random.
  bool has_narrow_state() const { return has_narrow_state_; }

  std::size_t states() const { return states_.size(); }
  bool has_split_progress() const { return block_progress && block_progress->is_split(); }
  bool is_rowwise() const { return is_rowwise_; }

  // Whether prepare() met the same memory as the time before.
  bool gradient_is_known() const { return gradient_is_known_; }

  const Device& device() const { return parameter_.device; }

  Work work;  // what prepare() found; its coefficients are the caller's to add
  rules::Progress progress;
  std::shared_ptr<rules::RowHistory> history;            // where missed steps are made up for
  std::shared_ptr<rules::BlockProgress> block_progress;  // where blocks have come differently far

  // Where progress is kept on a GPU, and what is here may be old; see Gpu.
  struct Resident {
    std::size_t index = 0;
    cuda::Scalar step, momentum_product;  // copies that others may read and write, or null
  };
  Resident resident;

 private:
  bool has_state_shape(const arrays::Array& state, const arrays::Array& parameter) const;
  bool is_known(const arrays::Array& gradient) const;
  void check_gradient(const arrays::Array& gradient, const OccupiedMemory& memory,
                      bool clears_gradient);
  void check_rows(const arrays::Array& values, std::span<const std::int64_t> numbers,
                  const OccupiedMemory& memory, bool clears_gradient);
  void check_shape_of_rows(const arrays::Array& values) const;
  void plan_samples(const Update& update);
  void plan_sum(const Update& update);
  void check_samples(const arrays::Array& values, const OccupiedMemory& memory,
                     bool clears_gradient);
  void check_factors(const Update& update, const OccupiedMemory& memory);
  void check_memory(const arrays::Array& gradient, const OccupiedMemory& memory,
                    bool clears_gradient);
  void plan(const arrays::Array& gradient, bool is_numbered = false);
  bool needs_numbers(const arrays::Array& gradient) const;
  bool is_on_gpu() const { return device().kind == Device::cuda; }
  void check_can_choose(const selections::Choice& choice, bool is_of_rows) const;
  void check_state_has_one_layout() const;
  void select_all();
  void select(const selections::Choice& choice, const selections::Draw& draw);
  void select_mask(const selections::Choice::Mask& mask);
  void plan_part(const arrays::Array& gradient);
  void check_selects_rows() const;
  void plan_selected_rows(const arrays::Array& gradient, bool has_all_rows);
  std::int64_t row_size() const;
  void plan_rows(const arrays::Array& values, Work& work, gradients::Rows& rows,
                 bool is_numbered = false) const;

  // What is walked together, and how much of it there is.
  struct Operands {
    std::array<const arrays::Array*, kMaxOperands> array{};
    std::size_t count = 0;
    void add(const arrays::Array& one) { array[count++] = &one; }
  };
  Operands operands(const arrays::Array& gradient) const;
  Operand operand(std::size_t i, const arrays::Array& array) const;
  void check_state(const arrays::Array& parameter, const arrays::Array& state,
                   const arrays::Array* powers, const std::string& label) const;
  void check_moves_whole_blocks() const;
  bool counts_whole_blocks() const;
  void plan_others(Work& work) const;
  void check_follower(const arrays::Array& array, const std::string& label) const;
  void find_order();

  std::string name_, average_label_, copy_label_, lower_half_label_;
  arrays::Array parameter_;
  std::vector<arrays::Array> states_, powers_;
  std::vector<std::string> state_labels_;
  std::vector<bool> state_is_signed_;
  const bool is_rowwise_;       // its state has one element for each row
  bool all_in_c_order_ = true;  // the parameter and its state
  bool has_narrow_state_ = false;
  struct Anchor {
    double lambda;
    arrays::Array reference;
    std::optional<arrays::Array> importance;
  };
  std::optional<Anchor> anchor_;
  std::optional<arrays::Array> average_, copy_, lower_half_;
  selections::Part part_;   // of the last step that moved one
  gradients::Outer outer_;  // of the last gradient that was made from factors
  FlatArray whole_gradient_;
  std::vector<std::byte> sum_memory_;  // of samples, where they are added up before the step
  arrays::Array sum_;
  gradients::Rows rows_;  // of the last gradient that was one of rows

  // The last gradient's memory, which was found to be disjoint from all parameters and states.
  struct Known {
    const std::byte* data = nullptr;
    DType dtype = DType::float32;
    bool c_contiguous = false;
    std::vector<std::int64_t> strides;
  };
  OccupiedMemory::Gap gap_;  // a stretch of memory around it that nothing occupies
  Known known_;
  bool gradient_is_known_ = false;
};

}  // namespace fusestep::engine
