// A step over a list of parameters on one GPU: put into a stream, never waited for.
//
// Plain steps are one launch for all dense parameters of a rule. Where the norm of the gradients is
// asked for, it is summed first, tile by tile, then in groups of 1,024 sums; where the step may be
// left out, or is captured in a CUDA graph, the counts of updates are on the GPU, and coefficients
// are worked out there.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/gradient_norm.h"
#include "core/work.h"
#include "cuda/bodies.h"
#include "cuda/catch_up.h"
#include "cuda/workspace.h"
#include "gradients/samples.h"

namespace fusestep::cuda {

// How far one parameter has come, where that is kept on the GPU.
struct ProgressOnDevice {
  std::size_t slot;               // its place in the workspace's array
  Scalar step, momentum_product;  // copies of it that others may write to, or null
  std::uint32_t group;            // its place among the groups
  std::uint32_t parameter;        // its number, of which random choices depend
};

struct Step {
  Workspace* workspace;
  Stream stream;
  WorkList list;
  WorkList summed = {};  // what the norm is of; empty: the list
  StepOptions options = {};

  // To be found out, and acted upon, on the GPU.
  std::optional<double> max_norm = std::nullopt;
  bool skip_nonfinite = false;
  const float* loss_scale = nullptr;
  const float* found_inf = nullptr;
  bool counts = true;  // in the workspace's counters

  // One for each piece of work, or none: then the list comes with its coefficients.
  std::span<const ProgressOnDevice> progress = {};
  std::span<const AdvanceGroup> groups = {};
  std::uint64_t seed = 0;  // of random choices

  bool needs_norm() const { return max_norm || skip_nonfinite; }
  bool is_decided_on_device() const {
    return needs_norm() || loss_scale || found_inf || !progress.empty();
  }
};

void take(const Step& step);

// Rows of a table that are behind. The sources of those that `work` lists are places in `missed`;
// from one source to the next it is sizeof(MissedSteps).
struct RowsBehind {
  struct Missed {
    rules::IdleBytes idle;
    std::int64_t steps;  // the last so many of the table's history
  };
  const Work* work;
  std::span<const Missed> missed;
};

// A gradient that is made before a step takes it, of those of samples. The work's two operands are
// those of a SamplesItem; it is planned for one sample, and the next lies `stride` bytes further.
// Or it is made of factors, and the operands are those of an OuterItem.
struct MadeGradient {
  const Work* work;
  const gradients::Samples* samples;
  std::int64_t stride = 0;
  std::optional<Factors> factors = std::nullopt;
};

void make_gradients(Workspace& workspace, Stream stream, std::span<const MadeGradient> gradients);

// Memory to make gradients in: that of the last step, if it was as large.
std::byte* room_for_gradients(Workspace& workspace, Stream stream, std::size_t bytes);

// Makes up for what they have missed.
void catch_up(Workspace& workspace, Stream stream, std::span<const RowsBehind> tables);

// The sums of the squares of the prescaled gradients, one for each tile. Waits for the GPU.
std::vector<double> tile_sums(Workspace& workspace, Stream stream, WorkList list, double prescale);

// Copies an array's memory to the host, after what is in the stream. Waits for the GPU.
void fetch(Workspace& workspace, Stream stream, void* to, const void* from, std::size_t bytes);

// Memory for what a later call of this step needs on the way.
std::byte* scratch(Workspace& workspace, Stream stream, std::size_t bytes);

void clear_gradients(Workspace& workspace, Stream stream, WorkList list);

// The progress of parameters and the counters on the GPU. Reading waits for all that it has to do.
void write_progress(Workspace& workspace, Stream stream, std::span<const rules::Progress> progress,
                    const Counters& counters);
Counters read_progress(Workspace& workspace, Stream stream, std::span<rules::Progress> progress);

// A learning rate on the GPU, which captured graphs read.
void write_rate(Workspace& workspace, Stream stream, double lr);
Scalar rate(Workspace& workspace, Stream stream);

}  // namespace fusestep::cuda
