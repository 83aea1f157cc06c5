#include "engine/slot.h"

#include <algorithm>
#include <array>
#include <deque>
#include <numeric>
#include <utility>

#include "core/errors.h"
#include "cpu/outer_norms.h"
#include "cpu/samples.h"
#include "cpu/top.h"
#include "engine/stepper.h"

namespace fusestep::engine {

using arrays::Array;
using arrays::Label;
using arrays::shape_text;

namespace {

bool same_shape(const Array& a, const Array& b) {
  return std::ranges::equal(a.geometry().shape, b.geometry().shape);
}

void check_updatable(const Array& array, const std::string& name) {
  if (!array.writable)
    throw ValueError(name + " is read-only, or of a library that cannot say it is not");
  if (!array.c_contiguous && !elements_are_disjoint(array.geometry(), item_size(array.dtype)))
    throw ValueError(name + " overlaps itself: several of its elements share one place in memory");
}

// What a step moves is about to be said anew.
void forget_plan(Work& work) {
  work.rows = nullptr;
  work.history = nullptr;
  work.part = nullptr;
  work.selected_rows = nullptr;
  work.whole_gradient = {};
  work.numbers = {};
}

// Walks the operands together: in C order, if need be; or with the numbers of elements in C order,
// if they are asked for.
void plan_iteration(Work& work, std::span<const std::int64_t> shape,
                    std::span<Geometry, kMaxOperands> geometry, std::size_t count,
                    Iteration::Order order, bool is_numbered) {
  Iteration& iteration = work.iteration;
  if (!is_numbered) return iteration.plan(geometry.first(count), order);
  const std::vector<std::int64_t> strides = c_strides(shape, 1);
  std::byte* const start = iteration.operand[kParameter].data;
  Operand& numbers = iteration.operand[count];
  numbers = {start, DType::float32};
  geometry[count] = {shape, strides};
  iteration.plan(geometry.first(count + 1));
  work.numbers = {numbers.data - start, static_cast<int>(count)};
}

// Copies of arrays on a GPU, in the same layout, for as long as this lives; without `fetch`, the
// arrays themselves.
class HostCopies {
 public:
  explicit HostCopies(Slot::Fetch fetch) : fetch_(std::move(fetch)) {}

  FlatArray of(const Array& array) { return of(array.operand(), array); }

  // The same of an operand that is such an array.
  FlatArray of(Operand operand, const Array& array) {
    if (fetch_) {
      const auto [first, last] = array.interval();
      const auto offset = static_cast<std::uint64_t>(operand.data - data_at(first));
      operand.data = copied(data_at(first), last - first) + offset;
      if (operand.powers)
        operand.powers = copied(operand.powers, static_cast<std::size_t>(blocks_of(array.size)));
    }
    FlatArray flat;
    flat.view(operand, array.geometry());
    return flat;
  }

 private:
  static std::byte* data_at(std::uintptr_t address) {
    return reinterpret_cast<std::byte*>(address);
  }
  std::byte* copied(const std::byte* from, std::size_t bytes) {
    std::vector<std::byte>& copy = copies_.emplace_back(bytes);
    if (bytes > 0) fetch_(copy.data(), from, bytes);
    return copy.data();
  }

