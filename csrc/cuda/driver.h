// What the extension with the CUDA kernels offers to the one that has everything else.
//
// Two extensions, so that the first can be left out of a build, and is not loaded where nobody has
// a GPU. They come in one wheel; the second finds the first's Driver in a capsule. Errors are
// cuda::Error.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cuda/step.h"

namespace fusestep::cuda {

class Driver {
 public:
  static constexpr const char* kCapsule = "fusestep.cuda.Driver";

  // Throws, with a sentence that says what to do, where CUDA cannot be used.
  virtual std::shared_ptr<Workspace> open(int device) const = 0;

  virtual int device_of(const void* address) const = 0;
  virtual int current_device() const = 0;
  virtual bool is_capturing(int device, Stream stream) const = 0;
  virtual void synchronize(int device) const = 0;
  virtual void wait(int device, Stream stream, Stream other) const = 0;

  // As in step.h.
  virtual void take(const Step& step) const = 0;
  virtual void catch_up(Workspace& workspace, Stream stream,
                        std::span<const RowsBehind> tables) const = 0;
  virtual void make_gradients(Workspace& workspace, Stream stream,
                              std::span<const MadeGradient> gradients) const = 0;
  virtual std::byte* room_for_gradients(Workspace& workspace, Stream stream,
                                        std::size_t bytes) const = 0;
  virtual std::vector<double> tile_sums(Workspace& workspace, Stream stream, WorkList list,
                                        double prescale) const = 0;
  virtual void fetch(Workspace& workspace, Stream stream, void* to, const void* from,
                     std::size_t bytes) const = 0;
  virtual std::byte* scratch(Workspace& workspace, Stream stream, std::size_t bytes) const = 0;
  virtual void clear_gradients(Workspace& workspace, Stream stream, WorkList list) const = 0;
  virtual void write_progress(Workspace& workspace, Stream stream,
                              std::span<const rules::Progress> progress,
                              const Counters& counters) const = 0;
  virtual Counters read_progress(Workspace& workspace, Stream stream,
                                 std::span<rules::Progress> progress) const = 0;
  virtual void write_rate(Workspace& workspace, Stream stream, double lr) const = 0;
  virtual Scalar rate(Workspace& workspace, Stream stream) const = 0;

 protected:
  ~Driver() = default;
};

const Driver& driver();

}  // namespace fusestep::cuda
