#include "arrays/state_memory.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>

#include "core/errors.h"

namespace py = pybind11;

namespace fusestep::arrays {
namespace {

constexpr std::align_val_t kAlignment{64};

// All that is in use, by address. Tensors are freed by any thread, with or without the GIL, and up
// to the end of the process: it is never destroyed.
struct Registry {
  std::mutex mutex;
  std::unordered_map<const std::byte*, std::shared_ptr<StateMemory>> memory;
};

Registry& registry() {
  static Registry* const registry = [] {
    static auto* made = new Registry;
    // A child must not inherit the lock from a thread that it does not have.
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] { made->mutex.unlock(); });
    return made;
  }();
  return *registry;
}

std::size_t bytes_of(const std::vector<std::int64_t>& shape,
                     const std::vector<std::int64_t>& strides, dlpack::DataType dtype) {
  std::int64_t elements = 1;
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    elements = shape[axis] == 0 || elements == 0 ? 0 : elements + (shape[axis] - 1) * strides[axis];
  return static_cast<std::size_t>(elements) * dtype.bits / 8;
}

}  // namespace

struct StateMemory::Export {
  dlpack::Managed managed;
  std::vector<std::int64_t> shape, strides;
  std::shared_ptr<StateMemory> memory;

  static void release(dlpack::Managed* managed) {
    const std::unique_ptr<Export> self(static_cast<Export*>(managed->context));
    auto* data = static_cast<std::byte*>(managed->tensor.data);
    self->memory->in_use_.store(false, std::memory_order_release);
    {
      const std::lock_guard lock(registry().mutex);
      registry().memory.erase(data);
    }
    ::operator delete(data, kAlignment);
  }
};

py::capsule StateMemory::allocate(const std::vector<std::int64_t>& shape,
                                  const std::vector<std::int64_t>& strides,
                                  dlpack::DataType dtype) {
  if (shape.size() != strides.size()) throw ValueError("as many strides as axes are expected");
  const std::size_t bytes = std::max<std::size_t>(bytes_of(shape, strides, dtype), 1);
  auto* data = static_cast<std::byte*>(::operator new(bytes, kAlignment));
  auto exported =
      std::make_unique<Export>(Export{{}, shape, strides, std::make_shared<StateMemory>()});
  exported->managed.tensor = {
      data,  {dlpack::kCpu, 0},      static_cast<std::int32_t>(shape.size()),
      dtype, exported->shape.data(), exported->strides.data(),
      0};
  exported->managed.context = exported.get();
  exported->managed.deleter = Export::release;
  {
    const std::lock_guard lock(registry().mutex);
    registry().memory[data] = exported->memory;
  }
  return py::capsule(&exported.release()->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // a tensor has taken it over
    auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

std::shared_ptr<const StateMemory> StateMemory::at(const std::byte* data) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().memory.find(data);
  return found == registry().memory.end() ? nullptr : found->second;
}

}  // namespace fusestep::arrays
