#include "engine/optimizer.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "arrays/cuda_driver.h"
#include "core/errors.h"
#include "cpu/fp_environment.h"
#include "engine/gil.h"

namespace fusestep::engine {
namespace {

const std::string kWeightDecay = "weight_decay";

arrays::Array pinned(arrays::Array array) {
  array.pin();
  return array;
}

arrays::Array pinned(PyObject* object, const arrays::Label& label) {
  return pinned(arrays::from_object(object, label));
}

// A learning rate that is given with a step holds for that step alone.
class RateForThisStep {
 public:
  RateForThisStep(Group& group, std::optional<Group>& without_decay, std::optional<double> lr)
      : group_(group), without_decay_(without_decay), before_(group.rate) {
    if (!lr) return;
    group.lr = *lr;
    group.rate.reset();
    share();
  }
  ~RateForThisStep() {
    group_.rate = before_;
    share();
  }
  RateForThisStep(const RateForThisStep&) = delete;
  RateForThisStep& operator=(const RateForThisStep&) = delete;

 private:
  void share() {
    if (!without_decay_) return;
    without_decay_->lr = group_.lr;
    without_decay_->rate = group_.rate;
  }

  Group& group_;
  std::optional<Group>& without_decay_;
  std::optional<RateOnDevice> before_;
};

// On a GPU, where the parameter's library works.
cuda::Stream stream_of(const Slot& slot) {
  return slot.device().kind == Device::cuda ? slot.parameter().current_stream() : 0;
}

}  // namespace

void Optimizer::add(std::string name, PyObject* parameter, const std::vector<PyObject*>& states) {
  const std::vector<std::string_view> state_names = group.rule->state_names();
  if (states.size() != state_names.size())
    throw ValueError(name + " came with " + std::to_string(states.size()) +
                     " state arrays; expected " + std::to_string(state_names.size()));
  bind(slots_.emplace_back(std::move(name), *group.rule), parameter, states);
}

void Optimizer::bind(Slot& slot, PyObject* parameter, const std::vector<PyObject*>& states) {
  std::vector<arrays::Array> state_arrays, powers;
  for (std::size_t i = 0; i < states.size(); ++i) {
    const arrays::Label label{"", slot.state_label(i)};
    if (PyTuple_Check(states[i]) && PyTuple_GET_SIZE(states[i]) == 2) {  // in 8 bits
      state_arrays.push_back(
          pinned(arrays::bits_from_object(PyTuple_GET_ITEM(states[i], 0), label)));
      powers.push_back(pinned(arrays::bits_from_object(PyTuple_GET_ITEM(states[i], 1), label)));
    } else {
      state_arrays.push_back(pinned(states[i], label));
    }
  }
  slot.bind(pinned(parameter, {"", slot.name()}), std::move(state_arrays), std::move(powers));
  memory_.reset();
}

void Optimizer::move(std::size_t i, PyObject* parameter, const std::vector<PyObject*>& states) {
  Slot& slot = slots_.at(i);
  bind(slot, parameter, states);
  if (slot.history) slot.history->resize(slot.parameter().geometry().shape[0]);
  if (slot.has_split_progress()) slot.block_progress->resize(slot.parameter().size);
}

OccupiedMemory& Optimizer::occupied_memory() {
  if (!memory_) {
    memory_.emplace();
    for (const Slot& slot : slots_) slot.occupy(*memory_);
    memory_->seal();
  }
  return *memory_;
}

void Optimizer::step(PyObject* const* gradients, std::size_t count, std::optional<double> lr,
                     const StepArguments& arguments, const Choices& choices) {
  const Turnstile::Turn turn(turnstile);
  if (is_swapped)
    throw std::runtime_error(
        "the averages are in the parameters' place: step after `with opt.swap_averages()`");
  const cpu::IeeeEnvironment ieee;  // coefficients depend on the rounding mode, too
  if (lr) check_rate(*lr);
  const RateForThisStep rate(group, without_decay_, lr);
  const ClearAtExit release_references{updates_};
  count_blocks_here(choices);
  collect(gradients, count, choices);
  stepper.prepare(updates_, occupied_memory(), arguments);
  stepper.take(updates_, arguments);
  wait_for_borrowed_gradients();
}

// An exporter that is not told otherwise takes its memory back when the step lets go of it, while
// the GPU may not even have begun.
void Optimizer::wait_for_borrowed_gradients() const {
  for (const Update& update : updates_) {
    const bool lends_x = update.x && update.x->is_lent_for_the_call();
    if (!update.gradient.is_lent_for_the_call() && !lends_x) continue;
    const GilRelease release(true);
    arrays::cuda_driver().synchronize(update.slot->device().index);
    return;
  }
}

void Optimizer::collect(PyObject* const* gradients, std::size_t count, const Choices& choices) {
  if (count != slots_.size())
    throw ValueError("got " + std::to_string(count) + " gradients for " +
                     std::to_string(slots_.size()) + " parameters; give None for a parameter " +
                     "that should not move");
  bool foreign = false;
  for (std::size_t i = 0; i < count; ++i) {
    if (gradients[i] == Py_None) continue;
    Slot& slot = slots_[i];
    slot.check_is_current();
    if (arrays::is_rows(gradients[i]))
      updates_.emplace_back(&slot, &group_of(i),
                            arrays::from_rows(gradients[i], slot.parameter(), slot.name()));
    else if (arrays::is_samples(gradients[i]))
      updates_.emplace_back(&slot, &group_of(i),
                            arrays::from_samples(gradients[i], slot.parameter(), slot.name()));
    else
      updates_.emplace_back(&slot, &group_of(i),
                            arrays::from_object(gradients[i], {"the gradient of ", slot.name()}));
    Update& update = updates_.back();
    if (!choices.empty()) update.choice = choices.at(i);
    update.draw = {seed, stepper.steps, i};
    foreign = foreign || update.gradient.is_foreign() || update.row_numbers || update.samples;
    if (slot.device().kind == Device::cuda)
      update.stream = slot.parameter().is_of_library_of(update.gradient)
                          ? update.gradient.stream
                          : slot.parameter().current_stream();
  }
  if (std::ranges::any_of(updates_, &Update::has_noise)) {
    pull();  // it depends on how many steps have been taken
    for (Update& update : updates_) update.draw.step = stepper.steps;
  }
  // Exporting an array of another library runs its code, which may have done anything.
  if (foreign)
    for (const Update& update : updates_) update.slot->check_is_current();
}

// ---- rows that have missed steps ----

void Optimizer::keep_history() {
  for (Slot& slot : slots_) slot.keep_history();
}

// `numbers` are one for each parameter.
void Optimizer::catch_up(const RowNumbers& numbers) {
  const Turnstile::Turn turn(turnstile);
  const cpu::IeeeEnvironment ieee;
  if (numbers.size() != slots_.size())
    throw ValueError("got " + std::to_string(numbers.size()) + " arrays of indices for " +
                     std::to_string(slots_.size()) + " parameters");
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (!numbers.at(i)) continue;
    slots_[i].check_is_current();
    if (slots_[i].history)
      gradients::Rows().plan(*numbers[i], slots_[i].history->rows());  // throws IndexError
  }
  for (std::size_t i = 0; i < slots_.size(); ++i)
    if (numbers.at(i) && slots_[i].history)
      stepper.catch_up(slots_[i], *group_of(i).rule, *numbers[i], stream_of(slots_[i]));
}

