// Every loop of every tier, over lengths around its vectors, on buffers of exactly that length and
// at every misalignment: one byte too far is an error under ASan, one bit off an error anywhere.

#include <array>

#include "testing.h"

namespace fusestep::testing {
namespace {

using rules::Coefficients;
using rules::Progress;

// `size` elements that start `offset` elements into a heap block which ends with the last one.
template <class T>
class Buffer {
 public:
  Buffer(std::int64_t offset, const std::vector<T>& values)
      : block_(new T[static_cast<std::size_t>(offset) + values.size()]),
        data_(block_.get() + offset) {
    std::copy(values.begin(), values.end(), data_);
  }
  T* data() { return data_; }

 private:
  std::unique_ptr<T[]> block_;
  T* data_;
};

template <class T>
std::vector<T> numbers(Random& random, std::int64_t size, bool positive = false) {
  std::vector<T> values(static_cast<std::size_t>(size));
  for (T& x : values) {
    x = static_cast<T>(random.number());
    if (positive && x < 0) x = -x;
  }
  return values;
}

bool same_bytes(const void* a, const void* b, std::size_t size) {
  return size == 0 || std::memcmp(a, b, size) == 0;  // empty vectors may have no address
}

template <class T>
void check_update(const RuleCase& rule_case, std::int64_t size, std::int64_t offset,
                  bool is_anchored) {
  const auto rule = rule_case.make();
  const std::size_t states = rule->state_names().size();
  const Progress at = rule->advance(rule->advance(Progress{}));
  const Coefficients coefficients = rule->coefficients(at, kComputeType<T>, 0.1, states);

  Random random(static_cast<std::uint64_t>(size * 64 + offset));
  const auto parameter = numbers<T>(random, size), gradient = numbers<T>(random, size);
  std::vector<std::vector<T>> state;
  for (std::size_t i = 0; i < states; ++i) state.push_back(numbers<T>(random, size, i > 0));
  if (states == 1) state[0] = numbers<T>(random, size, true);
  const auto reference = numbers<T>(random, size), importance = numbers<T>(random, size, true);
  const auto run = [](std::int64_t count, T* w, const T* g, const std::array<T*, kMaxStates>& s,
                      const T* to, const T* by) {
    return cpu::Run<T>{count, w, {g, T(0.5)}, {s[0], s[1], s[2]}, {T(0.7)}, to, by};
  };

  // The expected bits: one element at a time, so that only scalar code runs.
  std::vector<std::vector<T>> expected(1 + states);
  const auto& base = cpu::compiled_tiers().back().kernels->of<T>();
  for (std::int64_t i = 0; i < size; ++i) {
    std::array<T, 4> x{parameter[i]};
    for (std::size_t s = 0; s < states; ++s) x[1 + s] = state[s][i];
    const T g = gradient[i];
    base.update[is_anchored][coefficients.loop](
        coefficients.bytes,
        run(1, &x[0], &g, {&x[1], &x[2], &x[3]}, &reference[i], &importance[i]));
    for (std::size_t k = 0; k <= states; ++k) expected[k].push_back(x[k]);
  }

  for_each_tier([&](const char*) {
    Buffer<T> w(offset, parameter), g((offset + 3) % 17, gradient);
    std::vector<Buffer<T>> s;
    for (const auto& values : state) s.emplace_back(offset, values);
    std::array<T*, kMaxStates> at_state{};
    for (std::size_t i = 0; i < states; ++i) at_state[i] = s[i].data();
    const auto& kernels = cpu::active_tier().kernels->of<T>();
    Buffer<T> to((offset + 5) % 17, reference), by((offset + 7) % 17, importance);
    kernels.update[is_anchored][coefficients.loop](
        coefficients.bytes, run(size, w.data(), g.data(), at_state, to.data(), by.data()));
    const auto bytes = static_cast<std::size_t>(size) * sizeof(T);
    CHECK(same_bytes(w.data(), expected[0].data(), bytes));
    CHECK(same_bytes(g.data(), gradient.data(), bytes));
    for (std::size_t i = 0; i < states; ++i)
      CHECK(same_bytes(s[i].data(), expected[1 + i].data(), bytes));
  });
}

template <class T>
void check_conversions(DType dtype, std::int64_t size, std::int64_t offset) {
  const std::int64_t item = item_size(dtype);
  Random random(static_cast<std::uint64_t>(size));
  std::vector<std::byte> stored(static_cast<std::size_t>(size * item));
  for (std::int64_t i = 0; i < size; ++i) write(stored.data() + i * item, dtype, random.number());
  for_each_tier([&](const char*) {
    const auto& kernels = cpu::active_tier().kernels->of<T>();
    Buffer<std::byte> from(offset, stored), to(offset + 1, stored);  // odd addresses, too
    Buffer<T> loaded(offset, std::vector<T>(static_cast<std::size_t>(size)));
    kernels.load[static_cast<int>(dtype)](from.data(), loaded.data(), size);
    for (std::int64_t i = 0; i < size; ++i)
      CHECK(loaded.data()[i] == static_cast<T>(read(stored.data() + i * item, dtype)));
    for (std::int64_t i = 0; i < size * item; ++i) to.data()[i] = std::byte{0xee};
    kernels.store[static_cast<int>(dtype)](loaded.data(), to.data(), size);
    if (item <= static_cast<std::int64_t>(sizeof(T)))  // nothing was lost on the way in
      CHECK(same_bytes(to.data(), stored.data(), stored.size()));
  });
}

// Every float16 and bfloat16, every rounding boundary between two of them, against arithmetic on
// exact values.
void check_sixteen_bits() {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 h{static_cast<std::uint16_t>(bits)};
    const BFloat16 b{static_cast<std::uint16_t>(bits)};
    const bool h_nan = (bits & 0x7fff) > 0x7c00, b_nan = (bits & 0x7fff) > 0x7f80;
    CHECK(h_nan ? to_float(h) != to_float(h) : to_float16(to_float(h)).bits == bits);
    CHECK(b_nan ? to_float(b) != to_float(b) : to_bfloat16(to_float(b)).bits == bits);
    CHECK(!h_nan || (to_float16(to_float(h)).bits & 0x7fff) > 0x7c00);
    CHECK(!b_nan || (to_bfloat16(to_float(b)).bits & 0x7fff) > 0x7f80);

    const std::uint32_t magnitude = bits & 0x7fff;
    if (!h_nan && magnitude < 0x7bff) {  // a tie with the next float16, and its neighbours
      const Float16 next{static_cast<std::uint16_t>(bits + 1)};
      const double tie = (static_cast<double>(to_float(h)) + to_float(next)) / 2;
      const std::uint32_t even = bits & 1 ? bits + 1 : bits;
      CHECK(cast<Float16>(tie).bits == even);
      CHECK(cast<Float16>(static_cast<float>(tie)).bits == even);
      CHECK(cast<Float16>(tie * (1 + 0x1p-50)).bits == bits + 1);
      CHECK(cast<Float16>(tie * (1 - 0x1p-50)).bits == bits);
    }
    if (!b_nan && magnitude < 0x7f7f && magnitude > 0) {
      const BFloat16 next{static_cast<std::uint16_t>(bits + 1)};
      const double tie = (static_cast<double>(to_float(b)) + to_float(next)) / 2;
      const std::uint32_t even = bits & 1 ? bits + 1 : bits;
      CHECK(cast<BFloat16>(tie).bits == even);
      CHECK(cast<BFloat16>(tie * (1 + 0x1p-50)).bits == bits + 1);
      CHECK(cast<BFloat16>(tie * (1 - 0x1p-50)).bits == bits);
    }
  }
  CHECK(cast<Float16>(65519.99).bits == 0x7bff);
  CHECK(cast<Float16>(65520.0).bits == 0x7c00);
  CHECK(cast<Float16>(1e300).bits == 0x7c00);
  CHECK(cast<BFloat16>(-1e300).bits == 0xff80);
}

template <class T>
void check_sum_of_squares(std::int64_t size, std::int64_t offset) {
  Random random(static_cast<std::uint64_t>(size));
  const auto values = numbers<T>(random, size);
  double plain = 0;
  for (const T x : values) plain += static_cast<double>(x) * static_cast<double>(x);
  double first = -1;
  for_each_tier([&](const char*) {
    Buffer<T> x(offset, values);
    const double sum = cpu::active_tier().kernels->of<T>().sum_of_squares(x.data(), size, 1.0);
    if (first < 0) first = sum;
    CHECK(sum == first);
    CHECK(sum >= plain * (1 - 1e-12) && sum <= plain * (1 + 1e-12));
    const double halved = cpu::active_tier().kernels->of<T>().sum_of_squares(x.data(), size, 0.5);
    CHECK(halved == sum / 4);
  });
}

// One after another, by one or four at a time.
template <class T>
void check_products(std::int64_t size, std::int64_t offset) {
  Random random(static_cast<std::uint64_t>(size * 64 + offset + 3));
  std::vector<Buffer<T>> from;
  std::array<const T*, 4> at{};
  for (const T*& one : at) one = from.emplace_back(offset, numbers<T>(random, size)).data();
  const auto times = numbers<T>(random, 4), before = numbers<T>(random, size);
  for (const int count : {1, 4})
    for (const bool begins : {false, true}) {
      std::vector<T> expected = begins ? std::vector<T>(before.size(), T{-0.0}) : before;
      for (std::size_t i = 0; i < expected.size(); ++i)
        for (std::size_t k = 0; k < static_cast<std::size_t>(count); ++k)
          expected[i] += times[k] * at[k][i];
      for_each_tier([&](const char*) {
        Buffer<T> sum(offset, before);
        cpu::active_tier().kernels->of<T>().add_products(at.data(), times.data(), count, begins,
                                                         sum.data(), size);
        CHECK(same_bytes(sum.data(), expected.data(), expected.size() * sizeof(T)));
      });
    }
}

// A block of a sum of outer products, whose rows lie a stride apart.
template <class T>
void check_outer(std::int64_t terms, std::int64_t offset) {
  constexpr std::int64_t kRows = cpu::kOuterRows, kColumns = cpu::kOuterColumns<T>;
  const std::int64_t stride = kColumns + offset;
  const auto size = static_cast<std::size_t>((kRows - 1) * stride + kColumns);
  Random random(static_cast<std::uint64_t>(terms * 64 + offset + 4));
  Buffer<T> error(offset, numbers<T>(random, terms * kRows));
  Buffer<T> x(offset, numbers<T>(random, terms * kColumns));
  const auto before = numbers<T>(random, static_cast<std::int64_t>(size));
  for (const bool begins : {false, true}) {
    std::vector<T> expected = before;
    for (std::int64_t r = 0; r < kRows; ++r)
      for (std::int64_t c = 0; c < kColumns; ++c) {
        T& sum = expected[static_cast<std::size_t>(r * stride + c)];
        if (begins) sum = T{-0.0};
        for (std::int64_t k = 0; k < terms; ++k)
          sum += error.data()[k * kRows + r] * x.data()[k * kColumns + c];
      }
    for_each_tier([&](const char*) {
      Buffer<T> sum(offset, before);
      cpu::active_tier().kernels->of<T>().add_outer(error.data(), x.data(), terms, begins,
                                                    sum.data(), stride);
      CHECK(same_bytes(sum.data(), expected.data(), size * sizeof(T)));
    });
  }
}

void run() {
  std::vector<std::int64_t> sizes;
  for (std::int64_t size = 0; size <= 70; ++size) sizes.push_back(size);
  for (const std::int64_t size : {127, 128, 129, 1023, 1024}) sizes.push_back(size);
  for (const std::int64_t size : sizes) {
    for (const std::int64_t offset : {0, 1, 7, 16}) {
      for (const RuleCase& rule : rule_cases()) {
        for (const bool is_anchored : {false, true}) {
          check_update<float>(rule, size, offset, is_anchored);
          check_update<double>(rule, size, offset, is_anchored);
        }
      }
      for (const DType dtype : kAllDTypes) {
        check_conversions<float>(dtype, size, offset);
        check_conversions<double>(dtype, size, offset);
      }
      check_sum_of_squares<float>(size, offset);
      check_sum_of_squares<double>(size, offset);
      check_products<float>(size, offset);
      check_products<double>(size, offset);
    }
  }
  for (const std::int64_t terms : {1, 2, 5, 128})
    for (const std::int64_t offset : {0, 1, 7, 16}) {
      check_outer<float>(terms, offset);
      check_outer<double>(terms, offset);
    }
  check_sixteen_bits();
}

}  // namespace
}  // namespace fusestep::testing

int main() {
  fusestep::testing::run();
  std::puts("kernels: passed");
}
