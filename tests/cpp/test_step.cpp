// Whole steps: any mix of dtypes and layouts, any number of threads, every tier, one result.

#include <cmath>

#include "cpu/step.h"
#include "cpu/thread_pool.h"
#include "testing.h"

namespace fusestep::testing {
namespace {

using rules::Coefficients;
using rules::Progress;

// One operand's memory: exactly as large as its layout needs.
struct Memory {
  std::vector<std::int64_t> shape, strides;
  std::vector<std::byte> bytes;
  DType dtype;

  Memory(std::vector<std::int64_t> shape_, DType dtype_, bool transposed, std::int64_t step)
      : shape(std::move(shape_)), strides(shape.size()), dtype(dtype_) {
    std::int64_t stride = item_size(dtype) * step;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      const std::size_t axis = transposed ? i : shape.size() - 1 - i;
      strides[axis] = stride;
      stride *= shape[axis];
    }
    std::int64_t last = item_size(dtype);
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] == 0) return;
      last += strides[axis] * (shape[axis] - 1);
    }
    bytes.resize(static_cast<std::size_t>(last));
  }

  template <class Function>
  void for_each(Function f) {  // in C order of the index
    std::int64_t size = 1;
    for (const std::int64_t extent : shape) size *= extent;
    for (std::int64_t i = 0; i < size; ++i) {
      std::int64_t rest = i, offset = 0;
      for (std::size_t axis = shape.size(); axis-- > 0; rest /= shape[axis])
        offset += rest % shape[axis] * strides[axis];
      f(bytes.data() + offset);
    }
  }

  void fill(Random& random, bool positive) {
    for_each([&](std::byte* at) {
      const double x = random.number();
      write(at, dtype, positive ? std::fabs(x) : x);
    });
  }

  std::uint64_t hashed(std::uint64_t h) {
    for_each(
        [&](const std::byte* at) { h = hash(at, static_cast<std::size_t>(item_size(dtype)), h); });
    return h;
  }
};

struct Problem {
  std::vector<std::vector<Memory>> parameters;  // each: parameter, gradient, states
  std::vector<Work> work;
  std::vector<Coefficients> coefficients;

  Problem(const RuleCase& rule_case, DType parameter, DType gradient, DType state, bool odd) {
    const auto rule = rule_case.make();
    const std::vector<std::vector<std::int64_t>> shapes = {
        {}, {0}, {7}, {1024}, {33, 65}, {3, 0, 2}, {90, 1000}, {5, 4, 3, 2}};
    Random random(7);
    coefficients.reserve(shapes.size());
    const Progress at = rule->advance(Progress{});
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      auto& memory = parameters.emplace_back();
      memory.emplace_back(shapes[i], parameter, odd && i % 2, 1);
      memory.emplace_back(shapes[i], gradient, odd, odd && i % 3 ? 2 : 1);
      for (std::size_t s = 0; s < rule->state_names().size(); ++s)
        memory.emplace_back(shapes[i], state, odd && i % 2, 1);
      for (std::size_t k = 0; k < memory.size(); ++k) memory[k].fill(random, k >= 2);

      Work one{};
      one.compute =
          parameter == DType::float64 || state == DType::float64 ? DType::float64 : DType::float32;
      std::vector<Geometry> geometry;
      for (std::size_t k = 0; k < memory.size(); ++k) {
        one.iteration.operand[k] = {memory[k].bytes.data(), memory[k].dtype};
        geometry.push_back({memory[k].shape, memory[k].strides});
      }
      one.iteration.plan(geometry);
      count_operands(one, memory.size() - kState);
      coefficients.push_back(rule->coefficients(at, one.compute, 0.1, memory.size() - 2));
      one.rule = &coefficients.back();
      work.push_back(one);
    }
  }

  std::vector<const Work*> list() const {
    std::vector<const Work*> pointers;
    for (const Work& one : work) pointers.push_back(&one);
    return pointers;
  }

  std::uint64_t hashed() {
    std::uint64_t h = hash("", 0);
    for (auto& memory : parameters)
      for (Memory& m : memory) h = m.hashed(h);
    return h;
  }
};

void check(const RuleCase& rule, DType parameter, DType gradient, DType state) {
  std::uint64_t expected = 0;
  double norm = 0;
  bool first = true;
  for_each_tier([&](const char*) {
    for (const int threads : {1, 2, 5}) {
      for (const bool odd : {false, true}) {
        cpu::set_num_threads(threads);
        Problem problem(rule, parameter, gradient, state, odd);
        const GradientNorm found = cpu::gradient_norm(problem.list());
        cpu::update(problem.list(), {0.25, false});
        const std::uint64_t h = problem.hashed();
        if (first) expected = h;
        if (!odd) norm = first ? found.value : norm;
        CHECK(h == expected);
        CHECK(found.finite && std::fabs(found.value - norm) < 1e-12 * norm);
        CHECK(odd || found.value == norm);
        first = false;

        cpu::update(problem.list(), {0.25, true});
        CHECK(cpu::gradient_norm(problem.list()).value == 0);
      }
    }
  });
}

void check_nonfinite() {
  Problem problem(rule_cases()[4], DType::float64, DType::float64, DType::float64, false);
  double& g = *reinterpret_cast<double*>(problem.parameters[6][1].bytes.data() + 8 * 70'000);
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    g = bad;
    CHECK(!cpu::gradient_norm(problem.list()).finite);
  }
  g = 1e300;  // its square is not finite, but it is
  const GradientNorm norm = cpu::gradient_norm(problem.list());
  CHECK(norm.finite && std::fabs(norm.value - 1e300) < 1e288);
  cpu::clear_gradients(problem.list());
  CHECK(cpu::gradient_norm(problem.list()).value == 0);
}

void run(bool quick) {
  check_nonfinite();
  const RuleCase& adam = rule_cases()[4];
  check(adam, DType::float32, DType::float32, DType::float32);
  check(adam, DType::bfloat16, DType::float16, DType::float32);
  if (quick) return;
  for (const RuleCase& rule : rule_cases())
    for (const DType dtype : kAllDTypes)
      check(rule, dtype, dtype, dtype == DType::float64 ? DType::float64 : DType::float32);
  for (const DType parameter : kAllDTypes)
    for (const DType gradient : kAllDTypes)
      for (const DType state : {DType::float32, DType::float64})
        check(adam, parameter, gradient, state);
}

}  // namespace
}  // namespace fusestep::testing

// `test_step quick` is for sanitizers that slow everything down.
int main(int argc, char**) {
  fusestep::testing::run(argc > 1);
  std::puts("step: passed");
}
