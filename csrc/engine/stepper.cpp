#include "engine/stepper.h"

#include <cmath>
#include <cstdio>
#include <string>

#include "core/errors.h"
#include "engine/gil.h"

namespace fusestep::engine {
namespace {

// A step shorter than this keeps the GIL: giving it away and taking it back costs more.
constexpr std::int64_t kElementsWorthReleasingGil = 1 << 14;

std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace

void check_rate(double lr) {
  if (!(lr >= 0) || !std::isfinite(lr))
    throw ValueError("lr is " + text_of(lr) + "; expected a finite number that is not negative");
}

void Stepper::prepare(std::vector<Update>& updates, const OccupiedMemory& memory,
                      const StepArguments& arguments) {
  if (!std::isfinite(arguments.grad_scale))
    throw ValueError("grad_scale is " + text_of(arguments.grad_scale) +
                     "; expected a finite number");
  next_.clear();
  work_.clear();
  elements_ = 0;
  for (const Update& update : updates) {
    Slot& slot = *update.slot;
    slot.prepare(update.gradient, memory, arguments.zero_grad);
    slot.work.gradient_factor = update.group->maximize ? -1 : 1;
    if (!slot.gradient_is_known()) disjoint_gradients_.clear();
    next_.push_back(update.group->rule->advance(slot.progress));
    work_.push_back(&slot.work);
    elements_ += slot.work.iteration.size;
  }
  if (arguments.zero_grad) check_gradients_are_disjoint(updates);
}

// A gradient cleared for one parameter must not still be wanted by another.
void Stepper::check_gradients_are_disjoint(const std::vector<Update>& updates) {
  std::vector<const Slot*> moved;
  bool known = true;
  for (const Update& update : updates) {
    moved.push_back(update.slot);
    known = known && update.slot->gradient_is_known();
  }
  if (known && moved == disjoint_gradients_) return;
  OccupiedMemory memory;
  static const std::string kGradient = "a gradient";
  for (const Update& update : updates) memory.add(update.gradient, kGradient);
  try {
    memory.seal();
  } catch (const ValueError&) {
    throw ValueError("two gradients share memory, so zero_grad=True would clear one unused");
  }
  disjoint_gradients_ = std::move(moved);
}

// Parameters of a group that have had the same number of updates share their coefficients.
void Stepper::add_coefficients(const std::vector<Update>& updates) {
  coefficients_.clear();
  coefficients_.reserve(updates.size());  // the work points into it
  for (std::size_t i = 0; i < updates.size(); ++i) {
    const auto& [slot, group, gradient] = updates[i];
    const bool shared = i > 0 && group == updates[i - 1].group && next_[i] == next_[i - 1] &&
                        work_[i]->compute == work_[i - 1]->compute;
    if (!shared)
      coefficients_.push_back(
          group->rule->coefficients(next_[i], work_[i]->compute, group->lr, slot->states()));
    slot->work.rule = &coefficients_.back();
  }
}

bool Stepper::will_release_gil() const { return elements_ >= kElementsWorthReleasingGil; }

std::vector<GradientNorm> Stepper::gradient_norms() const {
  std::vector<GradientNorm> norms;
  for (const Work* work : work_) norms.push_back(cpu::gradient_norm({&work, 1}));
  return norms;
}

bool Stepper::take(const std::vector<Update>& updates, const StepArguments& arguments,
                   const cpu::Errand& errand) {
  if (updates.empty()) return true;
  add_coefficients(updates);
  // A copy of the settings: another thread may assign to an attribute while the GIL is released.
  if (!run(arguments, Settings(settings), errand)) {
    ++skipped_steps;
    return false;
  }
  for (std::size_t i = 0; i < updates.size(); ++i) updates[i].slot->progress = next_[i];
  ++steps;
  return true;
}

bool Stepper::run(const StepArguments& arguments, const Settings& settings,
                  const cpu::Errand& errand) const {
  StepOptions options;
  options.clear_gradients = arguments.zero_grad;
  options.gradient_factor = arguments.grad_scale;
  if (settings.need_norm()) {
    const GilRelease release(will_release_gil());
    const GradientNorm norm = arguments.norm ? *arguments.norm : cpu::gradient_norm(work_);
    if (settings.skip_nonfinite && !norm.finite) {
      if (arguments.zero_grad) cpu::clear_gradients(work_);
      return false;
    }
    if (settings.max_norm)
      options.gradient_factor *=
          clip_factor(*settings.max_norm, norm.value * std::abs(arguments.grad_scale));
  }
  std::optional<GilRelease> release;
  cpu::update(work_, options, [&] {
    if (errand) errand();
    release.emplace(will_release_gil());
  });
  return true;
}

}  // namespace fusestep::engine
