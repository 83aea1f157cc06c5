// One step over a list of parameters, wholly or not at all.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "arrays/array.h"
#include "arrays/rows.h"
#include "arrays/samples.h"
#include "core/gradient_norm.h"
#include "cpu/step.h"
#include "engine/gpu.h"
#include "engine/memory.h"
#include "engine/slot.h"
#include "rules/any_rule.h"

namespace fusestep::engine {

// A learning rate that is kept on a GPU, where others may write to it.
struct RateOnDevice {
  Device device;
  cuda::Scalar number;
};

// Parameters that move by one rule with one set of options.
struct Group {
  std::unique_ptr<rules::AnyRule> rule;
  double lr = 0;
  bool maximize = false;
  std::optional<RateOnDevice> rate =
      std::nullopt;  // instead of lr, for resident parameters on that device
};

// What holds for all groups, from one step to the next.
struct Settings {
  bool skip_nonfinite = false;
  std::optional<double> max_norm;
  std::optional<double> clip_value;
  double ema_decay = 0;              // of averages
  bool stochastic_rounding = false;  // of 16-bit parameters

  bool need_norm() const { return skip_nonfinite || max_norm; }
};

// A parameter that is to move, and its gradient.
struct Update {
  Update(Slot* slot, const Group* group, arrays::Array gradient = {})
      : slot(slot), group(group), gradient(std::move(gradient)) {}
  Update(Slot* slot, const Group* group, arrays::Rows rows)
      : slot(slot),
        group(group),
        gradient(std::move(rows.values)),
        row_numbers(std::move(rows.numbers)) {}
  Update(Slot* slot, const Group* group, arrays::Samples of_samples) : slot(slot), group(group) {
    take(std::move(of_samples));
  }

  void take(arrays::Samples of_samples) {
    gradient = std::move(of_samples.values);
    samples = std::make_unique<gradients::Samples>(std::move(of_samples.samples));
    is_outer = of_samples.is_outer;
    if (of_samples.x) x = std::make_unique<arrays::Array>(std::move(*of_samples.x));
  }

  Slot* slot;
  const Group* group;
  arrays::Array gradient;
  std::optional<std::vector<std::int64_t>> row_numbers;  // where it is of some rows only
  std::unique_ptr<gradients::Samples> samples = {};      // where it is one for each sample
  std::byte* room_for_sum = nullptr;                     // on a GPU: where these are added up

  // Where these are made from factors: `gradient` is that of the rows, and this, if there is one,
  // that of the columns.
  bool is_outer = false;
  std::unique_ptr<arrays::Array> x = {};

  const selections::Choice* choice = nullptr;  // which part of the parameter moves
  selections::Draw draw{};
  cuda::Stream stream = 0;  // on a GPU: where the parameter's library works

  // Whether nothing is there that could move the parameter.
  bool is_nothing() const { return samples && samples->is_nothing(); }
  bool has_noise() const { return samples && samples->has_noise(); }

  // Whether not all of the parameter moves, or not all of it has come equally far.
  bool moves_parts() const { return choice || slot->has_split_progress(); }
};
using Updates = std::span<const Update>;

// Gradients may be the last owners of their memory: a step lets go of them, however it ends.
struct ClearAtExit {
  std::vector<Update>& updates;
  ~ClearAtExit() { updates.clear(); }
};

// Throws ValueError for a learning rate that is negative or not finite.
void check_rate(double lr);

struct StepArguments {
  double grad_scale = 1;
  bool zero_grad = false;
  std::optional<double> ema_decay = std::nullopt;  // instead of that of the settings
  // Of the gradients before grad_scale, where the caller knows it.
  std::optional<GradientNorm> norm = std::nullopt;
  // Where all parameters are on one GPU, and the norm is not given.
  Scaling scaling = {};
};

class Stepper {
 public:
  // Checks everything about the gradients, and plans the step. Changes nothing that a caller can
  // see, but that updates which move something come first. `memory` is that of all parameters and
  // their state.
  void prepare(std::vector<Update>& updates, const OccupiedMemory& memory,
               const StepArguments& arguments);

  // True where take() will let other Python threads run.
  bool will_release_gil() const;