  Slot::Fetch fetch_;
  std::deque<std::vector<std::byte>> copies_;
};

void check_has_rows(const Array& array, const std::string& name) {
  if (array.geometry().shape.empty()) throw ValueError(name + " has no dimensions, and so no rows");
}

}  // namespace

Slot::Slot(std::string name, const rules::AnyRule& rule)
    : name_(std::move(name)),
      average_label_("the average of " + name_),
      copy_label_("the copy of " + name_),
      lower_half_label_("the lower half of " + name_),
      is_rowwise_(rule.is_rowwise()) {
  for (const std::string_view state : rule.state_names()) {
    state_is_signed_.push_back(rule.is_signed(state_labels_.size()));
    state_labels_.push_back("the " + std::string(state) + " of " + name_);
  }
}

void Slot::bind(Array parameter, std::vector<Array> states, std::vector<Array> powers) {
  check_updatable(parameter, name_);
  if (is_rowwise_) check_has_rows(parameter, name_);
  bool in_double = parameter.dtype == DType::float64;
  for (std::size_t i = 0; i < states.size(); ++i) {
    check_state(parameter, states[i], powers.empty() ? nullptr : &powers.at(i),
                state_labels_.at(i));
    in_double = in_double || states[i].dtype == DType::float64;
  }
  parameter_ = std::move(parameter);
  states_ = std::move(states);
  powers_ = std::move(powers);
  has_narrow_state_ =
      std::ranges::any_of(states_, [](const Array& state) { return item_size(state.dtype) < 4; });
  work.compute = in_double ? DType::float64 : DType::float32;
  known_ = {};
  find_order();
}

void Slot::check_state(const Array& parameter, const Array& state, const Array* powers,
                       const std::string& label) const {
  if (!has_state_shape(state, parameter))
    throw ValueError(label + " has shape " + shape_text(state) + "; expected " +
                     (is_rowwise_ ? "one element for each row of " : "") + shape_text(parameter));
  const bool is_narrow = state.dtype == DType::bfloat16 || is_in_blocks(state.dtype);
  if (state.dtype == DType::float16 || state.dtype == DType::bits16 || (is_rowwise_ && is_narrow))
    throw TypeError(label + " has dtype " + name_of(state.dtype) + "; expected float32" +
                    (is_rowwise_ ? " or float64" : ", float64 or bfloat16"));
  if (state.device != parameter.device)
    throw ValueError(label + " is on " + name_of(state.device) + "; expected " +
                     name_of(parameter.device));
  check_updatable(state, label);
  if (is_in_blocks(state.dtype) != (powers != nullptr))
    throw TypeError(label + " has dtype " + name_of(state.dtype) +
                    (powers ? ", and comes with powers" : ", and comes without powers"));
  if (!powers) return;
  const std::int64_t blocks = blocks_of(parameter.size);
  if (!state.c_contiguous || !powers->c_contiguous || powers->dtype != DType::bits8 ||
      powers->size != blocks || !powers->writable || powers->device != state.device)
    throw ValueError(label + " must be in C order, with " + std::to_string(blocks) +
                     " powers of uint8, one for each block of " + std::to_string(kBlockElements) +
                     " elements");
}

bool Slot::has_state_shape(const Array& state, const Array& parameter) const {
  if (!is_rowwise_) return same_shape(state, parameter);
  const auto shape = state.geometry().shape;
  return shape.size() == 1 && shape[0] == parameter.geometry().shape[0];
}

void Slot::occupy(OccupiedMemory& memory) const {
  memory.add(parameter_, name_);
  for (std::size_t i = 0; i < states_.size(); ++i) memory.add(states_[i], state_labels_[i]);
  for (std::size_t i = 0; i < powers_.size(); ++i) memory.add(powers_[i], state_labels_[i]);
  if (average_) memory.add(*average_, average_label_);
  if (copy_) memory.add(*copy_, copy_label_);
  if (lower_half_) memory.add(*lower_half_, lower_half_label_);
}

void Slot::prepare(const Array& gradient, const OccupiedMemory& memory, bool clears_gradient) {
  check_gradient(gradient, memory, clears_gradient);
  if (!gradient_is_known_ || work.part || work.iteration.operands == 0) plan(gradient);
}

void Slot::check_is_current() const {
  const auto check = [](const Array& array, const std::string& name) {
    if (!array.is_current())
      throw ValueError(name + " has been given other memory, shape or dtype, or been made " +
                       "read-only, since the optimizer was created; create a new optimizer and " +
                       "load this one's state_dict()");
  };
  check(parameter_, name_);
  for (std::size_t i = 0; i < states_.size(); ++i) check(states_[i], state_labels_[i]);
  for (std::size_t i = 0; i < powers_.size(); ++i) check(powers_[i], state_labels_[i]);
  if (average_) check(*average_, average_label_);
  if (copy_) check(*copy_, copy_label_);
  if (lower_half_) check(*lower_half_, lower_half_label_);
}

void Slot::check_gradient(const Array& gradient, const OccupiedMemory& memory,
                          bool clears_gradient) {
  if (!same_shape(gradient, parameter_))
    throw ValueError("the gradient of " + name_ + " has shape " + shape_text(gradient) +
                     "; expected " + shape_text(parameter_));
  check_memory(gradient, memory, clears_gradient);
}

void Slot::check_memory(const Array& gradient, const OccupiedMemory& memory, bool clears_gradient) {
  const auto label = [&] { return "the gradient of " + name_; };
  if (gradient.device != parameter_.device)
    throw ValueError(label() + " is on " + name_of(gradient.device) + "; expected " +
                     name_of(parameter_.device));
  if (clears_gradient && !gradient.writable)
    throw ValueError(label() + " is read-only, so zero_grad=True cannot clear it");
  if (clears_gradient && !gradient.c_contiguous &&
      !elements_are_disjoint(gradient.geometry(), item_size(gradient.dtype)))
    throw ValueError(label() + " overlaps itself, so zero_grad=True would clear elements unused");

  gradient_is_known_ = is_known(gradient) && memory.generation() == gap_.generation;
  if (gradient_is_known_) return;
  if (!memory.contains(gap_, gradient))
    if (const std::string* other = memory.overlapping(gradient, gap_))
      throw ValueError(label() + " shares memory with " + *other);
  const auto strides = gradient.geometry().strides;
  known_ = {gradient.data, gradient.dtype, gradient.c_contiguous, {}};
  if (!gradient.c_contiguous) known_.strides.assign(strides.begin(), strides.end());
}

void Slot::prepare_rows(const Array& values, std::span<const std::int64_t> numbers,
                        const OccupiedMemory& memory, bool clears_gradient) {
  check_rows(values, numbers, memory, clears_gradient);
  if (has_blocks()) {
    select_all();
    part_.rows = &rows_;
    check_moves_whole_blocks();
  }
  plan_rows(values, work, rows_);
}

void Slot::check_rows(const Array& values, std::span<const std::int64_t> numbers,
                      const OccupiedMemory& memory, bool clears_gradient) {
  check_has_rows(parameter_, name_);
  check_shape_of_rows(values);
  known_ = {};  // their shape is not the parameter's: they may reach further than a gradient did
  check_memory(values, memory, clears_gradient);
  known_ = {};
  gradient_is_known_ = false;
  try {
    rows_.plan(numbers, parameter_.geometry().shape[0]);
  } catch (const IndexError& error) {
    throw IndexError("the gradient of " + name_ + " has " + error.what());
  }
}

std::size_t Slot::bytes_of_sum() const {
  return static_cast<std::size_t>(parameter_.size * item_size(work.compute));
}

void Slot::plan_samples(const Update& update) {
  part_.samples = update.samples.get();
  part_.outer = update.x ? &outer_ : nullptr;
}

// In the memory that the update has for it on a GPU, and in its own on the CPU.
void Slot::plan_sum(const Update& update) {
  std::byte* memory = update.room_for_sum;
  if (!is_on_gpu()) {
    plan_samples(update);
    part_.size = parameter_.size;
    part_.operand[kGradient].view(update.gradient.operand(), update.gradient.geometry());
    sum_memory_.resize(bytes_of_sum());
    memory = sum_memory_.data();
  }
  sum_ = Array::dense(memory, work.compute, parameter_.geometry().shape, device());
}

void Slot::add_up_samples() {
  if (!is_on_gpu() && is_rowwise_) cpu::add_up_samples(part_, work.compute, sum_memory_.data());
}

const Array& Slot::moved_by(const Update& update) const {
  return update.samples && adds_up_before() ? sum_ : update.gradient;
}

void Slot::check_samples(const Array& values, const OccupiedMemory& memory, bool clears_gradient) {
  const auto shape = parameter_.geometry().shape, given = values.geometry().shape;
  if (!std::ranges::equal(shape, given.subspan(1)))
    throw ValueError("the samples for " + name_ + " have values of shape " + shape_text(values) +
                     "; expected one gradient for each sample, of shape " + shape_text(parameter_));
  known_ = {};  // their shape is not the parameter's
  check_memory(values, memory, clears_gradient);
  known_ = {};
  gradient_is_known_ = false;
}

void Slot::check_factors(const Update& update, const OccupiedMemory& memory) {
  const Array& error = update.gradient;
  const auto shape = parameter_.geometry().shape;
  std::vector<std::int64_t> expected{error.geometry().shape.back()};
  if (update.x) expected.push_back(update.x->geometry().shape.back());
  if (!std::ranges::equal(shape, expected))
    throw ValueError(name_ + " has shape " + shape_text(parameter_) + "; the outer products of " +
                     "error " + shape_text(error) +
                     (update.x ? " and x " + shape_text(*update.x) : " without x") + " have " +
                     shape_text(expected));
  for (const Array* factor : {&error, static_cast<const Array*>(update.x.get())}) {
    if (!factor) continue;
    known_ = {};
    check_memory(*factor, memory, false);
  }
  known_ = {};
  gradient_is_known_ = false;
  outer_.rows = expected[0];
  outer_.error.view(error.operand(), error.geometry());
  outer_.columns = update.x ? expected[1] : 1;
  if (update.x) outer_.x.view(update.x->operand(), update.x->geometry());
}

std::vector<double> Slot::norms_of_outer(const Update& update, const Fetch& fetch) const {
  HostCopies copies(is_on_gpu() ? fetch : Fetch{});
  const FlatArray error = copies.of(update.gradient);
  FlatArray x;
  if (update.x) x = copies.of(*update.x);
  return cpu::norms_of_outer(*update.samples, work.compute, error, outer_.rows,
                             update.x ? &x : nullptr, outer_.columns);
}

void Slot::prepare_all_rows(const Array& gradient, const OccupiedMemory& memory,
                            bool clears_gradient) {
  check_gradient(gradient, memory, clears_gradient);
  rows_.plan_all(parameter_.geometry().shape[0]);
  plan_rows(gradient, work, rows_);
}

// ---- a part of the parameter ----

void Slot::prepare_part(const Update& update, const OccupiedMemory& memory, bool clears_gradient) {
  const Array& gradient = update.gradient;
  const auto& numbers = update.row_numbers;
  // First what may be refused: a gradient that has been checked counts as known.
  if (update.choice) check_can_choose(*update.choice, numbers.has_value());
  select_all();
  if (update.choice) select(*update.choice, update.draw);
  if (is_rowwise_) check_selects_rows();
  if (numbers) check_has_rows(parameter_, name_);
  part_.rows = numbers ? &rows_ : nullptr;
  if (has_blocks()) check_moves_whole_blocks();
  if (is_on_gpu() && !is_rowwise_ && update.moves_parts()) check_state_has_one_layout();
  if (numbers)
    check_rows(gradient, *numbers, memory, clears_gradient);
  else if (update.is_outer)
    check_factors(update, memory);
  else if (update.samples)
    check_samples(gradient, memory, clears_gradient);
  else
    check_gradient(gradient, memory, clears_gradient);
  part_.samples = nullptr;
  part_.outer = nullptr;
  if (update.samples && adds_up_before())
    plan_sum(update);
  else
    plan_samples(update);
  if (is_rowwise_)
    plan_selected_rows(moved_by(update), !numbers);
  else
    plan_part(moved_by(update));
  whole_gradient_.view(gradient.operand(), gradient.geometry());
  work.whole_gradient = {&whole_gradient_, update.is_outer ? 0 : gradient.size};
}

void Slot::check_moves_whole_blocks() const {
  const std::string block = std::to_string(kBlockElements);
  if (!counts_whole_blocks())
    throw ValueError("the state of " + name_ + " is in blocks of " + block +
                     " elements (state_dtype='int8'), of which some elements have had more "
                     "updates than others: use state_dtype='bfloat16'");
  std::int64_t granule = part_.tracks ? 0 : part_.top ? 1 : part_.selected.granule();
  if (part_.rows) granule = std::gcd(granule, row_size());
  const bool is_all_or_nothing = !part_.rows && granule >= parameter_.size;
  if (granule % kBlockElements == 0 || is_all_or_nothing) return;
  throw ValueError("the state of " + name_ + " is in blocks of " + block +
                   " elements (state_dtype='int8'), of which a step would move a part: " +
                   (part_.rows ? "give rows of a multiple of " + block + " elements"
                               : "select blocks of a multiple of " + block) +
                   ", or use state_dtype='bfloat16'");
}

bool Slot::counts_whole_blocks() const {
  if (!has_split_progress() || block_progress->block() % kBlockElements == 0) return true;
  const std::int64_t size = parameter_.size;
  for (std::int64_t at = 0; at < size; at += kBlockElements) {
    const std::int64_t end = std::min(at + kBlockElements, size);
    if (block_progress->end_of_equal(at, end) != end) return false;
  }
  return true;
}

void Slot::check_can_choose(const selections::Choice& choice, bool is_of_rows) const {
  if (history)
    throw ValueError(name_ +
                     " has rows='exact', which means that all rows see every step; where= " +
                     "means that some do not: create the optimizer with rows='lazy'");
  if (choice.kind == selections::Choice::Kind::top && is_of_rows)
    throw ValueError("the gradient of " + name_ + " is one of some rows, of which TopK cannot " +
                     "take a fraction; give an array, or another selection");
}

// On a GPU, where parts of parameters are pieces of memory, the same ones in all of the state; with
// blocks they are counted in C order.
void Slot::check_state_has_one_layout() const {
  if (all_in_c_order_ || has_blocks()) return;
  const auto [arrays, count] = operands(parameter_);
  for (std::size_t i = kState + 1; i < count; ++i) {
    const Array &first = *arrays[kState], &other = *arrays[i];
    const auto shape = parameter_.geometry().shape;
    for (std::size_t axis = 0; axis < shape.size(); ++axis)
      if (shape[axis] > 1 && first.geometry().strides[axis] * item_size(other.dtype) !=
                                 other.geometry().strides[axis] * item_size(first.dtype))
        throw ValueError(name_ + " is on " + name_of(device()) +
                         ", and a part of it is to move (where=); there, all of its state, its "
                         "anchor, its average, its copy and its lower half must have the same "
                         "layout");
  }
}

std::int64_t Slot::row_size() const {
  std::int64_t size = 1;
  for (const std::int64_t extent : parameter_.geometry().shape.subspan(1)) size *= extent;
  return size;
}

void Slot::select_all() {
  part_.tracks = false;
  part_.top = nullptr;
  part_.selected.select_all(parameter_.size);
}

void Slot::select(const selections::Choice& choice, const selections::Draw& draw) {
  using Kind = selections::Choice::Kind;
  const std::int64_t size = parameter_.size;
  part_.tracks = choice.tracks;
  switch (choice.kind) {
    case Kind::mask: return select_mask(choice.mask);
    case Kind::random_blocks:
      cpu::announce(static_cast<std::int64_t>(choice.fraction * static_cast<double>(size)));
      return part_.selected.select_drawn(size, choice.block, choice.fraction, draw);
    case Kind::cyclic_blocks: return part_.selected.select_in_turn(size, choice.blocks, draw.step);
    case Kind::top: part_.top = &choice;
  }
}

void Slot::select_mask(const selections::Choice::Mask& mask) {
  const auto shape = parameter_.geometry().shape;
  FlatArray bytes;
  bytes.view({mask.data, DType::float32}, mask.geometry());
  const bool is_of_rows = mask.shape.size() == 1 && !shape.empty() && mask.shape[0] == shape[0];
  if (is_of_rows && (shape.size() > 1 || is_rowwise_))
    return part_.selected.select_rows(parameter_.size, shape[0], bytes);
  if (!std::ranges::equal(mask.shape, shape))
    throw ValueError("the mask (where=) for " + name_ + " has shape " + shape_text(mask.shape) +
                     "; expected " + shape_text(parameter_) +
                     (shape.size() > 1 ? " or one element for each of its rows" : ""));
  part_.selected.select_mask(parameter_.size, bytes);
}

void Slot::plan_part(const Array& gradient) {
  const auto [arrays, count] = operands(gradient);
  forget_plan(work);
  if (is_on_gpu() && (!part_.rows || has_blocks()))
    plan(gradient, needs_numbers(gradient));  // should all of it move
  plan_others(work);
  part_.lower_half = work.lower_half;
  part_.has_blocks = has_blocks();
  part_.size = parameter_.size;
  part_.operands = static_cast<int>(count);
  part_.everything.select_all(part_.size);
  part_.row_size = parameter_.geometry().shape.empty() ? 1 : row_size();
  if (part_.rows) {
    std::vector<std::int64_t> listed;
    for (std::int64_t i = 0; i < rows_.count(); ++i) listed.push_back(rows_.row(i));
    part_.listed.select_blocks(part_.size, part_.row_size, std::move(listed));
  }
  for (std::size_t i = 0; i < count; ++i)
    part_.operand[i].view(operand(i, *arrays[i]), arrays[i]->geometry());
  work.part = &part_;
}

// A row-wise rule moves rows, whole ones.
void Slot::check_selects_rows() const {
  const std::int64_t size = row_size();
  const bool are_whole = size == 0 || part_.selected.granule() % size == 0;
  if (part_.top || (parameter_.size > 0 && !are_whole))
    throw ValueError("the state of " + name_ + " has one element for each row, so where= must " +
                     "select whole rows: a mask of its first axis, or blocks of whole rows (of " +
                     std::to_string(size) + " elements)");
}

void Slot::plan_selected_rows(const Array& gradient, bool has_all_rows) {
  const std::int64_t size = row_size();
  if (has_all_rows) rows_.plan_all(parameter_.geometry().shape[0]);
  if (!part_.tracks && !part_.selected.is_everything())
    rows_.filter([&](std::int64_t row) { return part_.selected.holds(row * size); });
  plan_rows(gradient, work, rows_);
  if (part_.tracks) work.selected_rows = &part_.selected;
}

void Slot::begin_part(const rules::AnyRule& rule, double lr) {
  if (!work.part) return;
  std::int64_t block = part_.tracks ? 0 : part_.top ? 1 : part_.selected.granule();
  if (part_.rows && (block != 0 || has_split_progress())) block = std::gcd(block, part_.row_size);
  if (block != 0 && part_.size > 0) {
    if (!block_progress) block_progress = std::make_shared<rules::BlockProgress>();
    if (block_progress->is_split())
      block_progress->refine(block);
    else
      block_progress->split(part_.size, block, progress, rule);
  }
  part_.progress = has_split_progress() ? block_progress.get() : nullptr;
  part_.rule = &rule;
  part_.lr = lr;
  part_.states = states_.size();
}

void Slot::find_top(const Array& gradient, const StepOptions& options, const Fetch& fetch) {
  if (!work.part || !part_.top) return;
  if (!is_on_gpu()) {
    part_.selected = cpu::find_top(work, options);
    return;
  }
  const bool needs_all = part_.top->by == selections::Choice::Size::of_update;
  selections::Part here = part_;
  HostCopies copies(fetch);
  const auto [arrays, count] = operands(gradient);
  for (std::size_t i = 0; i < count; ++i)
    if (needs_all || i == kGradient)
      here.operand[i] = copies.of(operand(i, *arrays[i]), *arrays[i]);
  Work of_copies = work;
  of_copies.part = &here;
  part_.selected = cpu::find_top(of_copies, options);
}

void Slot::keep_history() {
  const auto shape = parameter_.geometry().shape;
  if (shape.empty()) return;
  history = std::make_shared<rules::RowHistory>(shape[0]);
}

void Slot::set_anchor(double lambda, Array reference, std::optional<Array> importance) {
  const auto check = [&](const Array& array, const char* role) {
    if (!same_shape(array, parameter_))
      throw ValueError(role + name_ + " has shape " + shape_text(array) + "; expected " +
                       shape_text(parameter_));
    if (array.device != device())
      throw ValueError(role + name_ + " is on " + name_of(array.device) + "; expected " +
                       name_of(device()));
  };
  check(reference, "the anchor of ");
  if (importance) check(*importance, "the importance of ");
  anchor_ = {lambda, std::move(reference), std::move(importance)};
  find_order();
}

void Slot::release_anchor() {
  anchor_.reset();
  find_order();
}

void Slot::check_follower(const Array& array, const std::string& label) const {
  if (!same_shape(array, parameter_))
    throw ValueError(label + " has shape " + shape_text(array) + "; expected " +
                     shape_text(parameter_));
  if (array.device != device())
    throw ValueError(label + " is on " + name_of(array.device) + "; expected " + name_of(device()));
  check_updatable(array, label);
}

void Slot::set_average(Array average) {
  check_follower(average, average_label_);
  average_ = std::move(average);
  find_order();
}

void Slot::set_copy(Array copy) {
  check_follower(copy, copy_label_);
  copy_ = std::move(copy);
  find_order();
}

void Slot::set_lower_half(Array lower_half) {
  if (parameter_.dtype != DType::bfloat16)
    throw TypeError(name_ + " has dtype " + name_of(parameter_.dtype) +
                    "; only bfloat16 has a lower half");
  if (lower_half.dtype != DType::bits16)
    throw TypeError(lower_half_label_ + " has dtype " + name_of(lower_half.dtype) +
                    "; expected int16 or uint16");
  check_follower(lower_half, lower_half_label_);
  lower_half_ = std::move(lower_half);
  find_order();
}

// What has been planned is to be planned anew.
void Slot::find_order() {
  const auto [arrays, count] = operands(parameter_);
  all_in_c_order_ = std::ranges::all_of(std::span(arrays).first(count),
                                        [](const Array* array) { return array->c_contiguous; });
  work.iteration.operands = 0;
}

Work Slot::catch_up_work(gradients::Rows& rows) const {
  Work catching_up = work_on_rows(parameter_, rows);  // in place of a gradient
  catching_up.only_catches_up = true;
  return catching_up;
}

Work Slot::work_on_rows(const Array& gradient, gradients::Rows& rows, bool is_numbered) const {
  Work on_rows;
  on_rows.compute = work.compute;
  plan_rows(gradient, on_rows, rows, is_numbered && needs_numbers(gradient));
  return on_rows;
}

// Whether it matters which numbers the elements of a part have, and neither the arrays say it nor
// the order in which blocks are walked.
bool Slot::needs_numbers(const Array& gradient) const {
  return rounding(true).is_random() && !has_blocks() && !is_in_c_order(gradient);
}

Work::Rounding Slot::rounding(bool of_parameter) const {
  const bool is_narrow = item_size(parameter_.dtype) == 2 && !lower_half_;
  return {of_parameter && is_narrow, has_narrow_state_};
}

void Slot::check_shape_of_rows(const Array& values) const {
  const auto shape = parameter_.geometry().shape, given = values.geometry().shape;
  if (!std::ranges::equal(shape.subspan(1), given.subspan(1)))
    throw ValueError("the rows for " + name_ + " have values of shape " + shape_text(values) +
                     "; expected the shape of its rows after the first axis, as in " +
                     shape_text(parameter_));
}

// The shape is the parameter's, so address, dtype and strides say which memory it is.
bool Slot::is_known(const Array& gradient) const {
  return gradient.data == known_.data && gradient.dtype == known_.dtype &&
         gradient.c_contiguous == known_.c_contiguous &&
         (gradient.c_contiguous || std::ranges::equal(gradient.geometry().strides, known_.strides));
}

Slot::Operands Slot::operands(const Array& gradient) const {
  Operands operands;
  operands.add(parameter_);
  operands.add(gradient);
  if (!is_rowwise_)
    for (const Array& state : states_) operands.add(state);
  if (anchor_) operands.add(anchor_->reference);
  if (anchor_ && anchor_->importance) operands.add(*anchor_->importance);
  if (average_) operands.add(*average_);
  if (copy_) operands.add(*copy_);
  if (lower_half_) operands.add(*lower_half_);
  return operands;
}

// The i-th of these as the kernels see it.
Operand Slot::operand(std::size_t i, const Array& array) const {
  Operand operand = array.operand();
  if (i < kState || i - kState >= powers_.size()) return operand;
  const std::size_t state = i - kState;
  operand.powers = powers_[state].data;
  if (state_is_signed_[state]) operand.dtype = DType::signed_bits8;
  return operand;
}

// What there is besides the parameter, its gradient and its state, in the order of operands().
void Slot::plan_others(Work& work) const {
  work.rule_operands = kState + (is_rowwise_ ? 0 : static_cast<int>(states_.size()));
  int next = work.rule_operands;
  const auto take = [&next](bool is_there) { return is_there ? next++ : 0; };
  work.anchor = {};
  work.anchor.reference = take(anchor_.has_value());
  work.anchor.importance = take(anchor_ && anchor_->importance);
  if (anchor_) work.anchor.lambda = anchor_->lambda;
  work.operands_read = next;
  work.followers.average = take(average_.has_value());
  work.followers.copy = take(copy_.has_value());
  work.lower_half = take(lower_half_.has_value());
}

void Slot::plan(const Array& gradient, bool is_numbered) {
  const auto [arrays, count] = operands(gradient);
  Iteration& iteration = work.iteration;
  forget_plan(work);
  plan_others(work);
  for (std::size_t i = 0; i < count; ++i) iteration.operand[i] = operand(i, *arrays[i]);

  if (all_in_c_order_ && gradient.c_contiguous)
    return iteration.plan_dense(parameter_.size, static_cast<int>(count));

  std::array<Geometry, kMaxOperands> geometry;
  for (std::size_t i = 0; i < count; ++i) geometry[i] = arrays[i]->geometry();
  const auto order = has_blocks() ? Iteration::Order::c : Iteration::Order::memory;
  plan_iteration(work, parameter_.geometry().shape, geometry, count, order, is_numbered);
}

// What is walked is one row; the others are so many strides away.
void Slot::plan_rows(const Array& values, Work& work, gradients::Rows& rows,
                     bool is_numbered) const {
  const auto [arrays, count] = operands(values);
  Iteration& iteration = work.iteration;
  forget_plan(work);
  work.rows = &rows;
  work.history = history.get();
  work.is_rowwise = is_rowwise_;
  plan_others(work);
  if (is_rowwise_) {
    work.row_state = states_[0].operand();
    work.row_state_stride = states_[0].geometry().strides[0];
  }
  std::array<Geometry, kMaxOperands> geometry;
  for (std::size_t i = 0; i < count; ++i) {
    iteration.operand[i] = operand(i, *arrays[i]);
    const auto [shape, strides] = arrays[i]->geometry();
    rows.stride[i] = strides[0];
    geometry[i] = {shape.subspan(1), strides.subspan(1)};
  }
  if (all_in_c_order_ && values.c_contiguous) {
    std::int64_t elements = 1;
    for (const std::int64_t extent : geometry[kParameter].shape) elements *= extent;
    return iteration.plan_dense(elements, static_cast<int>(count));
  }
  plan_iteration(work, geometry[kParameter].shape, geometry, count, Iteration::Order::memory,
                 is_numbered);
}

}  // namespace fusestep::engine
