#include "engine/optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "core/errors.h"
#include "cpu/fp_environment.h"
#include "engine/gil.h"

namespace fusestep::engine {
namespace {

// A step shorter than this keeps the GIL: giving it away and taking it back costs more.
constexpr std::int64_t kElementsWorthReleasingGil = 1 << 14;

struct ClearAtExit {
  std::vector<arrays::Array>& arrays;
  ~ClearAtExit() { arrays.clear(); }
};

std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

void check_scalars(const StepArguments& arguments) {
  if (!(arguments.lr >= 0) || !std::isfinite(arguments.lr))
    throw ValueError("lr is " + text_of(arguments.lr) +
                     "; expected a finite number that is not negative");
  if (!std::isfinite(arguments.grad_scale))
    throw ValueError("grad_scale is " + text_of(arguments.grad_scale) +
                     "; expected a finite number");
}

}  // namespace

void Optimizer::add(std::string name, PyObject* parameter, const std::vector<PyObject*>& states) {
  std::vector<std::string> state_names;
  for (const std::string_view state : rule_->state_names()) state_names.emplace_back(state);
  if (states.size() != state_names.size())
    throw ValueError(name + " came with " + std::to_string(states.size()) +
                     " state arrays; expected " + std::to_string(state_names.size()));
  slots_.emplace_back(std::move(name), parameter, state_names, states);
  memory_.reset();  // it points into slots_, which may have moved
}

OccupiedMemory& Optimizer::occupied_memory() {
  if (!memory_) {
    memory_.emplace();
    for (const Slot& slot : slots_) slot.occupy(*memory_);
    memory_->seal();
  }
  return *memory_;
}

void Optimizer::step(PyObject* const* gradients, std::size_t count,
                     const StepArguments& arguments) {
  const Turnstile::Turn turn(turnstile);
  const cpu::IeeeEnvironment ieee;  // coefficients depend on the rounding mode, too
  check_scalars(arguments);
  const ClearAtExit release_references{gradients_};
  prepare(gradients, count, arguments.zero_grad);
  if (!moves_.empty()) {
    add_coefficients(arguments.lr);
    if (run(arguments, settings)) {
      for (const Move& move : moves_) move.slot->progress = move.next;
      ++steps;
    } else {
      ++skipped_steps;
    }
  }
}

void Optimizer::prepare(PyObject* const* gradients, std::size_t count, bool zero_grad) {
  if (count != slots_.size())
    throw ValueError("got " + std::to_string(count) + " gradients for " +
                     std::to_string(slots_.size()) + " parameters; give None for a parameter " +
                     "that should not move");
  const OccupiedMemory& memory = occupied_memory();
  moves_.clear();
  work_.clear();
  gradients_.clear();
  bool foreign = false;
  for (std::size_t i = 0; i < count; ++i) {
    if (gradients[i] == Py_None) continue;
    Slot& slot = slots_[i];
    gradients_.push_back(slot.prepare(gradients[i], memory, zero_grad));
    foreign = foreign || gradients_.back().is_foreign();
    if (!slot.gradient_is_known()) disjoint_gradients_.clear();
    moves_.push_back({&slot, rule_->advance(slot.progress)});
    work_.push_back(&slot.work);
  }
  if (zero_grad) check_gradients_are_disjoint();
  // Exporting an array of another library runs its code, which may have done anything.
  if (foreign)
    for (const Move& move : moves_) move.slot->check_is_current();
}

// A gradient cleared for one parameter must not still be wanted by another.
void Optimizer::check_gradients_are_disjoint() {
  std::vector<const Slot*> moved;
  bool known = true;
  for (const Move& move : moves_) {
    moved.push_back(move.slot);
    known = known && move.slot->gradient_is_known();
  }
  if (known && moved == disjoint_gradients_) return;
  OccupiedMemory memory;
  static const std::string kGradient = "a gradient";
  for (const arrays::Array& gradient : gradients_) memory.add(gradient, kGradient);
  try {
    memory.seal();
  } catch (const ValueError&) {
    throw ValueError("two gradients share memory, so zero_grad=True would clear one unused");
  }
  disjoint_gradients_ = std::move(moved);
}

// Parameters that have had the same number of updates share their coefficients.
void Optimizer::add_coefficients(double lr) {
  coefficients_.clear();
  coefficients_.reserve(moves_.size());  // the work points into it
  for (std::size_t i = 0; i < moves_.size(); ++i) {
    const bool shared =
        i > 0 && moves_[i].next == moves_[i - 1].next && work_[i]->compute == work_[i - 1]->compute;
    if (!shared)
      coefficients_.push_back(
          rule_->coefficients(moves_[i].next, work_[i]->compute, lr, moves_[i].slot->states()));
    moves_[i].slot->work.rule = &coefficients_.back();
  }
}

// The arithmetic. False where a gradient was not finite and the step was therefore left out. The
// settings are a copy: another thread may assign to an attribute while the GIL is released.
bool Optimizer::run(const StepArguments& arguments, Settings settings) {
  std::int64_t elements = 0;
  for (const cpu::Work* work : work_) elements += work->iteration.size;
  const GilRelease release(elements >= kElementsWorthReleasingGil);

  cpu::StepOptions options;
  options.clear_gradients = arguments.zero_grad;
  options.gradient_factor = settings.maximize ? -arguments.grad_scale : arguments.grad_scale;
  if (settings.max_norm || settings.skip_nonfinite) {
    const cpu::GradientNorm norm = cpu::gradient_norm(work_);
    if (settings.skip_nonfinite && !norm.finite) {
      if (arguments.zero_grad) cpu::clear_gradients(work_);
      return false;
    }
    if (settings.max_norm) {
      // As torch.nn.utils.clip_grad_norm_, with its 1e-6.
      const double clip = *settings.max_norm / (norm.value * std::abs(arguments.grad_scale) + 1e-6);
      options.gradient_factor *= clip < 1 || std::isnan(clip) ? clip : 1;
    }
  }
  cpu::update(work_, options);
  return true;
}

}  // namespace fusestep::engine