void Optimizer::flush() {
  const Turnstile::Turn turn = turnstile.turn_or_own();
  const cpu::IeeeEnvironment ieee;
  for (const Slot& slot : slots_) slot.check_is_current();
  for (std::size_t i = 0; i < slots_.size(); ++i) catch_up(i);
}

void Optimizer::catch_up(std::size_t i) {
  Slot& slot = slots_.at(i);
  if (slot.history) stepper.catch_up(slot, *group_of(i).rule, stream_of(slot));
}

// ---- anchors ----

void Optimizer::set_anchor(std::size_t i, double lambda, PyObject* reference,
                           PyObject* importance) {
  catch_up(i);
  Slot& slot = slots_.at(i);
  const auto view = [&](PyObject* object, const char* role) {
    return pinned(object, {role, slot.name()});
  };
  std::optional<arrays::Array> weights;
  if (importance != Py_None) weights = view(importance, "the importance of ");
  slot.set_anchor(lambda, view(reference, "the anchor of "), std::move(weights));
}

void Optimizer::release_anchor(std::size_t i) {
  catch_up(i);
  slots_.at(i).release_anchor();
}

// ---- progress on a GPU ----

bool Optimizer::is_on_one_gpu() const {
  const Device& device = slots_.front().device();
  return device.kind == Device::cuda &&
         std::ranges::all_of(slots_, [&](const Slot& slot) { return slot.device() == device; });
}

