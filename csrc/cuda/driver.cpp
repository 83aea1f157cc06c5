#include "cuda/driver.h"

namespace fusestep::cuda {
namespace {

class LinkedDriver final : public Driver {
 public:
  std::shared_ptr<Workspace> open(int device) const override {
    return std::make_shared<Workspace>(device);
  }
  int device_of(const void* address) const override {
    check_available();
    return cuda::device_of(address);
  }
  int current_device() const override { return cuda::current_device(); }
  bool is_capturing(int device, Stream stream) const override {
    const CurrentDevice current(device);
    return cuda::is_capturing(stream);
  }
  void synchronize(int device) const override {
    const CurrentDevice current(device);
    cuda::synchronize();
  }
  void wait(int device, Stream stream, Stream other) const override {
    const CurrentDevice current(device);
    cuda::wait(stream, other);
  }
  void take(const Step& step) const override { cuda::take(step); }
  void catch_up(Workspace& workspace, Stream stream,
                std::span<const RowsBehind> tables) const override {
    cuda::catch_up(workspace, stream, tables);
  }
  void make_gradients(Workspace& workspace, Stream stream,
                      std::span<const MadeGradient> gradients) const override {
    cuda::make_gradients(workspace, stream, gradients);
  }
  std::byte* room_for_gradients(Workspace& workspace, Stream stream,
                                std::size_t bytes) const override {
    return cuda::room_for_gradients(workspace, stream, bytes);
  }
  std::vector<double> tile_sums(Workspace& workspace, Stream stream, WorkList list,
                                double prescale) const override {
    return cuda::tile_sums(workspace, stream, list, prescale);
  }
  void fetch(Workspace& workspace, Stream stream, void* to, const void* from,
             std::size_t bytes) const override {
    cuda::fetch(workspace, stream, to, from, bytes);
  }
  std::byte* scratch(Workspace& workspace, Stream stream, std::size_t bytes) const override {
    return cuda::scratch(workspace, stream, bytes);
  }
  void clear_gradients(Workspace& workspace, Stream stream, WorkList list) const override {
    cuda::clear_gradients(workspace, stream, list);
  }
  void write_progress(Workspace& workspace, Stream stream,
                      std::span<const rules::Progress> progress,
                      const Counters& counters) const override {
    cuda::write_progress(workspace, stream, progress, counters);
  }
  Counters read_progress(Workspace& workspace, Stream stream,
                         std::span<rules::Progress> progress) const override {
    return cuda::read_progress(workspace, stream, progress);
  }
  void write_rate(Workspace& workspace, Stream stream, double lr) const override {
    cuda::write_rate(workspace, stream, lr);
  }
  Scalar rate(Workspace& workspace, Stream stream) const override {
    return cuda::rate(workspace, stream);
  }
};

}  // namespace

const Driver& driver() {
  static const LinkedDriver linked;
  return linked;
}

}  // namespace fusestep::cuda
