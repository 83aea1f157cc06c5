#include "engine/stepper.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <iterator>
#include <limits>
#include <string>

#include "core/errors.h"
#include "engine/gil.h"
#include "engine/samples.h"

namespace fusestep::engine {
namespace {

// A step shorter than this keeps the GIL: giving it away and taking it back costs more.
constexpr std::int64_t kElementsWorthReleasingGil = 1 << 14;

std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// The sums of the tiles of a list, as if one device had walked it, from those of each part of it.
std::vector<double> in_order(WorkList list, std::span<const std::size_t> parts,
                             std::span<const std::vector<double>> sums) {
  std::vector<std::size_t> used(sums.size());
  std::vector<double> result;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::size_t part = parts[i];
    const auto first = sums[part].begin() + static_cast<std::ptrdiff_t>(used[part]);
    const std::int64_t tiles = list[i]->tiles();
    result.insert(result.end(), first, first + tiles);
    used[part] += static_cast<std::size_t>(tiles);
  }
  return result;
}

bool chooses_top(const Update& update) {
  return update.choice && update.choice->kind == selections::Choice::Kind::top;
}

// A bound goes for the gradients of all parameters together.
void check_samples(Updates updates, const StepArguments& arguments) {
  const Update* first = nullptr;
  for (const Update& update : updates) {
    if (!update.samples) continue;
    const gradients::Samples& samples = *update.samples;
    if (samples.has_noise() && arguments.grad_scale == 0)
      throw ValueError("grad_scale is 0, which noise cannot be scaled against");
    if (!samples.max_norm) continue;
    if (!first) first = &update;
    if (samples.max_norm == first->samples->max_norm && samples.count() == first->samples->count())
      continue;
    const auto text = [](const Update& of) {
      return std::to_string(of.samples->count()) + " samples for " + of.slot->name() +
             " with max_norm " + text_of(*of.samples->max_norm);
    };
    throw ValueError(
        "there are " + text(*first) + ", and " + text(update) +
        "; expected as many with the same, since a sample's gradients are bounded together");
  }
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
  is_on_gpus_ = false;
  find_room_for_sums(updates);
  for (const Update& update : updates) {
    Slot& slot = *update.slot;
    if (update.samples || update.moves_parts() || slot.is_walked_in_c_order(update.gradient))
      slot.prepare_part(update, memory, arguments.zero_grad);
    else if (update.row_numbers)
      slot.prepare_rows(update.gradient, *update.row_numbers, memory, arguments.zero_grad);
    else if (slot.is_rowwise())
      slot.prepare_all_rows(update.gradient, memory, arguments.zero_grad);
    else
      slot.prepare(update.gradient, memory, arguments.zero_grad);
    slot.work.gradient_factor = update.group->maximize ? -1 : 1;
    if (!slot.gradient_is_known()) disjoint_gradients_.clear();
    if (slot.device().kind == Device::cuda) is_on_gpus_ = true;
    if (update.is_nothing()) continue;
    next_.push_back(update.group->rule->advance(slot.progress));
    work_.push_back(&slot.work);
    if (slot.device().kind == Device::cpu) elements_ += slot.work.elements();
  }
  check_samples(updates, arguments);
  if (arguments.zero_grad) check_gradients_are_disjoint(updates);
  std::ranges::stable_partition(updates, std::not_fn(&Update::is_nothing));
}

// A gradient cleared for one parameter must not still be wanted by another.
void Stepper::check_gradients_are_disjoint(Updates updates) {
  std::vector<const Slot*> moved;
  bool known = true;
  for (const Update& update : updates) {
    moved.push_back(update.slot);
    known = known && update.slot->gradient_is_known();
  }
  if (known && moved == disjoint_gradients_) return;
  OccupiedMemory memory;
  static const std::string kGradient = "a gradient";
  for (const Update& update : updates)
    if (!update.is_outer) memory.add(update.gradient, kGradient);
  const auto fail = [] {
    throw ValueError("two gradients share memory, so zero_grad=True would clear one unused");
  };
  try {
    memory.seal();
  } catch (const ValueError&) {
    fail();
  }
  OccupiedMemory::Gap gap;
  for (const Update& update : updates) {
    if (!update.is_outer) continue;
    if (memory.overlapping(update.gradient, gap) ||
        (update.x && memory.overlapping(*update.x, gap)))
      fail();
  }
  disjoint_gradients_ = std::move(moved);
}

// Parameters of a group that have had the same number of updates share their coefficients.
void Stepper::add_coefficients(Updates updates, double ema_decay) {
  coefficients_.clear();
  coefficients_.reserve(updates.size());  // the work points into it
  for (std::size_t i = 0; i < updates.size(); ++i) {
    Slot* const slot = updates[i].slot;
    const Group* const group = updates[i].group;
    const bool shared = i > 0 && group == updates[i - 1].group && next_[i] == next_[i - 1] &&
                        work_[i]->compute == work_[i - 1]->compute;
    if (!shared)
      coefficients_.push_back(
          group->rule->coefficients(next_[i], work_[i]->compute, group->lr, slot->states()));
    slot->work.rule = &coefficients_.back();
    slot->work.anchor.lr = group->lr;
    slot->work.followers.decay = ema_decay;
    slot->work.rounding = slot->rounding(settings.stochastic_rounding);
    if (slot->work.rounding.is_random())
      slot->work.rounding.stream = updates[i].draw.rounding(next_[i].step);
  }
}

bool Stepper::will_release_gil() const { return elements_ >= kElementsWorthReleasingGil; }

bool Stepper::take(Updates updates, const StepArguments& arguments, const cpu::Errand& errand) {
  const Updates moving = updates.first(work_.size()), unmoved = updates.subspan(work_.size());
  const bool is_taken = moving.empty() || move(moving, arguments, errand);
  if (arguments.zero_grad && !unmoved.empty()) clear_unmoved(unmoved);
  return is_taken;
}

bool Stepper::move(Updates updates, const StepArguments& arguments, const cpu::Errand& errand) {
  catch_up_whole_tables(updates);
  add_coefficients(updates, arguments.ema_decay.value_or(settings.ema_decay));
  // A copy of the settings: another thread may assign to an attribute while the GIL is released.
  if (!run(updates, arguments, Settings(settings), errand)) {
    ++skipped_steps;
    return false;
  }
  bool counts = false;
  for (std::size_t i = 0; i < updates.size(); ++i) {
    Slot& slot = *updates[i].slot;
    if (is_on_gpus_ && is_counted_elsewhere(slot)) continue;
    slot.progress = next_[i];
    if (slot.history) record(updates[i], next_[i]);
    counts = true;
  }
  if (counts) ++steps;
  return true;
}

bool Stepper::run(Updates updates, const StepArguments& arguments, const Settings& settings,
                  const cpu::Errand& errand) {
  if (is_on_gpus_) start(updates);
  plan_samples(updates, arguments);
  const double bound = settings.clip_value.value_or(std::numeric_limits<double>::infinity());
  Gpu::Request request{.options = {arguments.grad_scale, arguments.zero_grad, bound},
                       .scaling = arguments.scaling,
                       .counts = std::ranges::all_of(updates, [&](const Update& update) {
                         return is_counted_elsewhere(*update.slot);
                       })};
  if (settings.need_norm() && !is_decided_here(updates, arguments, settings)) {
    request.max_norm = settings.max_norm;
    request.skip_nonfinite = settings.skip_nonfinite;
  } else if (settings.need_norm()) {
    const GilRelease release(will_release_gil() || is_on_gpus_);
    const GradientNorm norm = arguments.norm ? *arguments.norm : gradient_norm();
    if (settings.skip_nonfinite && !norm.finite) {
      if (arguments.zero_grad) clear_gradients(cpu_work());
      return false;
    }
    if (settings.max_norm)
      request.options.gradient_factor *=
          clip_factor(*settings.max_norm, norm.value * std::abs(arguments.grad_scale));
  }
  for (const Update& update : updates)
    update.slot->begin_part(*update.group->rule, update.group->lr);
  find_tops(updates, request.options);
  if (is_on_gpus_) {  // first: a launch may fail, the CPU does not
    catch_up_on_gpus(updates);
    for (Gpu& gpu : gpus_) {
      if (gpu.is_idle()) continue;
      gpu.take(request);
      gpu.finish();
      request.counts = false;
    }
  }
  std::optional<GilRelease> release;
  cpu::update(cpu_work(), request.options, [&] {
    if (errand) errand();
    release.emplace(will_release_gil());
  });
  finish_parts(arguments.zero_grad);
  return true;
}

// ---- samples ----

// On a GPU samples are added up before the step, in memory that is the optimizer's.
void Stepper::find_room_for_sums(std::vector<Update>& updates) {
  for (const Update& update : updates)
    if (update.samples && update.slot->device().kind == Device::cuda)
      place_of(update.slot->device().index);
  for (Gpu& gpu : gpus_) gpu.find_room_for_sums(updates);
}

// Over all parameters whose samples are bounded; of samples that are not there, what it may be.
// Waits for GPUs.
std::vector<double> Stepper::norms_of_samples(Updates updates) {
  std::vector<double> norms = norms_of_arrays(updates);
  for (const Update& update : updates) {
    if (!update.is_outer || !update.samples->max_norm) continue;
    const std::vector<double> others =
        update.slot->norms_of_outer(update, fetch_from(*update.slot));
    if (norms.empty()) norms.resize(others.size());
    for (std::size_t i = 0; i < norms.size(); ++i) norms[i] = hypotenuse(norms[i], others[i]);
  }
  return norms;
}

Slot::Fetch Stepper::fetch_from(const Slot& slot) {
  return [this, index = slot.device().index](void* to, const void* from, std::size_t bytes) {
    gpu(index).fetch(to, from, bytes);
  };
}

// Over those that lie in arrays.
std::vector<double> Stepper::norms_of_arrays(Updates updates) {
  constexpr std::int64_t kAtOnce = 64;
  std::vector<Work> ones;
  std::vector<std::int64_t> strides;
  std::vector<std::size_t> parts;
  std::vector<const gradients::Samples*> samples;
  std::int64_t count = 0;
  for (std::size_t i = 0; i < updates.size(); ++i) {
    const Update& update = updates[i];
    if (!update.samples || !update.samples->max_norm || update.samples->present.empty()) continue;
    if (update.is_outer) continue;
    samples.push_back(update.samples.get());
    count = update.samples->count();
    ones.push_back(one_sample(update));
    strides.push_back(stride_of_samples(update));
    parts.push_back(is_on_gpus_ ? part_[i] : 0);
  }
  std::vector<double> norms;
  for (std::int64_t begin = 0; begin < count; begin += kAtOnce) {
    const std::int64_t end = std::min(count, begin + kAtOnce);
    std::deque<Work> work;
    std::vector<const Work*> list;
    std::vector<std::size_t> parts_of_list;
    std::vector<bool> is_there;  // for each tile: of a sample that is
    std::int64_t tiles = 0;
    for (std::int64_t sample = begin; sample < end; ++sample)
      for (std::size_t i = 0; i < ones.size(); ++i) {
        Work& one = work.emplace_back(ones[i]);
        one.iteration.operand[kGradient].data += sample * strides[i];
        list.push_back(&one);
        parts_of_list.push_back(parts[i]);
        is_there.resize(is_there.size() + static_cast<std::size_t>(one.tiles()),
                        samples[i]->weight[static_cast<std::size_t>(sample)] != 0);
        if (sample == begin) tiles += one.tiles();
      }
    const auto sums = [&](double prescale) {
      std::vector<double> of_tiles = tile_sums(list, parts_of_list, prescale), result;
      for (std::size_t i = 0; i < of_tiles.size(); ++i)
        if (!is_there[i]) of_tiles[i] = 0;
      for (std::int64_t i = 0; i < end - begin; ++i)
        result.push_back(sum_in_groups(of_tiles.data() + i * tiles, tiles));
      return result;
    };
    std::vector<double> prescaled;
    const std::vector<double> of_samples = sums(1);
    for (std::size_t i = 0; i < of_samples.size(); ++i) {
      GradientNorm norm = norm_of(of_samples[i]);
      if (!norm.finite) {
        if (prescaled.empty()) prescaled = sums(kPrescale);
        norm = norm_of_prescaled(prescaled[i]);
      }
      norms.push_back(norm.value);
    }
  }
  return norms;
}

void Stepper::plan_samples(Updates updates, const StepArguments& arguments) {
  const auto has_samples = [](const Update& update) { return update.samples != nullptr; };
  if (std::ranges::none_of(updates, has_samples)) return;
  const GilRelease release(will_release_gil() || is_on_gpus_);
  const std::vector<double> norms = norms_of_samples(updates);
  for (const Update& update : updates) {
    if (!update.samples) continue;
    update.samples->plan(norms, arguments.grad_scale, update.draw.noise());
    update.slot->add_up_samples();
  }
  for (Gpu& gpu : gpus_)
    if (is_on_gpus_ && !gpu.is_idle()) gpu.add_up_samples();
}

// ---- parts of parameters ----

void Stepper::find_tops(Updates updates, const StepOptions& options) {
  if (std::ranges::none_of(updates, chooses_top)) return;
  const GilRelease release(will_release_gil() || is_on_gpus_);
  for (const Update& update : updates) {
    Slot& slot = *update.slot;
    slot.find_top(slot.moved_by(update), options, fetch_from(slot));
  }
}

void Stepper::finish_parts(bool clears_gradients) {
  std::vector<const Work*> counted;
  for (std::size_t i = 0; i < work_.size(); ++i) {
    const selections::Part* const part = work_[i]->part;
    const bool is_on_cpu = !is_on_gpus_ || part_[i] == 0;
    if (part && part->progress && !(is_on_cpu && part->counts_by_tile()))
      counted.push_back(work_[i]);
  }
  if (!counted.empty()) cpu::count_updates(counted);
  if (clears_gradients) cpu::clear_whole_gradients(cpu_work());
}

// ---- rows that have missed steps ----

// Before a dense gradient moves all rows.
void Stepper::catch_up_whole_tables(Updates updates) {
  for (const Update& update : updates)
    if (update.slot->history && update.slot->history->has_missed_steps() && !update.row_numbers)
      catch_up(*update.slot, *update.group->rule, update.stream);
}

// Before rows are moved there. On the CPU they are brought up to date in the same pass.
void Stepper::catch_up_on_gpus(Updates updates) {
  for (Gpu& gpu : gpus_) {
    if (gpu.is_idle()) continue;
    MissedRows rows;
    for (const Update& update : updates) {
      const Slot& slot = *update.slot;
      if (slot.device() == Device{Device::cuda, gpu.index()} && slot.history && update.row_numbers)
        rows.add(slot, *update.group->rule, *slot.work.rows);
    }
    gpu.catch_up(rows, gpu.stream());
  }
}

void Stepper::record(const Update& update, const rules::Progress& progress) {
  Slot& slot = *update.slot;
  if (!update.row_numbers) return slot.history->mark_all();
  const auto mark_moved = [&] {
    for (std::int64_t i = 0; i < slot.work.rows->count(); ++i)
      slot.history->mark(slot.work.rows->row(i));
  };
  mark_moved();  // they have been brought up to date
  slot.history->record(*update.group->rule, {update.group->lr, progress}, *slot.work.rule);
  mark_moved();  // and have had this step
  if (slot.history->is_full()) catch_up(slot, *update.group->rule, update.stream);
}

void Stepper::catch_up(Slot& slot, const rules::AnyRule& rule, cuda::Stream stream) {
  catch_up(slot, rule, slot.history->rows_behind(), stream);
  slot.history->mark_all();
}

void Stepper::catch_up(Slot& slot, const rules::AnyRule& rule,
                       std::span<const std::int64_t> numbers, cuda::Stream stream) {
  gradients::Rows rows;
  rows.plan(numbers, slot.history->rows());
  if (slot.device().kind == Device::cuda) {
    MissedRows missed;
    missed.add(slot, rule, rows);
    gpu(slot.device().index).catch_up(missed, stream);
  } else {
    Work work = slot.catch_up_work(rows);
    const rules::Coefficients loop{rule.loop(slot.states()), {}};
    work.rule = &loop;
    const Work* const list[] = {&work};
    const GilRelease release(work.elements() >= kElementsWorthReleasingGil);
    cpu::update(list, {});
  }
  for (std::int64_t i = 0; i < rows.count(); ++i) slot.history->mark(rows.row(i));
}

// ---- several devices ----

// The norm of gradients on one GPU is found out and acted upon there. Where several devices take
// part, or processes, the host must wait for them; and where it counts the steps that are taken.
// Of the largest updates the host has to know how large they are, after clipping.
bool Stepper::is_decided_here(Updates updates, const StepArguments& arguments,
                              const Settings& settings) const {
  if (!is_on_gpus_ || std::ranges::any_of(updates, chooses_top)) return true;
  if (arguments.norm || !cpu_work_.empty()) return true;
  const auto busy = std::ranges::count_if(gpus_, [](const Gpu& gpu) { return !gpu.is_idle(); });
  const bool must_know = settings.skip_nonfinite && std::ranges::any_of(gpus_, [](const Gpu& gpu) {
                           return !gpu.is_idle() && !gpu.keeps_progress();
                         });
  return busy > 1 || must_know;
}

void Stepper::distribute(Updates updates) {
  cpu_work_.clear();
  part_.clear();
  for (Gpu& gpu : gpus_) gpu.begin();
  for (const Update& update : updates) {
    const Device& device = update.slot->device();
    if (device.kind == Device::cpu) {
      cpu_work_.push_back(&update.slot->work);
      part_.push_back(0);
    } else {
      gpu(device.index).add(update);
      part_.push_back(1 + place_of(device.index));
    }
  }
}

void Stepper::start(Updates updates) {
  distribute(updates);
  for (Gpu& gpu : gpus_)
    if (!gpu.is_idle()) gpu.start(updates);
}

std::vector<double> Stepper::tile_sums(double prescale) {
  if (!is_on_gpus_) return cpu::tile_sums(work_, prescale);
  std::vector<std::vector<double>> sums{cpu::tile_sums(cpu_work_, prescale)};
  for (Gpu& gpu : gpus_)
    sums.push_back(gpu.is_idle() ? std::vector<double>{} : gpu.tile_sums(prescale));
  return in_order(work_, part_, sums);
}

// Of other work, in parts of the same kind.
std::vector<double> Stepper::tile_sums(WorkList list, Parts parts, double prescale) {
  std::vector<std::vector<const Work*>> lists(1 + gpus_.size());
  for (std::size_t i = 0; i < list.size(); ++i) lists[parts[i]].push_back(list[i]);
  std::vector<std::vector<double>> sums{cpu::tile_sums(lists[0], prescale)};
  for (std::size_t i = 0; i < gpus_.size(); ++i) {
    const auto& of_gpu = lists[i + 1];
    sums.push_back(of_gpu.empty() ? std::vector<double>{} : gpus_[i].tile_sums(of_gpu, prescale));
  }
  return in_order(list, parts, sums);
}

GradientNorm Stepper::gradient_norm() {
  if (!is_on_gpus_) return cpu::gradient_norm(work_);
  const auto sum = [this](double prescale) {
    std::vector<double> sums = tile_sums(prescale);
    return sum_in_groups(sums.data(), std::ssize(sums));
  };
  const GradientNorm norm = norm_of(sum(1));
  return norm.finite ? norm : norm_of_prescaled(sum(kPrescale));
}

std::vector<GradientNorm> Stepper::gradient_norms(Updates updates) {
  if (is_on_gpus_) start(updates.first(work_.size()));
  std::vector<double> sums = tile_sums(1), prescaled;
  std::vector<GradientNorm> norms;
  std::size_t first = 0;
  for (const Work* work : work_) {
    const std::int64_t tiles = work->tiles();
    GradientNorm norm = norm_of(sum_in_groups(sums.data() + first, tiles));
    if (!norm.finite) {
      if (prescaled.empty()) prescaled = tile_sums(kPrescale);
      norm = norm_of_prescaled(sum_in_groups(prescaled.data() + first, tiles));
    }
    norms.push_back(norm);
    first += static_cast<std::size_t>(tiles);
  }
  return norms;
}

void Stepper::clear_gradients(WorkList on_cpu) {
  cpu::clear_gradients(on_cpu);
  if (!is_on_gpus_) return;
  for (Gpu& gpu : gpus_) {
    if (gpu.is_idle()) continue;
    gpu.clear_gradients();
    gpu.finish();
  }
}

// In a step that was not theirs: no sample is there.
void Stepper::clear_unmoved(Updates updates) {
  distribute(updates);
  for (Gpu& gpu : gpus_) gpu.wait_for_others();
  clear_gradients(cpu_work_);
}

// ---- progress on GPUs ----

std::size_t Stepper::place_of(int gpu) {
  std::size_t place = 0;
  while (place < gpus_.size() && gpus_[place].index() != gpu) ++place;
  if (place == gpus_.size()) gpus_.emplace_back(gpu);
  return place;
}

Gpu& Stepper::gpu(int index) { return gpus_[place_of(index)]; }

// On the GPU; or nowhere, where a graph is captured that repeats itself.
bool Stepper::is_counted_elsewhere(const Slot& slot) const {
  if (slot.device().kind == Device::cpu) return false;
  return std::ranges::any_of(gpus_, [&](const Gpu& gpu) {
    return gpu.index() == slot.device().index && (gpu.keeps_progress() || gpu.is_captured());
  });
}

void Stepper::keep_progress_on_gpus(const std::vector<Slot*>& slots) {
  for (Slot* slot : slots) gpu(slot->device().index);
  for (Gpu& gpu : gpus_) {
    std::vector<Slot*> here;
    std::ranges::copy_if(slots, std::back_inserter(here),
                         [&](const Slot* slot) { return slot->device().index == gpu.index(); });
    gpu.keep_progress_of(std::move(here));
  }
}

void Stepper::pull(const CurrentStream& current_stream) {
  for (Gpu& gpu : gpus_) {
    if (!gpu.knows_more()) continue;
    const cuda::Counters counted = gpu.pull(current_stream({Device::cuda, gpu.index()}));
    steps += counted.steps;
    skipped_steps += counted.skipped_steps;
  }
}

void Stepper::push() {
  for (Gpu& gpu : gpus_) gpu.push();
}

}  // namespace fusestep::engine
