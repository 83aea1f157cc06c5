#include "cuda/workspace.h"

#include <algorithm>

namespace fusestep::cuda {

Workspace::Workspace(int device) : device_(device) { check_available(); }

Workspace::~Workspace() {
  try {
    const CurrentDevice current(device_);
    for (void* memory : all_) release(memory);
  } catch (const Error&) {  // a forked child, or the end of the process: it is gone already
  }
}

Workspace::Record* Workspace::record(Stream stream) {
  return static_cast<Record*>(reserve_bytes(record_, sizeof(Record), stream));
}

// The memory of a table that is gone serves another one.
Workspace::StepTable& Workspace::step_table(const rules::RowHistory& history, Stream stream) {
  const auto is_of = [&](const StepTable& table) {
    return table.history_.lock().get() == &history;
  };
  auto found = std::ranges::find_if(step_tables_, is_of);
  if (found == step_tables_.end())
    found = std::ranges::find_if(step_tables_,
                                 [](const StepTable& table) { return table.history_.expired(); });
  if (found == step_tables_.end()) found = step_tables_.emplace(found);
  const std::size_t bytes = history.each_step().size() * sizeof(AnyRuleEntry);
  if (!is_of(*found) || found->series_ != history.series() || bytes > found->buffer_.bytes)
    found->count = 0;
  found->history_ = history.weak_from_this();
  found->series_ = history.series();
  reserve_bytes(found->buffer_, bytes, stream);
  return *found;
}

void* Workspace::reserve_bytes(Buffer& buffer, std::size_t bytes, Stream stream) {
  if (buffer.memory && bytes <= buffer.bytes) return buffer.memory;
  if (is_capturing(stream))
    throw Error(
        "a CUDA graph is being captured, and this step needs memory that is not there yet: take "
        "one such step before the capture");
  constexpr std::size_t kLeast = 256;
  const std::size_t wanted = std::max({bytes, 2 * buffer.bytes, kLeast});
  void* memory = allocate(wanted);
  all_.push_back(memory);
  buffer = {memory, wanted};
  return memory;
}

}  // namespace fusestep::cuda
