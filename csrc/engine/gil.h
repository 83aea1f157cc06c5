// Giving the GIL away and taking it back.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace fusestep::engine {

// Takes the GIL back. When the interpreter ends while a daemon thread is inside a step, Python
// (before 3.14) ends that thread from in here, by unwinding its stack. There is nothing to unwind
// to: C++ would stop the process, and run destructors that need the GIL. The thread waits for the
// end.
inline void take_gil_back(PyThreadState* state) noexcept {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    for (;;) pause();
  }
}

// Without the GIL while this lives, if `release`.
class GilRelease {
 public:
  explicit GilRelease(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~GilRelease() {
    if (state_) take_gil_back(state_);
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fusestep::engine
