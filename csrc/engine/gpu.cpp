#include "engine/gpu.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <utility>

#include "arrays/cuda_driver.h"
#include "engine/gil.h"
#include "engine/samples.h"
#include "engine/stepper.h"

namespace fusestep::engine {
namespace {

const cuda::Driver& driver() { return arrays::cuda_driver(); }

// True where the next step of a parameter will be the very same as this one, so that a CUDA graph
// may repeat it: SGD, once its momentum is there, where nothing is rounded at random.
bool is_steady(const Update& update) {
  const rules::AnyRule& rule = *update.group->rule;
  const Slot& slot = *update.slot;
  if (!rule.scalar_names().empty() || slot.work.rounding.is_random()) return false;
  const auto coefficients = [&](const rules::Progress& at) {
    return rule.coefficients(at, slot.work.compute, update.group->lr, slot.states());
  };
  const rules::Progress next = rule.advance(slot.progress);
  const auto now = coefficients(next), later = coefficients(rule.advance(next));
  return std::memcmp(now.bytes, later.bytes, sizeof now.bytes) == 0;
}

// Each begins where a load of any size may.
std::size_t room_for_sum(const Update& update) {
  constexpr std::size_t kAlignment = 256;
  return (update.slot->bytes_of_sum() + kAlignment - 1) / kAlignment * kAlignment;
}

void refuse_capture_of_exact_rows() {
  throw std::runtime_error(
      "a CUDA graph is being captured, and what rows have missed (rows=\"exact\") is noted on the "
      "host, which no replay would do: take such steps, and bring rows up to date, outside of "
      "graphs");
}

}  // namespace

cuda::Workspace& Gpu::workspace() {
  if (!workspace_) workspace_ = driver().open(index_);
  return *workspace_;
}

// ---- a step ----

void Gpu::begin() {
  other_streams_.clear();
  updates_.clear();
  has_parts_ = moves_less_ = false;
  work_.clear();
  progress_.clear();
  groups_.clear();
  last_group_ = nullptr;
}

void Gpu::add(const Update& update) {
  Slot& slot = *update.slot;
  if (is_idle()) stream_ = update.stream;
  const cuda::Stream of_x = update.x ? update.x->stream : update.stream;
  for (const cuda::Stream stream : {update.stream, update.gradient.stream, of_x})
    if (stream != stream_ && std::ranges::find(other_streams_, stream) == other_streams_.end())
      other_streams_.push_back(stream);
  updates_.push_back(&update);
  has_parts_ = has_parts_ || slot.work.part || slot.work.selected_rows;
  moves_less_ = moves_less_ || slot.work.whole_gradient.array;
  work_.push_back(&slot.work);
  if (keeps_progress())
    progress_.push_back({slot.resident.index, slot.resident.step, slot.resident.momentum_product,
                         group_of(update), static_cast<std::uint32_t>(update.draw.parameter)});
}

std::uint32_t Gpu::group_of(const Update& update) {
  const Group& group = *update.group;
  if (&group != last_group_) {
    const bool rate_is_here = group.rate && group.rate->device == update.slot->device();
    groups_.push_back({static_cast<std::uint32_t>(group.rule->loop(update.slot->states())),
                       group.rule->options(), group.lr,
                       rate_is_here ? group.rate->number : cuda::Scalar{}});
    last_group_ = &group;
  }
  return static_cast<std::uint32_t>(groups_.size() - 1);
}

void Gpu::start(std::span<const Update> updates) {
  workspace();
  const auto repeats_itself = [&](const Update& update) {
    return update.slot->device() != Device{Device::cuda, index_} || is_steady(update);
  };
  is_captured_ = driver().is_capturing(index_, stream_);
  if (!keeps_progress() && is_captured_ && !std::ranges::all_of(updates, repeats_itself))
    throw std::runtime_error(
        "a CUDA graph is being captured, and every replay would repeat this step with the step "
        "count of now: create the optimizer with capturable=True, or (in torch) give it a learning "
        "rate that is a tensor on the GPU");
  if (is_captured_ && (std::ranges::any_of(updates_, &Update::moves_parts) ||
                       std::ranges::any_of(updates, &Update::choice)))
    throw std::runtime_error(
        "a CUDA graph is being captured, and every replay would move the same part of the "
        "parameters without its being counted: steps with where=, and those after them, are for "
        "outside of graphs");
  const auto keeps_history = [](const Update* update) { return update->slot->history != nullptr; };
  if (is_captured_ && std::ranges::any_of(updates_, keeps_history)) refuse_capture_of_exact_rows();
  const auto is_bounded = [](const Update& update) {
    return update.samples && update.samples->max_norm;
  };
  if (is_captured_ && std::ranges::any_of(updates, is_bounded))
    throw std::runtime_error(
        "a CUDA graph is being captured, and it is the host that bounds samples (max_norm) and "
        "draws other noise in each step, which no replay would do: take such steps outside of "
        "graphs");
  push_if_needed();
  wait_for_others();
}

void Gpu::wait_for_others() {
  for (const cuda::Stream other : other_streams_) driver().wait(index_, stream_, other);
}

// Parts of parameters come as tables of their own, for the norm and for the step.
void Gpu::take(const Request& request) {
  Tables tables;
  SummedGradients gradients;
  if (has_parts_) {
    for (const Update* update : updates_) add_moving(*update, tables);
    if (request.max_norm || request.skip_nonfinite) gradients = summed_gradients();
  }
  StepOptions options = request.options;
  options.clear_gradients = options.clear_gradients && !moves_less_;
  driver().take({.workspace = &workspace(),
                 .stream = stream_,
                 .list = has_parts_ ? tables.list() : work_,
                 .summed = gradients.summed(),
                 .options = options,
                 .max_norm = request.max_norm,
                 .skip_nonfinite = request.skip_nonfinite,
                 .loss_scale = request.scaling.loss_scale,
                 .found_inf = request.scaling.found_inf,
                 .counts = request.counts,
                 .progress = progress_,
                 .groups = groups_,
                 .seed = updates_.front()->draw.seed});
  if (request.options.clear_gradients && moves_less_) clear_gradients();
}

SummedGradients Gpu::summed_gradients() {
  std::size_t bytes = 0;
  for (const Update* update : updates_) bytes += SummedGradients::scratch_bytes(*update);
  std::byte* next = bytes > 0 ? driver().scratch(workspace(), stream_, bytes) : nullptr;
  SummedGradients gradients;
  for (const Update* update : updates_) {
    gradients.add(*update, next);
    next += SummedGradients::scratch_bytes(*update);
  }
  driver().clear_gradients(workspace(), stream_, gradients.cleared());
  driver().take({.workspace = &workspace(), .stream = stream_, .list = gradients.copied()});
  return gradients;
}

// ---- samples ----

void Gpu::find_room_for_sums(std::span<Update> updates) {
  std::vector<Update*> here;
  std::size_t bytes = 0;
  for (Update& update : updates) {
    if (!update.samples || update.slot->device() != Device{Device::cuda, index_}) continue;
    here.push_back(&update);
    bytes += room_for_sum(update);
  }
  if (bytes == 0) return;
  std::byte* next = driver().room_for_gradients(workspace(), here.front()->stream, bytes);
  for (Update* update : here) {
    update->room_for_sum = next;
    next += room_for_sum(*update);
  }
}

void Gpu::add_up_samples() {
  std::deque<SamplesToAdd> samples;
  std::vector<cuda::MadeGradient> sums;
  for (const Update* update : updates_) {
    if (!update->samples) continue;
    const SamplesToAdd& one =
        samples.emplace_back(samples_to_add(*update, update->slot->moved_by(*update)));
    sums.push_back({&one.work, update->samples.get(), one.stride, one.factors});
  }
  if (!sums.empty()) driver().make_gradients(workspace(), stream_, sums);
}

// ---- what is wanted of a step ----

std::vector<double> Gpu::tile_sums(WorkList list, double prescale) {
  return driver().tile_sums(workspace(), stream_, list, prescale);
}

std::vector<double> Gpu::tile_sums(double prescale) {
  if (!has_parts_) return driver().tile_sums(workspace(), stream_, work_, prescale);
  const SummedGradients gradients = summed_gradients();
  return driver().tile_sums(workspace(), stream_, gradients.summed(), prescale);
}

void Gpu::clear_gradients() {
  Tables gradients;
  for (const Update* update : updates_) add_whole_gradient(*update, gradients);
  driver().clear_gradients(workspace(), stream_, gradients.list());
}

void Gpu::fetch(void* to, const void* from, std::size_t bytes) {
  driver().fetch(workspace(), stream_, to, from, bytes);
}

void Gpu::catch_up(const MissedRows& rows, cuda::Stream stream) {
  if (rows.is_empty()) return;
  workspace();
  if (driver().is_capturing(index_, stream)) refuse_capture_of_exact_rows();
  driver().catch_up(*workspace_, stream, rows.tables());
  rows.mark();
}

void Gpu::finish() {
  for (const cuda::Stream other : other_streams_) driver().wait(index_, other, stream_);
}

// ---- progress that is kept here ----

void Gpu::keep_progress_of(std::vector<Slot*> slots) {
  residents_ = std::move(slots);
  for (std::size_t i = 0; i < residents_.size(); ++i) residents_[i]->resident.index = i;
  is_pushed_ = false;
}

void Gpu::push_if_needed() {
  if (is_pushed_ || !keeps_progress()) return;
  if (is_captured_)
    throw std::runtime_error(
        "a CUDA graph is being captured, and this optimizer has not taken a step since it was "
        "created, loaded or changed: take one before the capture");
  std::vector<rules::Progress> progress;
  for (const Slot* slot : residents_) progress.push_back(slot->progress);
  seen_ = {};
  driver().write_progress(workspace(), stream_, progress, seen_);
  is_pushed_ = true;
}

cuda::Counters Gpu::pull(cuda::Stream current) {
  if (!is_pushed_) return {};
  if (driver().is_capturing(index_, current))
    throw std::runtime_error(
        "a CUDA graph is being captured, and how far this optimizer has come would have to be "
        "fetched from the GPU: take one step before the capture");
  std::vector<rules::Progress> progress(residents_.size());
  const cuda::Counters now = [&] {
    const GilRelease release(true);
    return driver().read_progress(workspace(), stream_, progress);
  }();
  for (std::size_t i = 0; i < residents_.size(); ++i) residents_[i]->progress = progress[i];
  const cuda::Counters before = std::exchange(seen_, now);
  return {now.steps - before.steps, now.skipped_steps - before.skipped_steps};
}

void Gpu::write_rate(double lr, cuda::Stream stream) {
  driver().write_rate(workspace(), stream, lr);
}

cuda::Scalar Gpu::rate(cuda::Stream stream) { return driver().rate(workspace(), stream); }

}  // namespace fusestep::engine