// Where several devices take part, the host waits for them, and knows whether steps are left out;
// where it notes which rows have missed a step, it has to.
void Optimizer::place_progress() {
  pull();
  std::vector<Slot*> slots;
  const auto keeps_history = [](const Slot& slot) { return slot.history != nullptr; };
  if ((is_capturable_ || stepper.settings.skip_nonfinite) && is_on_one_gpu() &&
      std::ranges::none_of(slots_, keeps_history))
    for (Slot& slot : slots_) slots.push_back(&slot);
  stepper.keep_progress_on_gpus(slots);
}

// The host counts the updates of blocks: so it has to know whether steps are taken.
void Optimizer::count_blocks_here(const Choices& choices) {
  const bool chooses = std::ranges::any_of(choices, [](const auto* choice) { return choice; });
  if (!chooses && std::ranges::none_of(slots_, &Slot::has_split_progress)) return;
  if (is_capturable_)
    throw ValueError(
        "where= is given, or was in a step before, but blocks are counted on the host, which a "
        "CUDA graph does not reach: create the optimizer without capturable=True");
  pull();
  stepper.keep_progress_on_gpus({});
}

void Optimizer::make_capturable() {
  if (!is_on_one_gpu())
    throw ValueError(
        "capturable=True is for CUDA graphs, and needs all parameters to be on one GPU");
  is_capturable_ = true;
  place_progress();
}

void Optimizer::set_rate(double lr) {
  group.lr = lr;
  if (without_decay_) without_decay_->lr = lr;
  if (!is_capturable_) return;
  const arrays::Array& parameter = slots_.front().parameter();
  Gpu& gpu = stepper.gpu(parameter.device.index);
  const cuda::Stream stream = parameter.current_stream();
  gpu.write_rate(lr, stream);
  group.rate = RateOnDevice{parameter.device, gpu.rate(stream)};
  if (without_decay_) without_decay_->rate = group.rate;
}

void Optimizer::set_option(const std::string& name, double value) {
  group.rule->set(name, value);
  if (without_decay_ && name != kWeightDecay) without_decay_->rule->set(name, value);
}

void Optimizer::set_maximize(bool value) {
  group.maximize = value;
  if (without_decay_) without_decay_->maximize = value;
}

void Optimizer::exempt_from_decay(std::size_t i) {
  if (!without_decay_) {
    without_decay_ = Group{group.rule->clone(), group.lr, group.maximize, group.rate};
    without_decay_->rule->set(kWeightDecay, 0);
    is_exempt_.resize(slots_.size());
  }
  is_exempt_.at(i) = true;
}

// ---- what follows a parameter ----

void Optimizer::set_average(std::size_t i, PyObject* average) {
  slots_.at(i).set_average(pinned(average, {"the average of ", slots_.at(i).name()}));
  memory_.reset();
}

void Optimizer::set_copy(std::size_t i, PyObject* copy) {
  slots_.at(i).set_copy(pinned(copy, {"the copy of ", slots_.at(i).name()}));
  memory_.reset();
}

void Optimizer::set_lower_half(std::size_t i, PyObject* lower_half) {
  slots_.at(i).set_lower_half(
      pinned(arrays::bits_from_object(lower_half, {"the lower half of ", slots_.at(i).name()})));
  memory_.reset();
}

void Optimizer::set_skip_nonfinite(bool value) {
  if (stepper.settings.skip_nonfinite == value) return;
  stepper.settings.skip_nonfinite = value;
  place_progress();
}

void Optimizer::pull() {
  const Turnstile::Turn turn = turnstile.turn_or_own();
  stepper.pull([&](const Device&) { return slots_.front().parameter().current_stream(); });
}

rules::Progress Optimizer::progress(std::size_t i) {
  pull();
  return slots_.at(i).progress;
}

void Optimizer::set_progress(std::size_t i, const rules::Progress& progress) {
  pull();
  slots_.at(i).progress = progress;
  stepper.push();
}

std::int64_t Optimizer::steps() {
  pull();
  return stepper.steps;
}

std::int64_t Optimizer::skipped_steps() {
  pull();
  return stepper.skipped_steps;
}

void Optimizer::set_counts(std::int64_t steps, std::int64_t skipped_steps) {
  pull();
  stepper.steps = steps;
  stepper.skipped_steps = skipped_steps;
}

}  // namespace fusestep::engine