  // True where some of the last step that was prepared is on GPUs.
  bool is_on_gpus() const { return is_on_gpus_; }

  // Elements of the last step that was prepared, on the CPU.
  std::int64_t elements() const { return elements_; }

  // Forgets the slots it has met, which are about to go.
  void forget_gradients() { disjoint_gradients_.clear(); }

  // Brings rows of a slot that keeps their history up to date: these, or all. On a GPU, in this
  // stream, which is its library's.
  void catch_up(Slot& slot, const rules::AnyRule& rule, std::span<const std::int64_t> numbers,
                cuda::Stream stream);
  void catch_up(Slot& slot, const rules::AnyRule& rule, cuda::Stream stream);

  // The norm of each gradient that was prepared.
  std::vector<GradientNorm> gradient_norms(Updates updates);

  // Takes the step that was prepared; releases the GIL if that pays. The errand, which needs the
  // GIL and may be empty, is run while other threads are at work already. False, without the
  // errand, where a gradient was not finite and the step was therefore left out. On a GPU that is
  // found out later, and true.
  bool take(Updates updates, const StepArguments& arguments, const cpu::Errand& errand = {});

  // The part of steps that is taken on a GPU.
  Gpu& gpu(int index);

  // The progress of these slots, all on GPUs, is kept there; or that of none.
  void keep_progress_on_gpus(const std::vector<Slot*>& slots);

  // Brings slots and counters up to date with what GPUs have done. Waits for them, without the GIL:
  // the caller has the turn.
  using CurrentStream = std::function<cuda::Stream(const Device&)>;
  void pull(const CurrentStream& current_stream);

  // What slots and counters say holds from the next step on, on GPUs, too.
  void push();

  Settings settings;
  // On GPUs that keep progress, more may have happened: pull().
  std::int64_t steps = 0;          // that moved at least one parameter
  std::int64_t skipped_steps = 0;  // that met a gradient which was not finite

 private:
  WorkList cpu_work() const { return is_on_gpus_ ? cpu_work_ : work_; }
  bool is_decided_here(Updates updates, const StepArguments& arguments,
                       const Settings& settings) const;
  bool is_counted_elsewhere(const Slot& slot) const;
  void distribute(Updates updates);
  using Parts = std::span<const std::size_t>;  // as part_, of a list
  std::vector<double> tile_sums(double prescale);
  std::vector<double> tile_sums(WorkList list, Parts parts, double prescale);
  GradientNorm gradient_norm();
  void clear_gradients(WorkList on_cpu);
  void catch_up_whole_tables(Updates updates);
  void catch_up_on_gpus(Updates updates);
  void record(const Update& update, const rules::Progress& progress);
  void find_room_for_sums(std::vector<Update>& updates);
  void plan_samples(Updates updates, const StepArguments& arguments);
  std::vector<double> norms_of_samples(Updates updates);
  std::vector<double> norms_of_arrays(Updates updates);
  Slot::Fetch fetch_from(const Slot& slot);
  void find_tops(Updates updates, const StepOptions& options);
  void finish_parts(bool clears_gradients);
  std::size_t place_of(int gpu);
  void check_gradients_are_disjoint(Updates updates);
  void add_coefficients(Updates updates, double ema_decay);
  bool move(Updates updates, const StepArguments& arguments, const cpu::Errand& errand);
  bool run(Updates updates, const StepArguments& arguments, const Settings& settings,
           const cpu::Errand& errand);
  void clear_unmoved(Updates updates);
  void start(Updates updates);

  // The parameters whose last gradients were found to be disjoint from each other. Void as soon as
  // one of them meets other memory, with or without zero_grad.
  std::vector<const Slot*> disjoint_gradients_;

  // Of the step under way; members to keep their memory from one step to the next.
  std::vector<rules::Progress> next_;
  std::vector<const Work*> work_;
  std::vector<const Work*> cpu_work_;  // the part of it that is for the CPU, if some is not
  std::vector<std::size_t> part_;      // for each piece: 0 is the CPU, then the GPUs in order
  std::int64_t elements_ = 0;
  std::vector<rules::Coefficients> coefficients_;

  std::deque<Gpu> gpus_;
  bool is_on_gpus_ = false;  // some of the step under way is
};

}  // namespace fusestep::engine
