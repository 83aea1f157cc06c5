#include "cpu/borrowed_threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#if defined(__linux__)
#include <link.h>
#endif

namespace fusestep::cpu {
namespace {

struct OpenMp {
  // Calls function(data) once on each of so many threads, the calling one included.
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;

  explicit operator bool() const { return parallel && max_threads; }
};

// The path of torch's library with the CPU operators; empty where it is not loaded.
std::string torch_library() {
  std::string path;
#if defined(__linux__)
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* found) {
        const std::string_view name = info->dlpi_name ? info->dlpi_name : "";
        if (!name.ends_with("/libtorch_cpu.so")) return 0;
        *static_cast<std::string*>(found) = name;
        return 1;
      },
      &path);
#endif
  return path;
}

OpenMp find_openmp() {
  const std::string path = torch_library();
  if (path.empty()) return {};
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return {};
  OpenMp found;  // in the library, or in those it depends on
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
  found.max_threads =
      reinterpret_cast<decltype(found.max_threads)>(dlsym(library, "omp_get_max_threads"));
  return found;  // the library stays open: torch is never unloaded
}

// Looked for once torch is there to ask.
const OpenMp& openmp() {
  static const OpenMp found = find_openmp();
  return found;
}

thread_local int borrowing = 0;

struct Job {
  ChunkFunction function;
  void* context;
  std::int64_t chunks;
  const Errand& errand;
  std::thread::id caller;
  std::atomic<std::int64_t> next{0};

  void work() {
    if (errand && std::this_thread::get_id() == caller) errand();
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      function(context, i);
  }
};

}  // namespace

BorrowedThreads::BorrowedThreads() { ++borrowing; }
BorrowedThreads::~BorrowedThreads() { --borrowing; }

namespace borrowed {

int threads() {
  if (borrowing == 0 || threads_are_chosen() || fork_generation() != 0 || !openmp()) return 0;
  return std::clamp(openmp().max_threads(), 1, kMaxThreads);
}

void run(std::int64_t chunks, int threads, ChunkFunction function, void* context,
         const Errand& errand) {
  Job job{function, context, chunks, errand, std::this_thread::get_id()};
  openmp().parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job,
                    static_cast<unsigned>(threads), 0);
}

}  // namespace borrowed
}  // namespace fusestep::cpu
