// The part of a step that one GPU takes.
//
// Parameters are either resident, their progress kept on the GPU, where a step may be left out or
// repeated by a CUDA graph without the host's knowing; or their progress is here, and a step is a
// single launch. See docs/adr/0008.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/work.h"
#include "cuda/driver.h"
#include "engine/missed_rows.h"
#include "engine/part_tables.h"
#include "engine/slot.h"

namespace fusestep::engine {

struct Group;
struct Update;

// What a loss scaler has found out: numbers on a GPU, or null.
struct Scaling {
  const float* loss_scale = nullptr;
  const float* found_inf = nullptr;
};

class Gpu {
 public:
  explicit Gpu(int index) : index_(index) {}

  int index() const { return index_; }

  // ---- a step: begin(), add() for each parameter, start(), what is wanted, finish() ----

  void begin();
  void add(const Update& update);
  bool is_idle() const { return work_.empty(); }

  cuda::Stream stream() const { return stream_; }

  // Throws where a CUDA graph is being captured that would not do again what this step does.
  // Has the step's stream wait for those of other libraries whose arrays take part.
  void start(std::span<const Update> updates);
  void wait_for_others();  // as a part of that

  // Before a step is prepared: tells those of the updates that are here, and of samples, where
  // these are going to be added up; and once it is known how much each sample counts, does it.
  void find_room_for_sums(std::span<Update> updates);
  void add_up_samples();

  struct Request {
    StepOptions options;
    std::optional<double> max_norm = std::nullopt;  // the norm being found out on the GPU
    bool skip_nonfinite = false;                    // likewise
    Scaling scaling;
    bool counts = true;  // this step among the steps, for all GPUs
  };
  void take(const Request& request);
  std::vector<double> tile_sums(double prescale);
  std::vector<double> tile_sums(WorkList list, double prescale);  // of other work
  void clear_gradients();  // all of them, also where a part moves

  // Brings memory of the GPU here, as it is at this point of the step.
  void fetch(void* to, const void* from, std::size_t bytes);

  // Has those streams wait for the step.
  void finish();

  // Brings rows up to date that are behind, in a step or between two. Throws, and changes nothing,
  // where a CUDA graph is being captured.
  void catch_up(const MissedRows& rows, cuda::Stream stream);

  // Whether the step is being captured rather than taken.
  bool is_captured() const { return is_captured_; }

  // ---- progress that is kept here ----

  // From the next step on, that of these slots, or of none.
  void keep_progress_of(std::vector<Slot*> slots);
  bool keeps_progress() const { return !residents_.empty(); }

  // Brings the slots up to date, and counts what has happened since the last time. Waits for the
  // GPU, without the GIL. Throws where a CUDA graph is being captured on this stream, which that
  // would spoil.
  cuda::Counters pull(cuda::Stream current);
  bool knows_more() const { return is_pushed_; }

  // What the slots say holds from the next step on.
  void push() { is_pushed_ = false; }

  // A learning rate that captured graphs read.
  void write_rate(double lr, cuda::Stream stream);
  cuda::Scalar rate(cuda::Stream stream);

 private:
  cuda::Workspace& workspace();
  void push_if_needed();
  std::uint32_t group_of(const Update& update);
  SummedGradients summed_gradients();

  int index_;
  std::shared_ptr<cuda::Workspace> workspace_;
  std::vector<Slot*> residents_;
  bool is_pushed_ = false;  // the GPU knows more than the slots do
  cuda::Counters seen_{};

  // Of the step under way.
  cuda::Stream stream_ = 0;
  bool is_captured_ = false;
  std::vector<cuda::Stream> other_streams_;
  std::vector<const Update*> updates_;
  bool has_parts_ = false;
  bool moves_less_ = false;        // than there are gradients
  std::vector<const Work*> work_;  // of updates that move all of a parameter, or rows of it
  std::vector<cuda::ProgressOnDevice> progress_;
  std::vector<cuda::AdvanceGroup> groups_;
  const Group* last_group_ = nullptr;
};

}  // namespace fusestep::engine
