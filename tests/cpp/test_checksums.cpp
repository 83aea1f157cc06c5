// A thousand steps of every rule and dtype, one checksum each, equal to those in checksums.txt: on
// every tier, every architecture, with any compiler. `test_checksums` without a file prints them.

#include <fstream>
#include <iostream>
#include <sstream>
#include <string>

#include "cpu/step.h"
#include "cpu/thread_pool.h"
#include "testing.h"

namespace fusestep::testing {
namespace {

constexpr int kSteps = 1000;
constexpr std::int64_t kSize = 1000;

std::uint64_t checksum(const RuleCase& rule_case, DType dtype) {
  const auto rule = rule_case.make();
  const std::size_t states = rule->state_names().size();
  const DType state = dtype == DType::float64 ? DType::float64 : DType::float32;
  const auto bytes = [](DType d) { return static_cast<std::size_t>(kSize * item_size(d)); };

  std::vector<std::byte> parameter(bytes(dtype)), gradient(bytes(dtype));
  std::vector<std::vector<std::byte>> state_arrays(states, std::vector<std::byte>(bytes(state)));
  Random random(11);
  for (std::int64_t i = 0; i < kSize; ++i)
    write(parameter.data() + i * item_size(dtype), dtype, random.number());
  for (auto& array : state_arrays)
    for (std::int64_t i = 0; i < kSize; ++i)
      write(array.data() + i * item_size(state), state, rule->initial_state());

  Work work{};
  work.compute = state;
  work.iteration.operand[kParameter] = {parameter.data(), dtype};
  work.iteration.operand[kGradient] = {gradient.data(), dtype};
  for (std::size_t s = 0; s < states; ++s)
    work.iteration.operand[kState + s] = {state_arrays[s].data(), state};
  work.iteration.plan_dense(kSize, static_cast<int>(2 + states));
  count_operands(work, states);

  const Work* one = &work;
  rules::Progress progress;
  for (int step = 0; step < kSteps; ++step) {
    for (std::int64_t i = 0; i < kSize; ++i)
      write(gradient.data() + i * item_size(dtype), dtype, random.number());
    const GradientNorm norm = cpu::gradient_norm({&one, 1});
    progress = rule->advance(progress);
    const auto coefficients = rule->coefficients(progress, work.compute, 1e-2, states);
    work.rule = &coefficients;
    cpu::update({&one, 1}, {10 / norm.value, false});
  }
  std::uint64_t h = hash(parameter.data(), parameter.size());
  for (const auto& array : state_arrays) h = hash(array.data(), array.size(), h);
  return hash(&progress.momentum_product, sizeof progress.momentum_product, h);
}

std::string lines() {
  std::ostringstream out;
  for (const RuleCase& rule : rule_cases()) {
    for (const DType dtype : kAllDTypes) {
      out << rule.name;
      for (const auto& [option, value] : rule.options) out << ' ' << option << '=' << value;
      out << ' ' << name_of(dtype) << ' ' << std::hex << checksum(rule, dtype) << std::dec << '\n';
    }
  }
  return out.str();
}

}  // namespace
}  // namespace fusestep::testing

int main(int argc, char** argv) {
  using namespace fusestep::testing;
  if (argc < 2) {
    std::cout << lines();
    return 0;
  }
  std::stringstream expected;
  std::ifstream file(argv[1]);
  CHECK(file);
  expected << file.rdbuf();
  for_each_tier([&](const char* tier) {
    if (lines() == expected.str()) return;
    std::cerr << "tier " << tier << " differs from " << argv[1] << '\n';
    std::exit(1);
  });
  std::puts("checksums: passed");
}
