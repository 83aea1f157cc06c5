// The pool under stress: many callers, changing sizes, forks. Meant for ThreadSanitizer.

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "cpu/thread_pool.h"
#include "testing.h"

namespace fusestep::testing {
namespace {

// Each chunk is visited once; what it wrote is visible to the caller afterwards. The errand is run
// once, by the caller. It makes no difference whether the threads were announced.
void check_parallel_for(std::int64_t chunks, int threads, bool announced) {
  std::vector<int> visits(static_cast<std::size_t>(chunks));  // not atomic: TSan looks on
  std::vector<std::thread::id> errands;
  if (announced) cpu::rouse(threads);
  cpu::parallel_for(
      chunks, threads, [&](std::int64_t i) { ++visits[static_cast<std::size_t>(i)]; },
      [&] { errands.push_back(std::this_thread::get_id()); });
  for (const int count : visits) CHECK(count == 1);
  CHECK(errands == std::vector{std::this_thread::get_id()});
}

void stress(int rounds) {
  Random random(static_cast<std::uint64_t>(rounds));
  for (int i = 0; i < rounds; ++i)
    check_parallel_for(random.below(50), static_cast<int>(1 + random.below(6)), i % 3 == 0);
}

void run(int rounds) {
  stress(rounds);

  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back([=] { stress(rounds); });
  for (std::thread& caller : callers) caller.join();

  // Nested: the inner call finds the pool busy and works alone.
  std::atomic<int> inner{0};
  cpu::parallel_for(8, 4,
                    [&](std::int64_t) { cpu::parallel_for(8, 4, [&](std::int64_t) { ++inner; }); });
  CHECK(inner == 64);

  if (std::getenv("FUSESTEP_NO_FORK")) {
    std::puts("threads: fork() not tested, FUSESTEP_NO_FORK is set");
    return;
  }
  const auto generation = cpu::fork_generation();
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      CHECK(cpu::fork_generation() != generation);
      stress(20);
      _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    stress(20);
  }
  CHECK(cpu::fork_generation() == generation);
}

}  // namespace
}  // namespace fusestep::testing

int main() {
  fusestep::testing::run(300);
  std::puts("threads: passed");
}
