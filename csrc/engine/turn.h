// One thread at a time inside one optimizer.
#pragma once

#include <Python.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "cpu/thread_pool.h"
#include "engine/gil.h"

namespace fusestep::engine {

// Waits for other threads' turns to end, without the GIL: the thread whose turn it is needs the GIL
// to finish. Needs the GIL.
class Turnstile {
 public:
  class Turn {
   public:
    explicit Turn(Turnstile& turnstile) : turnstile_(&turnstile) { turnstile_->enter(); }
    ~Turn() {
      if (turnstile_) turnstile_->leave();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    friend Turnstile;
    Turn() = default;
    Turnstile* turnstile_ = nullptr;
  };

  // A turn, or nothing where this thread has it already.
  Turn turn_or_own() { return owner_ == std::this_thread::get_id() ? Turn() : Turn(*this); }

 private:
  void enter() {
    if (const auto generation = cpu::fork_generation(); generation != generation_) {
      // The thread whose turn it was has not come along through fork(): its lock is nobody's.
      static_cast<void>(mutex_.release());
      mutex_ = std::make_unique<std::mutex>();
      owner_ = std::thread::id();
      generation_ = generation;
    }
    if (!mutex_->try_lock()) {
      if (owner_ == std::this_thread::get_id())
        throw std::runtime_error("an optimizer cannot be used from inside its own step");
      PyThreadState* state = PyEval_SaveThread();
      mutex_->lock();
      take_gil_back(state);
    }
    owner_ = std::this_thread::get_id();
  }

  void leave() {
    owner_ = std::thread::id();
    mutex_->unlock();
  }

  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
  std::atomic<std::thread::id> owner_{};
  std::uint64_t generation_ = cpu::fork_generation();
};

}  // namespace fusestep::engine
