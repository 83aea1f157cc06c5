// Everything that cuda/step.h offers gives the CPU's bits, and touches nothing but the arrays.
//
// Each array has a block of memory of exactly its size on the device, and a copy of the block on
// the host. Both sides do the same, then all bytes of both blocks are compared: those between the
// elements of strided arrays, too, and those before arrays that begin in the middle of a vector.
// Behind an array there is nothing, so that AddressSanitizer sees one byte too far (where CUDA is
// simulated in the host's memory), or compute-sanitizer does (on a GPU).

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <deque>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>

#include "cpu/samples.h"
#include "cpu/step.h"
#include "cuda/step.h"
#include "testing.h"

#if !defined(FUSESTEP_CUDA_SIMULATED)
#include <cuda_runtime_api.h>
#endif

namespace fusestep::testing {
namespace {

using cuda::Counters;
using rules::Coefficients;
using rules::Progress;

// What the test is at, to be said when it fails.
std::string& scene() {
  static std::string text;
  return text;
}

void check_that(bool condition, const char* what) {
  if (!condition) std::fprintf(stderr, "%s: %s\n", scene().c_str(), what);
  CHECK(condition);
}

// ---- the device --------------------------------------------------------------------------------

#if defined(FUSESTEP_CUDA_SIMULATED)

std::byte* allocate_on_device(std::size_t bytes) { return new std::byte[bytes]; }
void release_on_device(std::byte* memory) { delete[] memory; }

void copy_to_device(std::byte* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
void copy_from_device(void* to, const std::byte* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

// A CUDA graph is being captured while this lives.
class Capture {
 public:
  Capture() { setenv("FUSESTEP_SIMULATE", "capture", 1); }
  ~Capture() { unsetenv("FUSESTEP_SIMULATE"); }
  Capture(const Capture&) = delete;
  cuda::Stream stream() const { return 1; }
};

// A captured graph. Nothing is captured in the simulation: at every launch it is recorded anew.
class Graph {
 public:
  explicit Graph(std::function<void(cuda::Stream)> record) : record_(std::move(record)) {}
  void launch() const {
    const Capture capture;
    record_(capture.stream());
  }

 private:
  std::function<void(cuda::Stream)> record_;
};

#else

void must(cudaError_t status) {
  if (status != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  CHECK(status == cudaSuccess);
}

std::byte* allocate_on_device(std::size_t bytes) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes));
  return static_cast<std::byte*>(memory);
}
void release_on_device(std::byte* memory) { must(cudaFree(memory)); }

// Both wait for what is in the default stream and in those that Capture makes.
void copy_to_device(std::byte* to, const void* from, std::size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
void copy_from_device(void* to, const std::byte* from, std::size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

class Capture {
 public:
  Capture() {
    must(cudaStreamCreate(&stream_));
    must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  }
  ~Capture() {
    if (!graph_) end();
    must(cudaGraphDestroy(graph_));
    must(cudaStreamDestroy(stream_));
  }
  Capture(const Capture&) = delete;
  cuda::Stream stream() const { return reinterpret_cast<cuda::Stream>(stream_); }
  cudaGraph_t end() {
    must(cudaStreamEndCapture(stream_, &graph_));
    return graph_;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
};

class Graph {
 public:
  explicit Graph(const std::function<void(cuda::Stream)>& record) {
    record(capture_.stream());
    must(cudaGraphInstantiate(&executable_, capture_.end(), 0));
  }
  ~Graph() { must(cudaGraphExecDestroy(executable_)); }
  Graph(const Graph&) = delete;
  void launch() const {
    must(cudaGraphLaunch(executable_, reinterpret_cast<cudaStream_t>(capture_.stream())));
  }

 private:
  Capture capture_;
  cudaGraphExec_t executable_ = nullptr;
};

#endif

// True where this throws while a graph is being captured.
template <class Function>
bool is_refused_in_capture(Function f) {
  const Capture capture;
  try {
    f(capture.stream());
  } catch (const cuda::Error&) {
    return true;
  }
  return false;
}

class DeviceBytes {
 public:
  explicit DeviceBytes(std::size_t size) : size_(size), memory_(allocate_on_device(size)) {}

  std::byte* data() const { return memory_.get(); }
  void write(const void* from) const { copy_to_device(memory_.get(), from, size_); }
  void read(void* to) const { copy_from_device(to, memory_.get(), size_); }

 private:
  struct Release {
    void operator()(std::byte* memory) const { release_on_device(memory); }
  };
  std::size_t size_;
  std::unique_ptr<std::byte, Release> memory_;
};

bool same_or_nan(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b);
}

// A number on the device, and what it should be.
class NumberOnDevice {
 public:
  NumberOnDevice(bool is_double, double value)
      : is_double_(is_double), memory_(is_double ? sizeof(double) : sizeof(float)) {
    write(value);
  }

  cuda::Scalar scalar() const { return {memory_.data(), is_double_}; }
  const float* as_float() const { return reinterpret_cast<const float*>(memory_.data()); }
  double expected() const { return expected_; }

  void write(double value) {
    expect(value);
    const auto rounded = static_cast<float>(expected_);
    memory_.write(is_double_ ? static_cast<const void*>(&expected_) : &rounded);
  }
  void expect(double value) { expected_ = is_double_ ? value : static_cast<float>(value); }
  void check() const {
    double found;
    float rounded;
    memory_.read(is_double_ ? static_cast<void*>(&found) : &rounded);
    check_that(same_or_nan(is_double_ ? found : rounded, expected_), "a number");
  }

 private:
  bool is_double_;
  double expected_ = 0;
  DeviceBytes memory_;
};

// ---- arrays ------------------------------------------------------------------------------------

using Shape = std::vector<std::int64_t>;

// How an array lies in memory, in elements.
struct View {
  Shape shape, strides;

  static View of(const Shape& shape) {
    std::vector<std::size_t> order(shape.size());
    std::iota(order.begin(), order.end(), 0);
    return in_order(shape, order);
  }
  // With these axes from the outermost to the innermost.
  static View in_order(const Shape& shape, const std::vector<std::size_t>& order) {
    View view{shape, Shape(shape.size())};
    std::int64_t stride = 1;
    for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
      view.strides[*axis] = stride;
      stride *= std::max<std::int64_t>(1, shape[*axis]);
    }
    return view;
  }
  static View transposed(const Shape& shape) {
    std::vector<std::size_t> order(shape.size());
    std::iota(order.rbegin(), order.rend(), 0);
    return in_order(shape, order);
  }

  View stepped(std::int64_t step) const {
    View view = *this;
    for (std::int64_t& stride : view.strides) stride *= step;
    return view;
  }
  View reversed(std::size_t axis) const {
    View view = *this;
    view.strides[axis] = -view.strides[axis];
    return view;
  }
  View broadcast(std::size_t axis) const {
    View view = *this;
    view.strides[axis] = 0;
    return view;
  }

  std::int64_t size() const {
    return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  }
  // Elements below the one at index 0, and from the lowest to the highest.
  std::int64_t first() const {
    return reach([](std::int64_t stride) { return std::max<std::int64_t>(0, -stride); });
  }
  std::int64_t span() const {
    return size() == 0 ? 0 : 1 + reach([](std::int64_t stride) { return std::abs(stride); });
  }

 private:
  template <class Length>
  std::int64_t reach(Length length) const {
    std::int64_t sum = 0;
    for (std::size_t axis = 0; axis < shape.size() && size() > 0; ++axis)
      sum += length(strides[axis]) * (shape[axis] - 1);
    return sum;
  }
};

class Array {
 public:
  Array(const View& view, DType dtype, std::int64_t misaligned)
      : view_(view),
        byte_strides_(view.stepped(item_size(dtype)).strides),
        dtype_(dtype),
        before_((misaligned + view.first()) * item_size(dtype)),
        // NaN for every dtype: what is read between elements would show.
        host_(static_cast<std::size_t>((misaligned + view.span()) * item_size(dtype)),
              std::byte{0xff}),
        device_(host_.size()) {}

  Operand on_host() { return {host_.data() + before_, dtype_}; }
  Operand on_device() { return {device_.data() + before_, dtype_}; }
  Geometry geometry() const { return {view_.shape, byte_strides_}; }
  std::int64_t size() const { return view_.size(); }

  // Writes value() to every element, on both sides.
  template <class Value>
  void fill(Value value) {
    for_each([&](std::int64_t at) { write(host_.data() + at, dtype_, value()); });
    device_.write(host_.data());
  }

  void write_one(std::int64_t index, double value) {
    for_each([&](std::int64_t at) {
      if (index-- == 0) write(host_.data() + at, dtype_, value);
    });
    device_.write(host_.data());
  }

  // Codes, of which each may be any number of bytes.
  void fill_bytes(Random& random, std::int64_t first = 0, std::int64_t end = 256) {
    for_each([&](std::int64_t at) {
      for (std::int64_t i = 0; i < item_size(dtype_); ++i)
        host_[static_cast<std::size_t>(at + i)] =
            static_cast<std::byte>(first + random.below(end - first));
    });
    device_.write(host_.data());
  }
  bool has_floats() const { return is_float(dtype_); }

  std::vector<std::byte> from_device() const {
    std::vector<std::byte> found(host_.size());
    device_.read(found.data());
    return found;
  }

  // Which NaN comes of an operation is the processor's choice.
  bool is_same() const {
    std::vector<std::byte> found = from_device();
    if (found == host_ || !has_floats()) return found == host_;
    for_each([&](std::int64_t at) {
      if (std::isnan(read(found.data() + at, dtype_)) && std::isnan(read(&host_[at], dtype_)))
        std::copy_n(host_.data() + at, item_size(dtype_), found.data() + at);
    });
    return found == host_;
  }

 private:
  // Calls f(bytes from the beginning of the block) for each element, in C order of the index.
  template <class Function>
  void for_each(Function f) const {
    const std::int64_t elements = size();
    for (std::int64_t i = 0; i < elements; ++i) {
      std::int64_t rest = i, at = before_;
      for (std::size_t axis = view_.shape.size(); axis-- > 0; rest /= view_.shape[axis])
        at += rest % view_.shape[axis] * byte_strides_[axis];
      f(at);
    }
  }

  View view_;
  Shape byte_strides_;
  DType dtype_;
  std::int64_t before_;
  std::vector<std::byte> host_;
  DeviceBytes device_;
};

// ---- problems ----------------------------------------------------------------------------------

enum class Fill { ordinary, special, huge };  // special: every kind of number there is

double number(Random& random, Fill fill) {
  static constexpr double kInfinity = HUGE_VAL;
  static const double special[] = {
      0,        -0.0,  0x1p-24,   0x1p-25,    0x1.8p-25,    -1e-40,     3e-39,           5e-324,
      -1e-310,  65504, 65519,     65520,      -65536,       0x1p-14,    0x1.ffp-15,      3.4e38,
      -3.39e38, 1e300, kInfinity, -kInfinity, std::nan(""), 0x1.0101p0, 0x1.0080000001p0};
  if (fill == Fill::special && random.below(2)) return special[random.below(std::ssize(special))];
  return random.number() * (fill == Fill::huge ? 1e200 : 1);
}

struct DTypes {
  DType parameter = DType::float32, gradient = DType::float32, state = DType::float32;
};

constexpr DTypes all_of(DType dtype) {
  return {dtype, dtype, dtype == DType::float64 ? DType::float64 : DType::float32};
}
constexpr DTypes kSingle = all_of(DType::float32), kDouble = all_of(DType::float64),
                 kHalf{DType::bfloat16, DType::float16, DType::float32};

std::vector<DTypes> all_dtypes() {
  std::vector<DTypes> all;
  for (const DType parameter : kAllDTypes)
    for (const DType gradient : kAllDTypes)
      for (const DType state : {DType::float32, DType::float64})
        all.push_back({parameter, gradient, state});
  return all;
}

enum class Rate { host, workspace, number };       // where the learning rate is
enum class Copies { none, in_single, in_double };  // of the progress, which others may write to

struct Spec {
  const RuleCase* rule;
  DTypes dtypes;
  View parameter, gradient, state;
  std::array<std::int64_t, kMaxOperands> misaligned{};  // elements
  Fill fill = Fill::ordinary;
  std::int64_t count = 0;  // updates it has had
  double gradient_factor = 1;
  double lr = 1e-2;
  Rate rate = Rate::host;
  Copies copies = Copies::none;
  std::optional<std::vector<std::int64_t>> rows{};  // those that the gradient has, if not all
  bool is_anchored = false, has_importance = false;
  bool has_average = false;
  std::optional<DType> copy{};    // the type of the one that follows the parameter
  bool rounds_parameter = false;  // at random, as narrow state always is
  bool is_in_halves = false;      // the parameter (core/split.h)
  bool is_in_blocks = false;      // the state (core/blocks.h)

  Spec(const RuleCase& rule_, const DTypes& dtypes_, const View& parameter_, const View& gradient_)
      : rule(&rule_),
        dtypes(dtypes_),
        parameter(parameter_),
        gradient(gradient_),
        state(parameter_) {}
  Spec(const RuleCase& rule_, const DTypes& dtypes_, const Shape& shape)
      : Spec(rule_, dtypes_, View::of(shape), View::of(shape)) {}
};

// The whole row is looked at first.
const RuleCase kRowwise{"rowwise_adagrad", {{"lr", 0.1}, {"weight_decay", 0.1}}};

const RuleCase& kAdam = rule_cases()[4];
const RuleCase& kAmsgrad = rule_cases()[7];

struct Parameter {
  Spec spec;
  std::unique_ptr<rules::AnyRule> rule;
  std::deque<Array> arrays;  // parameter, gradient, state, anchor, followers, lower half
  std::deque<Array> powers;  // of state in blocks
  gradients::Rows rows;
  Work on_host{}, on_device{};
  Progress progress, next;
  std::optional<NumberOnDevice> step_copy, product_copy;
  bool step_is_told = false;  // by somebody who wrote to the copy

  std::uint64_t index;  // of which random choices depend

  Parameter(const Spec& spec_, std::uint64_t index_, Random& random)
      : spec(spec_), rule(spec.rule->make()), index(index_) {
    progress = {spec.count, spec.count == 0 ? 1.0 : 0.625};
    add_arrays();
    fill(random);
    if (spec.rows)
      rows.plan(*spec.rows, spec.parameter.shape[0]);
    else if (rule->is_rowwise())
      rows.plan_all(spec.parameter.shape[0]);
    plan(on_host, &Array::on_host);
    plan(on_device, &Array::on_device);
    if (spec.copies != Copies::none) add_copies();
  }

  std::size_t states() const { return rule->state_names().size(); }
  bool has_rows() const { return spec.rows || rule->is_rowwise(); }

  void fill(Random& random) {
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      if (!arrays[i].has_floats()) {
        arrays[i].fill_bytes(random);
        continue;
      }
      arrays[i].fill([&] {
        const double x =
            number(random, i == kGradient || spec.fill != Fill::huge ? spec.fill : Fill::ordinary);
        return i >= kState && spec.fill != Fill::special ? std::fabs(x) : x;
      });
    }
    const bool is_any = spec.fill == Fill::special;
    for (Array& array : powers) array.fill_bytes(random, is_any ? 1 : 110, is_any ? 254 : 135);
  }

  // The progress after one more update.
  Progress advanced() const {
    Progress from = progress;
    const double told = step_is_told ? step_copy->expected() : -1;
    if (told >= 0 && told <= 0x1p53) from.step = static_cast<std::int64_t>(told);
    if (product_copy) from.momentum_product = product_copy->expected();
    return rule->advance(from);
  }

  void commit() {
    progress = next;
    step_is_told = false;
    if (step_copy) step_copy->expect(static_cast<double>(progress.step));
    if (product_copy) product_copy->expect(progress.momentum_product);
  }

  void write_step(double value) {
    step_copy->write(value);
    step_is_told = true;
  }

 private:
  void add_arrays() {
    const DTypes& dtypes = spec.dtypes;
    arrays.emplace_back(spec.parameter, dtypes.parameter, spec.misaligned[kParameter]);
    arrays.emplace_back(spec.gradient, dtypes.gradient, spec.misaligned[kGradient]);
    const View state = rule->is_rowwise() ? View::of({spec.parameter.shape[0]}) : spec.state;
    for (std::size_t s = 0; s < states(); ++s) {
      arrays.emplace_back(state, state_dtype(s), spec.misaligned[kState + s]);
      if (is_in_blocks()) powers.emplace_back(View::of({blocks_of(state.size())}), DType::bits8, 0);
    }
    const DType wide = dtypes.state == DType::float64 ? DType::float64 : DType::float32;
    for (int i = 0; i < spec.is_anchored + spec.has_importance + spec.has_average; ++i)
      arrays.emplace_back(spec.state, wide, spec.misaligned[arrays.size()]);
    if (spec.copy) arrays.emplace_back(spec.parameter, *spec.copy, spec.misaligned[arrays.size()]);
    if (is_in_halves())
      arrays.emplace_back(spec.parameter, DType::bits16, spec.misaligned[arrays.size()]);
  }

  bool is_in_halves() const {
    return spec.is_in_halves && spec.dtypes.parameter == DType::bfloat16;
  }
  bool is_in_blocks() const { return spec.is_in_blocks && !rule->is_rowwise(); }

  // The state of rows is float32 or float64.
  DType state_dtype(std::size_t i) const {
    if (is_in_blocks()) return rule->is_signed(i) ? DType::signed_bits8 : DType::bits8;
    const bool is_wide = rule->is_rowwise() && spec.dtypes.state == DType::bfloat16;
    return is_wide ? DType::float32 : spec.dtypes.state;
  }

  void plan(Work& work, Operand (Array::*operand)()) {
    std::vector<Geometry> geometry;
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      auto [shape, strides] = arrays[i].geometry();
      if (rule->is_rowwise() && i == kState) {
        work.row_state = (arrays[i].*operand)();
        work.row_state_stride = strides[0];
        continue;
      }
      work.iteration.operand[geometry.size()] = (arrays[i].*operand)();
      if (i >= kState && i - kState < powers.size())
        work.iteration.operand[i].powers = (powers[i - kState].*operand)().data;
      if (has_rows()) {
        rows.stride[geometry.size()] = strides[0];
        shape = shape.subspan(1), strides = strides.subspan(1);
      }
      geometry.push_back({shape, strides});
    }
    work.iteration.plan(geometry);
    count_operands(work, rule->is_rowwise() ? 0 : states(), spec.is_anchored + spec.has_importance);
    const int average = spec.has_average ? work.operands_read : 0;
    const int copy = spec.copy ? work.operands_read + spec.has_average : 0;
    work.followers = {average, 0.875, copy};
    if (is_in_halves())
      work.lower_half = work.operands_read + spec.has_average + spec.copy.has_value();
    work.rounding.is_random_in_parameter =
        spec.rounds_parameter && !is_in_halves() && item_size(spec.dtypes.parameter) == 2;
    work.rounding.is_random_in_state = states() > 0 && item_size(state_dtype(0)) < 4;
    work.rows = has_rows() ? &rows : nullptr;
    work.is_rowwise = rule->is_rowwise();
    if (spec.is_anchored) {
      const int reference = kState + (rule->is_rowwise() ? 0 : static_cast<int>(states()));
      work.anchor = {0.7, 0, reference, spec.has_importance ? reference + 1 : 0};
    }
    const bool in_double = spec.dtypes.parameter == DType::float64 ||
                           (spec.dtypes.state == DType::float64 && !is_in_blocks());
    work.compute = in_double ? DType::float64 : DType::float32;
    work.gradient_factor = spec.gradient_factor;
  }

  void add_copies() {
    const bool in_double = spec.copies == Copies::in_double;
    const std::size_t scalars = rule->scalar_names().size();
    if (scalars > 0) step_copy.emplace(in_double, static_cast<double>(progress.step));
    if (scalars > 1) product_copy.emplace(in_double, progress.momentum_product);
  }
};

// What a step is asked for.
struct Wish {
  StepOptions options{};
  std::optional<double> max_norm{};
  bool skip_nonfinite = false;
  std::optional<float> loss_scale{}, found_inf{};

  bool needs_norm() const { return max_norm || skip_nonfinite; }
};

// A list of parameters, on both sides.
class Problem {
 public:
  explicit Problem(const std::vector<Spec>& specs, std::uint64_t seed = 1) : random_(seed) {
    for (const Spec& spec : specs) parameters_.emplace_back(spec, parameters_.size(), random_);
    for (const Parameter& one : parameters_) {
      host_list_.push_back(&one.on_host);
      device_list_.push_back(&one.on_device);
    }
    write_progress(workspace_, 0, {}, counters_);
    set_rate(0.02);
  }

  WorkList on_host() const { return host_list_; }
  WorkList on_device() const { return device_list_; }
  cuda::Workspace& workspace() { return workspace_; }
  Parameter& operator[](std::size_t i) { return parameters_[i]; }
  std::size_t size() const { return parameters_.size(); }

  void fill() {
    for (Parameter& one : parameters_) one.fill(random_);
  }
  void fill_gradients() {
    for (Parameter& one : parameters_)
      one.arrays[kGradient].fill([&] { return number(random_, one.spec.fill); });
  }

  void set_rate(double rate) {
    rate_ = rate;
    rate_number_.write(rate);
    cuda::write_rate(workspace_, 0, rate);
  }

  // From now on the device counts updates and works out coefficients.
  void keep_progress_on_device() {
    for (std::size_t i = 0; i < size(); ++i) {
      Parameter& one = parameters_[i];
      one.on_device.rule = nullptr;
      tracked_.push_back({slot_of(i), one.step_copy ? one.step_copy->scalar() : cuda::Scalar{},
                          one.product_copy ? one.product_copy->scalar() : cuda::Scalar{},
                          group_of(one), static_cast<std::uint32_t>(one.index)});
    }
    write_progress(workspace_, 0, all_progress(), counters_);
  }

  // One step on both sides, after which everything must be the same.
  void take(const Wish& wish) {
    write_inputs(wish);
    take_on_host(wish);
    take_on_device(wish, workspace_, 0);
    check();
  }

  void write_inputs(const Wish& wish) {
    loss_scale_.write(wish.loss_scale.value_or(0));
    found_inf_.write(wish.found_inf.value_or(0));
  }

  void take_on_host(const Wish& wish) {
    add_coefficients();
    const auto factor = decide(wish);
    if (!factor) {
      if (wish.options.clear_gradients) cpu::clear_gradients(on_host());
      return;
    }
    for (Parameter& one : parameters_) one.commit();
    cpu::update(on_host(), {*factor, wish.options.clear_gradients, wish.options.gradient_bound});
  }

  void take_on_device(const Wish& wish, cuda::Workspace& workspace, cuda::Stream stream) const {
    cuda::Step step{};
    step.workspace = &workspace;
    step.stream = stream;
    step.list = on_device();
    step.options = wish.options;
    step.max_norm = wish.max_norm;
    step.skip_nonfinite = wish.skip_nonfinite;
    if (wish.loss_scale) step.loss_scale = loss_scale_.as_float();
    if (wish.found_inf) step.found_inf = found_inf_.as_float();
    step.progress = tracked_;
    step.groups = groups_;
    step.seed = kSeed;
    cuda::take(step);
  }

  void check() {
    for (std::size_t i = 0; i < size(); ++i) check_arrays(i);
    loss_scale_.check();
    found_inf_.check();
    check_progress();
  }

  // The sums of squares, too.
  void check_sums() {
    for (const double prescale : {1.0, kPrescale}) {
      const auto expected = cpu::tile_sums(on_host(), prescale);
      const auto found = cuda::tile_sums(workspace_, 0, on_device(), prescale);
      check_that(std::ranges::equal(expected, found, same_or_nan), "sums of tiles");
    }
    check();
  }

  void clear_gradients() {
    cpu::clear_gradients(on_host());
    cuda::clear_gradients(workspace_, 0, on_device());
    check();
  }

 private:
  // Slots are in another order than parameters, and there are some that nobody uses.
  std::size_t slot_of(std::size_t parameter) const { return size() - parameter; }

  std::uint32_t group_of(const Parameter& one) {
    const Spec& spec = one.spec;
    const GroupKey key{spec.rule, spec.lr, spec.rate};
    const auto known = std::ranges::find(group_keys_, key);
    if (known != group_keys_.end()) return static_cast<std::uint32_t>(known - group_keys_.begin());
    group_keys_.push_back(key);
    const auto loop = static_cast<std::uint32_t>(one.rule->loop(one.states()));
    // Where the rate is on the device, the host's must not count.
    const double lr = spec.rate == Rate::host ? spec.lr : std::nan("");
    cuda::Scalar rate;
    if (spec.rate == Rate::workspace) rate = cuda::rate(workspace_, 0);
    if (spec.rate == Rate::number) rate = rate_number_.scalar();
    groups_.push_back({loop, one.rule->options(), lr, rate});
    return static_cast<std::uint32_t>(groups_.size() - 1);
  }

  double rate_of(const Spec& spec) const {
    if (spec.rate == Rate::host) return spec.lr;
    return spec.rate == Rate::workspace ? rate_ : rate_number_.expected();
  }

  // Of the next update of each. Neighbours share them where they are the same, as in the engine.
  void add_coefficients() {
    coefficients_.clear();
    const Parameter* last = nullptr;
    for (Parameter& one : parameters_) {
      one.next = one.advanced();
      const bool shared = last && last->spec.rule == one.spec.rule && last->next == one.next &&
                          last->on_host.compute == one.on_host.compute &&
                          rate_of(last->spec) == rate_of(one.spec);
      if (!shared)
        coefficients_.push_back(
            one.rule->coefficients(one.next, one.on_host.compute, rate_of(one.spec), one.states()));
      last = &one;
      one.on_host.rule = &coefficients_.back();
      one.on_host.anchor.lr = rate_of(one.spec);
      one.on_device.anchor.lr = tracked_.empty() ? rate_of(one.spec) : std::nan("");
      one.on_host.rounding.stream = RandomStream::of_rounding(kSeed, one.next.step, one.index);
      one.on_device.rounding.stream =
          tracked_.empty() ? one.on_host.rounding.stream : RandomStream{};
      if (tracked_.empty()) one.on_device.rule = &coefficients_.back();
    }
  }

  // What gradients are multiplied by, where the step happens.
  std::optional<double> decide(const Wish& wish) {
    const bool counts = wish.needs_norm() || wish.loss_scale || wish.found_inf || !tracked_.empty();
    const auto norm = wish.needs_norm() ? cpu::gradient_norm(on_host()) : GradientNorm{0, true};
    double factor = wish.options.gradient_factor;
    if (wish.loss_scale) factor /= *wish.loss_scale;
    if (wish.found_inf && *wish.found_inf != 0) return std::nullopt;
    if (wish.skip_nonfinite && !norm.finite) {
      ++counters_.skipped_steps;
      return std::nullopt;
    }
    if (counts) ++counters_.steps;
    if (wish.max_norm) factor *= clip_factor(*wish.max_norm, norm.value * std::fabs(factor));
    return factor;
  }

  void check_arrays(std::size_t i) {
    const Parameter& one = parameters_[i];
    check_that(std::ranges::all_of(one.powers, &Array::is_same), "powers of blocks");
    for (std::size_t k = 0; k < one.arrays.size(); ++k) {
      if (one.arrays[k].is_same()) continue;
      std::fprintf(stderr, "%s: operand %zu of parameter %zu (%s, %s, %s; %lld elements)\n",
                   scene().c_str(), k, i, one.spec.rule->name, name_of(one.spec.dtypes.parameter),
                   name_of(one.spec.dtypes.gradient), static_cast<long long>(one.arrays[k].size()));
      CHECK(!"an array differs from the CPU's");
    }
  }

  std::vector<Progress> all_progress() const {
    std::vector<Progress> all(size() + 2, Progress{-7, 0.25});
    for (std::size_t i = 0; i < size(); ++i) all[slot_of(i)] = parameters_[i].progress;
    return all;
  }

  void check_progress() {
    const std::vector<Progress> expected =
        tracked_.empty() ? std::vector<Progress>{} : all_progress();
    std::vector<Progress> found(expected.size());
    const Counters counters = read_progress(workspace_, 0, found);
    check_that(found == expected, "progress");
    check_that(counters.steps == counters_.steps, "the steps counted");
    check_that(counters.skipped_steps == counters_.skipped_steps, "the skipped steps counted");
    for (const Parameter& one : parameters_) {
      if (one.step_copy) one.step_copy->check();
      if (one.product_copy) one.product_copy->check();
    }
  }

  using GroupKey = std::tuple<const RuleCase*, double, Rate>;
  static constexpr std::uint64_t kSeed = 0xfedcba9876543210;

  Random random_;
  cuda::Workspace workspace_{0};  // fresh, and so no larger than this problem needs
  std::deque<Parameter> parameters_;
  std::deque<Coefficients> coefficients_;
  std::vector<const Work*> host_list_, device_list_;
  std::vector<cuda::ProgressOnDevice> tracked_;
  std::vector<GroupKey> group_keys_;
  std::vector<cuda::AdvanceGroup> groups_;
  NumberOnDevice loss_scale_{false, 0}, found_inf_{false, 0}, rate_number_{false, 0};
  double rate_ = 0;
  Counters counters_{0, 0};
};

// Two plain steps, the second of which clears gradients; then the sums of what came of clearing.
void check_steps(const std::vector<Spec>& specs) {
  Problem problem(specs);
  problem.take({{0.25, false}});
  problem.check_sums();
  problem.take({{-3, true}});
  problem.check_sums();
}

// ---- dense arrays ------------------------------------------------------------------------------

// Around every boundary: of 16 bytes, a warp, a block and a tile.
constexpr std::int64_t kSizes[] = {0,    1,    2,    3,    4,    5,    7,    8,
                                   31,   32,   33,   255,  256,  257,  1023, 1024,
                                   1025, 2047, 2048, 2049, 4095, 4096, 4097};

void check_rules(bool quick) {
  scene() = "rules";
  for (const RuleCase& rule : rule_cases()) {
    for (const DTypes& dtypes : quick ? std::vector{kSingle, kHalf, kDouble} : all_dtypes()) {
      std::vector<Spec> specs;
      for (const std::int64_t size : kSizes) {
        specs.emplace_back(rule, dtypes, Shape{size});
        if (size > 1000) specs.back().gradient_factor = -1;
      }
      check_steps(specs);
    }
  }
}

// Each operand on its own begins in the middle of a vector.
void check_alignment(bool quick) {
  scene() = "alignment";
  for (const DTypes& dtypes : quick ? std::vector{kHalf, kDouble} : all_dtypes()) {
    std::vector<Spec> specs;
    for (std::size_t operand = 0; operand < kMaxOperands; ++operand)
      for (const std::int64_t elements : {1, 2, 3, 4, 8})
        specs.emplace_back(kAmsgrad, dtypes, Shape{2053}).misaligned[operand] = elements;
    check_steps(specs);
  }
}

// Infinities, NaNs, subnormal numbers, and what is rounded to them.
void check_special_numbers(bool quick) {
  scene() = "special numbers";
  for (const RuleCase& rule : rule_cases()) {
    for (const DTypes& dtypes : quick ? std::vector{kSingle, kHalf, kDouble} : all_dtypes()) {
      std::vector<Spec> specs;
      specs.emplace_back(rule, dtypes, Shape{1500}).fill = Fill::special;
      specs.emplace_back(rule, dtypes, View::of({30, 40}), View::transposed({30, 40})).fill =
          Fill::special;
      check_steps(specs);
    }
  }
}

// More than 1,024 tiles, so that sums of sums are summed.
void check_large() {
  scene() = "large";
  for (const DTypes& dtypes : {kSingle, kDouble, kHalf}) {
    Problem problem({Spec(kAdam, dtypes, Shape{1'200'007})});
    problem.check_sums();
    problem.take({{0.5, true}, 3.0, true});
  }
}

// ---- anchors and rows --------------------------------------------------------------------------

std::vector<RuleCase> all_rules() {
  std::vector<RuleCase> all = rule_cases();
  all.push_back(kRowwise);
  return all;
}

// More than a launch takes, dense and strided, each operand aligned and not.
void check_anchors(bool quick) {
  scene() = "anchors";
  const std::vector<RuleCase> rules = all_rules();
  for (const RuleCase& rule : rules) {
    for (const DTypes& dtypes : quick ? std::vector{kSingle, kDouble} : all_dtypes()) {
      std::vector<Spec> specs;
      for (std::size_t i = 0; i < 2 * kMaxOperands; ++i) {
        for (const std::int64_t size : {0, 5, 1027}) specs.emplace_back(rule, dtypes, Shape{size});
        specs.back().misaligned[i / 2] = 1;
        specs.emplace_back(rule, dtypes, View::of({9, 40}), View::transposed({9, 40}));
      }
      for (std::size_t i = 0; i < specs.size(); ++i) {
        specs[i].is_anchored = i % 5 != 0;
        specs[i].has_importance = specs[i].is_anchored && i % 3 == 0;
      }
      check_steps(specs);
    }
  }
  std::vector<Spec> many(300, Spec(kAdam, kSingle, Shape{3}));
  for (Spec& spec : many) spec.is_anchored = true;
  check_steps(many);
}

void add_epilogue(Spec& spec, Random& random) {
  spec.has_average = random.below(2);
  if (random.below(2)) spec.copy = kAllDTypes[random.below(4)];
  spec.rounds_parameter = random.below(2);
  spec.is_in_halves = random.below(2);
  if (random.below(2)) spec.dtypes.state = DType::bfloat16;
}

// Some rows of a table, listed in any order and several times, or each once and ascending.
Spec rows_of(const RuleCase& rule, const DTypes& dtypes, const View& table, std::int64_t count,
             Random& random) {
  std::vector<std::int64_t> numbers;
  for (std::int64_t i = 0; i < count; ++i) numbers.push_back(random.below(table.shape[0]));
  if (random.below(3) == 0) {
    std::ranges::sort(numbers);
    numbers.erase(std::ranges::unique(numbers).begin(), numbers.end());
  }
  Shape shape = table.shape;
  shape[0] = std::ssize(numbers);
  View values = View::of(shape);
  if (random.below(4) == 0) values = View::transposed(shape);
  if (random.below(4) == 0) values = values.stepped(2);
  Spec spec(rule, dtypes, table, values);
  spec.rows = std::move(numbers);
  spec.is_anchored = random.below(3) == 0;
  spec.has_importance = spec.is_anchored && random.below(2) == 0;
  return spec;
}

std::vector<Spec> some_tables(const RuleCase& rule, const DTypes& dtypes, Random& random) {
  std::vector<Spec> specs;
  for (const std::int64_t width : kSizes) {
    const std::int64_t count = random.below(width < 200 ? 40 : 6);
    specs.push_back(rows_of(rule, dtypes, View::of({7, width}), count, random));
    if (random.below(2)) specs.back().misaligned[kParameter] = 1;
  }
  for (const View& view : {View::transposed({6, 40}), View::of({5, 6, 7}).stepped(2),
                           View::transposed({4, 33, 40}), View::of({9})})
    specs.push_back(rows_of(rule, dtypes, view, random.below(20), random));
  return specs;
}

void check_rows(bool quick) {
  scene() = "rows";
  Random random(5);
  const std::vector<RuleCase> rules = all_rules();
  for (const RuleCase& rule : rules) {
    for (const DTypes& dtypes : quick ? std::vector{kSingle, kHalf, kDouble} : all_dtypes()) {
      std::vector<Spec> specs = some_tables(rule, dtypes, random);
      specs.insert(specs.begin() + 3, Spec(rule, dtypes, Shape{4, 30}));  // dense, in between
      check_steps(specs);
    }
  }
}

// Averages, copies, state in bfloat16, rounding at random and bounded gradients, of everything that
// moves; counts on the device, whence random numbers come then.
void check_epilogues(bool quick) {
  scene() = "epilogues";
  Random random(6);
  const std::vector<RuleCase> rules = all_rules();
  for (const RuleCase& rule : rules) {
    for (const DTypes& dtypes : quick ? std::vector{kSingle, kHalf, kDouble} : all_dtypes()) {
      std::vector<Spec> specs = some_tables(rule, dtypes, random);
      for (std::size_t i = 0; i < kMaxOperands; ++i) {
        for (const std::int64_t size : {0, 5, 1027, 2048})
          specs.emplace_back(rule, dtypes, Shape{size}).misaligned[i] = size % 2;
        specs.emplace_back(rule, dtypes, View::of({9, 40}), View::transposed({9, 40}));
        specs.back().is_anchored = i % 2 == 0;
      }
      for (Spec& spec : specs) add_epilogue(spec, random);
      Problem problem(specs);
      problem.take({{0.25, false, 0.1}});
      problem.check_sums();
      problem.keep_progress_on_device();
      problem.take({{-3, true, 0.5}});
      problem.check_sums();
    }
  }
}

// State in blocks, alone and with all else; of tables whose rows consist of blocks, too.
void check_blocks(bool quick) {
  scene() = "state in blocks";
  Random random(8);
  for (const RuleCase& rule : rule_cases()) {
    for (const DTypes& dtypes : quick ? std::vector{kSingle, kHalf, kDouble} : all_dtypes()) {
      for (const Fill fill : {Fill::ordinary, Fill::special}) {
        std::vector<Spec> specs;
        for (const std::int64_t size : {0, 1, 4, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2500})
          for (const int operand : {kParameter, kGradient, kState})
            specs.emplace_back(rule, dtypes, Shape{size}).misaligned[operand] = random.below(2);
        for (const std::int64_t width : {64, 320, 1024, 1088})
          specs.push_back(rows_of(rule, dtypes, View::of({7, width}), random.below(9), random));
        for (Spec& spec : specs) {
          const bool is_plain = random.below(2);
          if (!is_plain) add_epilogue(spec, random);
          if (is_plain) spec.is_anchored = spec.has_importance = false;
          if (spec.rows) spec.gradient = View::of(spec.gradient.shape);
          spec.is_in_blocks = true;
          spec.fill = fill;
        }
        Problem problem(specs);
        problem.take({{0.25, false}});
        problem.check_sums();
        problem.keep_progress_on_device();
        problem.take({{-3, true, 0.5}});
        problem.take({{1, true}, 2.0, true});
      }
    }
  }
}

// Norms, steps that are left out, counts on the device, and lists that take several launches.
void check_decisions_on_rows() {
  scene() = "decisions on rows";
  Random random(6);
  for (const RuleCase& rule : {kAdam, kRowwise}) {
    for (const bool tracked : {false, true}) {
      std::vector<Spec> specs = some_tables(rule, kSingle, random);
      specs.push_back(rows_of(rule, kDouble, View::of({3000, 3}), 9000, random));
      specs.emplace_back(rule, kSingle, Shape{50, 20});
      for (Spec& spec : specs) spec.rate = tracked ? Rate::workspace : Rate::host;
      Problem problem(specs);
      if (tracked) problem.keep_progress_on_device();
      problem.take({{0.5, false}, 0.1});
      problem.set_rate(0.3);
      for (Spec& spec : specs) spec.lr = 0.3;
      problem.take({{0.5, true}, 0.1, true});
      problem.fill_gradients();
      problem[problem.size() - 2].arrays[kGradient].write_one(8, HUGE_VAL);
      problem.take({{1, true}, {}, true});
      problem.clear_gradients();
    }
  }
}

// A table of which some rows have missed steps.
class TableBehind {
 public:
  explicit TableBehind(Parameter& table)
      : table_(table),
        history_(std::make_shared<rules::RowHistory>(table.spec.parameter.shape[0])),
        loop_{table.rule->loop(table.states()), {}} {}

  // Some of the rows have their share of each of these steps.
  void record(std::int64_t steps, Random& random) {
    for (std::int64_t i = 0; i < steps; ++i) {
      const double lr = 0.01 * static_cast<double>(random.below(4));
      progress_ = table_.rule->advance(progress_);
      history_->record(
          *table_.rule, {lr, progress_},
          table_.rule->coefficients(progress_, table_.on_host.compute, lr, table_.states()));
      for (std::int64_t row = 0; row < history_->rows(); ++row)
        if (random.below(9) == 0) history_->mark(row);
    }
  }

  // Lists all rows that are behind.
  void list() {
    missed_.clear();
    std::vector<std::int64_t> behind = history_->rows_behind(), places(behind.size());
    std::iota(places.begin(), places.end(), 0);
    for (const std::int64_t row : behind)
      missed_.push_back({history_->missed_steps(row), std::ssize(history_->each_missed_step(row))});
    rows_.plan_pairs(std::move(behind), std::move(places));
    rows_.stride = table_.rows.stride;
    rows_.stride[kGradient] = sizeof(cuda::MissedSteps);
    on_host_ = table_.on_host;
    on_device_ = table_.on_device;
    for (Work* work : {&on_host_, &on_device_}) {
      work->rows = &rows_;
      work->history = history_.get();
      work->only_catches_up = true;
      work->rule = &loop_;
    }
  }

  const Work* on_host() const { return &on_host_; }
  cuda::RowsBehind on_device() const { return {&on_device_, missed_}; }
  void mark_all() { history_->mark_all(); }

 private:
  Parameter& table_;
  std::shared_ptr<rules::RowHistory> history_;
  Coefficients loop_;
  Progress progress_{};
  gradients::Rows rows_;
  Work on_host_{}, on_device_{};
  std::vector<cuda::RowsBehind::Missed> missed_;
};

// In closed form, or else step by step; more steps are noted from one time to the next.
void check_rows_that_are_behind(bool quick) {
  scene() = "rows that are behind";
  Random random(8);
  const std::vector<RuleCase> rules = all_rules();
  for (const RuleCase& rule : rules) {
    for (const DTypes& dtypes : quick ? std::vector{kSingle, kHalf, kDouble} : all_dtypes()) {
      std::vector<Spec> specs = some_tables(rule, dtypes, random);
      for (std::size_t i = 0; i < specs.size(); i += 3) specs[i].fill = Fill::special;
      for (std::size_t i = 0; i < specs.size(); i += 2) {
        add_epilogue(specs[i], random);
        specs[i].has_average = false;  // it would have to see each step
      }
      Problem problem(specs);
      std::deque<TableBehind> tables;
      for (std::size_t i = 0; i < problem.size(); ++i) tables.emplace_back(problem[i]);
      for (const std::int64_t steps : {1, 5, 40}) {
        std::vector<const Work*> on_host;
        std::vector<cuda::RowsBehind> on_device;
        for (TableBehind& table : tables) {
          table.record(steps, random);
          table.list();
          on_host.push_back(table.on_host());
          on_device.push_back(table.on_device());
        }
        cpu::update(on_host, {});
        cuda::catch_up(problem.workspace(), 0, on_device);
        problem.check();
        if (steps == 5)
          for (TableBehind& table : tables) table.mark_all();
      }
    }
  }
}

// A graph brings the lists that it was captured with, whatever has been listed since.
void check_captured_rows() {
  scene() = "captured rows";
  Random random(7);
  Problem problem({rows_of(rule_cases()[0], kSingle, View::of({400, 20}), 500, random)});
  const auto step = [&](cuda::Stream stream) {
    problem.take_on_device({}, problem.workspace(), stream);
  };
  check_that(is_refused_in_capture(step), "a list for which there is no room");
  problem.take({});
  const Graph graph(step);
  for (int i = 0; i < 3; ++i) {
    problem.take_on_host({});
    graph.launch();
    problem.check();
    problem.take({});
  }
}

// ---- strided arrays ----------------------------------------------------------------------------

std::vector<std::size_t> shuffled(std::size_t axes, Random& random) {
  std::vector<std::size_t> order(axes);
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = axes; i > 1; --i)
    std::swap(order[i - 1],
              order[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
  return order;
}

// Pairs of views of one shape: the parameter's and the gradient's.
using Views = std::vector<std::pair<View, View>>;

void add_flat_views(Views& views) {
  for (const std::int64_t size : {1, 2, 3, 31, 33, 1023, 1024, 1025, 2049, 5000}) {
    const View dense = View::of({size});
    views.emplace_back(dense, dense.stepped(2));
    views.emplace_back(dense.stepped(2), dense);
    views.emplace_back(dense, dense.reversed(0));
    views.emplace_back(dense.reversed(0), dense);
    views.emplace_back(dense.reversed(0), dense.reversed(0));
    views.emplace_back(dense.stepped(3).reversed(0), dense.stepped(2));
  }
}

void add_flipped_views(Views& views) {
  for (const Shape& shape :
       {Shape{90, 70}, Shape{33, 65}, Shape{2, 1025}, Shape{1025, 2}, Shape{1, 2000},
        Shape{2000, 1}, Shape{5, 4, 3, 2}, Shape{3, 0, 2}, Shape{7, 1, 150}, Shape{64, 32}}) {
    const View dense = View::of(shape), transposed = View::transposed(shape);
    views.emplace_back(dense, transposed);
    views.emplace_back(transposed, dense);
    views.emplace_back(transposed, transposed);
    views.emplace_back(dense, dense.stepped(2));
    views.emplace_back(transposed.stepped(2), dense);
    views.emplace_back(dense, transposed.reversed(0));
    views.emplace_back(dense.reversed(1), transposed.reversed(0));
    views.emplace_back(transposed.reversed(1).reversed(0), dense.stepped(2).reversed(1));
  }
}

// Axes of which hardly any two can be merged.
void add_many_axes(Views& views, std::size_t axes, int arrays) {
  const Shape shape(axes, 2);
  Random random(3);
  for (int i = 0; i < arrays; ++i)
    views.emplace_back(View::in_order(shape, shuffled(axes, random)),
                       View::in_order(shape, shuffled(axes, random)));
}

std::vector<Spec> specs_of(const Views& views, const RuleCase& rule, const DTypes& dtypes) {
  std::vector<Spec> specs;
  for (const auto& [parameter, gradient] : views)
    specs.emplace_back(rule, dtypes, parameter, gradient);
  return specs;
}

// Not to be cleared during a step: that would clear what others of its elements still need.
void check_broadcast_gradients(const RuleCase& rule, const DTypes& dtypes) {
  const View dense = View::of({90, 70}), transposed = View::transposed({90, 70});
  Views views;
  for (const View& parameter : {dense, transposed}) {
    views.emplace_back(parameter, dense.broadcast(0));
    views.emplace_back(parameter, dense.broadcast(1));
    views.emplace_back(parameter, transposed.broadcast(0).broadcast(1));
  }
  Problem problem(specs_of(views, rule, dtypes));
  problem.take({{2, false}});
  problem.take({{2, false}, 0.5, true});
  problem.check_sums();
  problem.clear_gradients();
}

void check_strided(const RuleCase& rule, const DTypes& dtypes) {
  Views views;
  add_flat_views(views);
  add_flipped_views(views);
  views.emplace_back(View::of({}), View::of({}));
  add_many_axes(views, 8, 2);
  std::vector<Spec> specs = specs_of(views, rule, dtypes);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (i % 3 == 0) specs[i].state = View::of(specs[i].parameter.shape);
    if (i % 3 == 1) specs[i].misaligned = {1, 0, 3, 1, 2};
  }
  check_steps(specs);
  check_broadcast_gradients(rule, dtypes);
}

void check_all_strided(bool quick) {
  scene() = "strided";
  check_strided(rule_cases()[0], kHalf);
  check_strided(kAdam, kSingle);
  for (const DTypes& dtypes : quick ? std::vector{kDouble} : all_dtypes())
    check_strided(kAmsgrad, dtypes);
}

// None of which can be merged. As many as a list has room for, and more.
void check_many_axes(bool quick) {
  scene() = "many axes";
  for (const auto& [axes, arrays] : {std::pair{8u, 16u}, {8u, 17u}, {8u, 40u}, {12u, 11u}}) {
    if (quick && arrays != 17) continue;
    const Shape shape(axes, 2);
    std::vector<Spec> specs(arrays, Spec(kAdam, kSingle, View::of(shape), View::transposed(shape)));
    check_steps(specs);
    Problem problem(specs);
    problem.take({{1, true}, 1.0});
  }
}

// ---- long lists --------------------------------------------------------------------------------

// Mostly small arrays, some of none, some of more than one tile.
Shape small_shape(std::size_t i) {
  const auto n = static_cast<std::int64_t>(i);
  if (n % 50 == 13) return {1 + n % 7, 400};
  return {n % 11, 1 + n % 3};
}

using Edit = std::function<void(Spec&, std::size_t)>;

std::vector<Spec> long_list(std::size_t size, const Edit& edit) {
  std::vector<Spec> specs;
  for (std::size_t i = 0; i < size; ++i)
    edit(specs.emplace_back(kAdam, kSingle, small_shape(i)), i);
  return specs;
}

void make_strided(Spec& spec, std::size_t i) {
  spec.gradient = i % 2 ? View::transposed(spec.gradient.shape) : spec.gradient.stepped(2);
}

// Runs of rules, types and layouts that are as short as can be.
void mix(Spec& spec, std::size_t i) {
  spec.rule = &rule_cases()[i % rule_cases().size()];
  spec.dtypes = i % 5 == 1 ? kDouble : i % 5 == 2 ? kHalf : kSingle;
  spec.count = static_cast<std::int64_t>(i % 3);
  spec.gradient_factor = i % 4 == 0 ? -1 : 1;
  if (i % 7 < 3) make_strided(spec, i);
}

void check_lists(bool quick) {
  const std::vector<std::pair<const char*, Edit>> edits = {
      {"a list", [](Spec&, std::size_t) {}},
      {"a strided list", make_strided},
      {"a mixed list", mix},
      {"a list with layouts in turn",
       [](Spec& spec, std::size_t i) {
         if (i % 2) make_strided(spec, i);
       }},
      {"a list with factors in turn",
       [](Spec& spec, std::size_t i) { spec.gradient_factor = i % 2 ? -1 : 1; }},
      {"a list with a count for each",
       [](Spec& spec, std::size_t i) { spec.count = static_cast<std::int64_t>(i); }},
      {"a strided list with a count for each", [](Spec& spec, std::size_t i) {
         spec.count = static_cast<std::int64_t>(i);
         make_strided(spec, i);
       }}};
  for (const auto& [name, edit] : edits) {
    for (const std::size_t size : {31, 32, 33, 439, 440, 441, 900}) {
      if (quick && size != 33 && size != 441) continue;
      scene() = name + (" of " + std::to_string(size));
      check_steps(long_list(size, edit));
    }
  }
}

// As many different coefficients as there is room for beside a list, and one more.
void check_rule_tables() {
  scene() = "rule tables";
  for (const auto& [size, rules] : {std::pair{32u, 8u}, {32u, 9u}, {100u, 48u}, {100u, 49u}}) {
    const auto count = [rules = rules](std::size_t i) {
      return static_cast<std::int64_t>(std::min<std::size_t>(i, rules - 1));
    };
    check_steps(long_list(size, [&](Spec& spec, std::size_t i) { spec.count = count(i); }));
    check_steps(long_list(size, [&](Spec& spec, std::size_t i) {
      spec.count = count(i);
      make_strided(spec, i);
    }));
  }
}

// As many tiles as are summed at once, and more.
void check_group_boundaries(bool quick) {
  scene() = "groups of sums";
  for (const std::size_t size : {1023, 1024, 1025, 2049}) {
    if (quick && size != 1025) continue;
    Problem problem(
        std::vector<Spec>(size, Spec(rule_cases()[0], quick ? kSingle : kDouble, Shape{2})));
    problem.check_sums();
    problem.take({{1, false}, 0.1, true});
  }
}

void check_clearing() {
  scene() = "clearing";
  for (const DTypes& dtypes : {kSingle, kHalf, kDouble}) {
    Views views;
    add_flat_views(views);
    add_flipped_views(views);
    std::vector<Spec> specs = specs_of(views, kAdam, dtypes);
    for (const std::int64_t size : kSizes) specs.emplace_back(kAdam, dtypes, Shape{size});
    for (std::size_t i = 0; i < specs.size(); i += 2) specs[i].misaligned[kGradient] = 1;
    Problem(specs).clear_gradients();
  }
}

// ---- gradients of samples ----------------------------------------------------------------------

// Some samples and their sum, on both sides.
class Sum {
 public:
  // The first axis of the view is that of the samples.
  Sum(const View& values, DType dtype, DType compute, bool has_noise, Random& random)
      : values_(values, dtype, random.below(3)),
        sum_(View::of(Shape(values.shape.begin() + 1, values.shape.end())), compute, 0) {
    values_.fill([&] { return random.number(); });
    std::vector<double> norms;
    for (std::int64_t i = 0; i < values.shape[0]; ++i) {
      samples_.weight.push_back(static_cast<double>(random.below(4)) / 3);
      norms.push_back(1 + random.number());
    }
    samples_.max_norm = 1;
    samples_.noise_multiplier = has_noise ? 0.5 : 0;
    samples_.find_present();
    samples_.plan(norms, 0.5, RandomStream::of(1, 2, 3));

    const auto [shape, strides] = values_.geometry();
    const Geometry one{shape.subspan(1), strides.subspan(1)};
    work_.compute = compute;
    work_.iteration.operand[kParameter] = sum_.on_device();
    work_.iteration.operand[kGradient] = values_.on_device();
    if (is_c_contiguous(one, item_size(dtype)))
      work_.iteration.plan_dense(sum_.size(), 2);
    else
      work_.iteration.plan(std::array{sum_.geometry(), one});
    part_.size = sum_.size();
    part_.samples = &samples_;
    part_.operand[kGradient].view(values_.on_host(), values_.geometry());
  }

  cuda::MadeGradient on_device() const {
    return {&work_, &samples_, values_.geometry().strides[0]};
  }

  void check() {
    cpu::add_up_samples(part_, work_.compute, sum_.on_host().data);
    check_that(sum_.is_same(), "a sum of samples");
    check_that(values_.is_same(), "gradients of samples");
  }

 private:
  Array values_, sum_;
  gradients::Samples samples_;
  Work work_;
  selections::Part part_;
};

// More than a launch takes, of all sizes, types and layouts.
void check_samples(bool quick) {
  scene() = "samples";
  const std::vector<Shape> shapes = {{},     {1},      {3},    {0},      {1023},       {1024},
                                     {1025}, {40, 30}, {4100}, {33, 65}, {5, 4, 3, 2}, {7, 1, 150}};
  Random random(5);
  std::deque<Sum> sums;
  for (const std::int64_t count : quick ? Shape{0, 5} : Shape{0, 1, 3, 4, 5, 8, 11}) {
    for (const Shape& shape : shapes) {
      Shape all{count};
      all.insert(all.end(), shape.begin(), shape.end());
      const View dense = View::of(all);
      for (const View& view :
           {dense, dense, View::in_order(all, shuffled(all.size(), random)), dense.stepped(2),
            dense.reversed(all.size() - 1), dense.broadcast(0)})
        for (const DType compute : {DType::float32, DType::float64})
          sums.emplace_back(view, kAllDTypes[random.below(4)], compute, random.below(2) == 0,
                            random);
    }
  }
  sums.emplace_back(View::of(Shape(64, 1)), DType::float32, DType::float32, true, random);
  std::vector<cuda::MadeGradient> gradients;
  for (const Sum& sum : sums) gradients.push_back(sum.on_device());
  cuda::Workspace workspace(0);
  cuda::make_gradients(workspace, 0, gradients);
  for (Sum& sum : sums) sum.check();
}

// ---- decisions ---------------------------------------------------------------------------------

// Every type and layout, and an array without elements.
std::vector<Spec> varied(const Edit& edit = [](Spec&, std::size_t) {}) {
  std::vector<Spec> specs;
  for (const RuleCase& rule : rule_cases())
    for (const DTypes& dtypes : {kSingle, kDouble, kHalf})
      specs.emplace_back(rule, dtypes, Shape{11, static_cast<std::int64_t>(specs.size() % 9) * 20});
  for (std::size_t i = 0; i < specs.size(); ++i) {
    specs[i].count = static_cast<std::int64_t>(i % 4);
    specs[i].gradient_factor = i % 3 == 0 ? -1 : 1;
    if (i % 4 == 3) make_strided(specs[i], i);
    edit(specs[i], i);
  }
  return specs;
}

const std::vector<Wish>& wishes() {
  static const std::vector<Wish> all = {
      {{1, false}, 1e-3},                           // clips
      {{1, false}, 1e9},                            // does not
      {{1, false}, HUGE_VAL},                       // never does
      {{1, false}, 0.0},                            // clips to nothing
      {{-0.5, false}, 0.25, true},                  // clips by the size of the factor
      {{0, false}, 1.0, true},                      // a norm of 0
      {{1, false}, {}, true},                       // nothing to be found
      {{1, false}, {}, false, 1024.f},              // scaled
      {{3, false}, 0.5, false, 0.125f},             // scaled, then clipped
      {{1, false}, {}, true, -4.f},                 // by a negative number
      {{1, false}, {}, false, {}, 0.f},             // others have found nothing
      {{1, false}, {}, false, {}, 1.f},             // or something
      {{1, false}, 0.5, true, 65536.f, 0.f},        // all at once
      {{1, false}, 0.5, true, 65536.f, 1.f},        // and not counted as skipped
      {{1, false}, {}, true, 2.f, std::nanf("")}};  // NaN is not 0
  return all;
}

void take_all(Problem& problem) {
  for (Wish wish : wishes()) {
    for (const bool clear : {false, true}) {
      wish.options.clear_gradients = clear;
      problem.take(wish);
      problem.fill();
    }
  }
}

void check_decisions(const std::vector<Spec>& specs) {
  for (const bool on_device : {false, true}) {
    Problem problem(specs);
    if (on_device) problem.keep_progress_on_device();
    take_all(problem);
  }
}

// One gradient that is not finite, somewhere.
void check_nonfinite(const std::vector<Spec>& specs, bool quick) {
  scene() = "not finite";
  for (const bool on_device : {false, true}) {
    Problem problem(specs);
    if (on_device) problem.keep_progress_on_device();
    for (std::size_t i = 0; i < problem.size(); i += quick ? 12 : 2) {
      for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
        Array& gradient = problem[i].arrays[kGradient];
        if (gradient.size() == 0) continue;
        gradient.write_one(gradient.size() * 2 / 3, bad);
        problem.take({{1, false}, {}, true});
        problem.take({{1, i % 4 == 0}, 2.0, true, 16.f, 0.f});
        problem.fill();
      }
    }
    problem[1].arrays[kGradient].write_one(0, HUGE_VAL);
    problem.take({{1, true}, 2.0});  // nobody asked to leave it out
  }
}

// Squares of float64 gradients that overflow, though the norm is finite.
void check_overflow() {
  scene() = "overflow";
  const auto make_huge = [](Spec& spec, std::size_t) {
    if (spec.dtypes.gradient == DType::float64) spec.fill = Fill::huge;
  };
  CHECK(cpu::gradient_norm(Problem(varied(make_huge)).on_host()).finite);
  check_decisions(varied(make_huge));
  // In float32 they are infinite.
  Spec narrow(kAdam, {DType::float32, DType::float64, DType::float32}, Shape{5000});
  narrow.fill = Fill::huge;
  check_decisions({narrow});
}

void check_all_decisions(bool quick) {
  scene() = "decisions";
  check_decisions(varied());
  check_decisions({});
  check_decisions(std::vector<Spec>(3, Spec(kAdam, kSingle, Shape{0})));
  check_decisions({Spec(kAdam, kSingle, Shape{1})});
  if (!quick) check_decisions(std::vector<Spec>(1100, Spec(kAdam, kDouble, Shape{3})));
  check_nonfinite(varied(), quick);
  check_overflow();
}

// ---- progress on the device --------------------------------------------------------------------

void check_progress_memory() {
  scene() = "progress memory";
  for (const std::size_t size : {0, 1, 127, 128, 129, 300, 1000}) {
    cuda::Workspace workspace(0);
    std::vector<Progress> written(size), found(size);
    for (std::size_t i = 0; i < size; ++i)
      written[i] = {static_cast<std::int64_t>(i) << 33, 1.0 / static_cast<double>(i + 1)};
    write_progress(workspace, 0, written, {5, std::int64_t{1} << 40});
    const Counters counters = read_progress(workspace, 0, found);
    CHECK(found == written);
    CHECK(counters.steps == 5 && counters.skipped_steps == std::int64_t{1} << 40);
  }
}

constexpr std::int64_t kCounts[] = {
    0, 1, 2, 9, 100, 9'999, (1 << 24) - 2, (1 << 24) + 1, 3'000'000'000};

// Every rule in every type at every count, and with every kind of copy.
std::vector<Spec> everything() {
  std::vector<Spec> specs;
  for (const RuleCase& rule : rule_cases())
    for (const DTypes& dtypes : {kSingle, kDouble})
      for (const std::int64_t count : kCounts)
        for (const Copies copies : {Copies::none, Copies::in_single, Copies::in_double}) {
          Spec& spec = specs.emplace_back(rule, dtypes, Shape{3});
          spec.count = count;
          spec.copies = copies;
          spec.rate = static_cast<Rate>(specs.size() % 3);
        }
  return specs;
}

// Sometimes left out, sometimes with gradients that are cleared.
Wish wish_of_step(int step) {
  Wish wish;
  if (step % 4 == 1) wish.loss_scale = 8.f;
  if (step % 5 == 2) wish.found_inf = step % 10 == 2 ? 1.f : 0.f;
  if (step % 7 == 3) wish.max_norm = 0.5;
  wish.options = {step % 3 == 0 ? -0.5 : 1.0, step % 6 == 1};
  return wish;
}

// What others write to the copies: counts, and what is none.
void write_to_copies(Problem& problem, int step) {
  const double told[] = {0, 3, 7.75, -1, std::nan(""), 1e17, 1 << 20, HUGE_VAL, 0x1p53};
  for (std::size_t i = static_cast<std::size_t>(step) % 5; i < problem.size(); i += 5) {
    Parameter& one = problem[i];
    if (one.step_copy) one.write_step(told[(i / 5 + static_cast<std::size_t>(step)) % 9]);
    if (one.product_copy && i % 2) one.product_copy->write(0.3);
  }
}

void check_many_steps(bool quick) {
  scene() = "many steps";
  Problem problem(everything());
  problem.keep_progress_on_device();
  for (int step = 0; step < (quick ? 12 : 60); ++step) {
    if (step % 4 == 0) problem.set_rate(0.1 / (step + 1));
    if (step % 11 == 5) write_to_copies(problem, step);
    problem.take(wish_of_step(step));
    problem.fill_gradients();
  }
}

// Few parameters in many groups, many in few, and many in many, in runs and in turn.
void check_groups(bool quick) {
  for (const std::size_t size : {1, 4, 5, 31, 32, 33, 320, 321, 700}) {
    for (const std::size_t groups : {1, 4, 5, 32, 33, 40}) {
      if (quick && (size != 33 && size != 321)) continue;
      for (const bool in_turn : {false, true}) {
        scene() = std::to_string(size) + " parameters in " + std::to_string(groups) + " groups";
        Problem problem(long_list(size, [&](Spec& spec, std::size_t i) {
          const std::size_t group = in_turn ? i % groups : i * groups / size;
          spec.rule = &rule_cases()[group % rule_cases().size()];
          spec.lr = 0.5 / static_cast<double>(group + 1);
          spec.dtypes = i % 3 ? kSingle : kDouble;
          spec.count = static_cast<std::int64_t>(i % 50);
          spec.gradient_factor = i % 2 ? -1 : 1;
          if (i % 9 == 0) make_strided(spec, i);
        }));
        problem.keep_progress_on_device();
        problem.take({{0.5, false}});
        problem.take({{2, true}, 0.25, true});
      }
    }
  }
}

// ---- captured graphs ---------------------------------------------------------------------------

// A graph goes on counting, and follows rates and gradients that change between its launches.
void check_graph() {
  scene() = "graph";
  Problem problem(varied([](Spec& spec, std::size_t i) {
    spec.rate = static_cast<Rate>(i % 3);
    spec.copies = static_cast<Copies>(i % 2 + i % 3 / 2);
  }));
  problem.keep_progress_on_device();
  Wish wish{{0.5, true}, 0.75, true, 32.f, 0.f};
  problem.take(wish);  // there is memory afterwards
  const Graph graph(
      [&](cuda::Stream stream) { problem.take_on_device(wish, problem.workspace(), stream); });
  for (int step = 0; step < 8; ++step) {
    problem.fill_gradients();
    if (step == 5) problem[0].arrays[kGradient].write_one(0, std::nan(""));
    problem.set_rate(0.1 / (step + 1));
    wish.loss_scale = 16.f + static_cast<float>(step);
    wish.found_inf = step == 3 ? 1.f : 0.f;
    problem.write_inputs(wish);
    problem.take_on_host(wish);
    graph.launch();
    problem.check();
  }
}

// A step that needs more memory than there is, while a graph is captured, and changes nothing.
void check_refusal(Problem& problem, const Wish& wish, cuda::Workspace& workspace) {
  problem.write_inputs(wish);
  problem.check();
  CHECK(is_refused_in_capture(
      [&](cuda::Stream stream) { problem.take_on_device(wish, workspace, stream); }));
  problem.check();
}

void check_refusals_of_steps() {
  const Wish clips{{1, true}, 1.0};
  for (const DTypes& dtypes : {kSingle, kDouble}) {
    for (const bool on_device : {false, true}) {
      Problem small({Spec(kAdam, kSingle, Shape{1})});
      Problem large({4, Spec(kAdam, dtypes, Shape{40 * kTileSize})});
      large.take({{1, false}});
      if (on_device) {
        small.keep_progress_on_device();
        large.keep_progress_on_device();
        check_refusal(large, {{1, true}}, small.workspace());
      }
      cuda::Workspace fresh(0);
      check_refusal(large, clips, fresh);
      check_refusal(large, clips, large.workspace());
      small.take(clips);
      check_refusal(large, clips, small.workspace());
      small.take(clips);
    }
  }
}

// There is memory for the sums, but none for those that are prescaled.
void check_refusal_of_prescaled_sums() {
  Problem problem({Spec(kAdam, kDouble, Shape{100})});
  problem.check_sums();
  check_refusal(problem, {{1, true}, 1.0}, problem.workspace());
}

void check_other_refusals() {
  Problem problem({Spec(kAdam, kSingle, Shape{40 * kTileSize})});
  cuda::Workspace fresh(0);
  std::vector<Progress> progress(100);
  CHECK(is_refused_in_capture([&](cuda::Stream s) { write_progress(fresh, s, {}, {1, 2}); }));
  CHECK(is_refused_in_capture([&](cuda::Stream s) { read_progress(fresh, s, {}); }));
  CHECK(is_refused_in_capture([&](cuda::Stream s) { write_rate(fresh, s, 1); }));
  CHECK(is_refused_in_capture([&](cuda::Stream s) { rate(fresh, s); }));
  CHECK(is_refused_in_capture(
      [&](cuda::Stream s) { tile_sums(problem.workspace(), s, problem.on_device(), 1); }));
  CHECK(is_refused_in_capture(
      [&](cuda::Stream s) { write_progress(problem.workspace(), s, progress, {1, 2}); }));
  problem.check();
}

void check_captures() {
  check_graph();
  scene() = "refusals";
  check_refusals_of_steps();
  check_refusal_of_prescaled_sums();
  check_other_refusals();
}

// ---- anything ----------------------------------------------------------------------------------

View random_view(const Shape& shape, Random& random) {
  View view =
      random.below(2) ? View::of(shape) : View::in_order(shape, shuffled(shape.size(), random));
  view = view.stepped(random.below(3) ? 1 : 2);
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (random.below(6) == 0) view = view.reversed(axis);
  return view;
}

Spec random_spec(Random& random) {
  Shape shape(static_cast<std::size_t>(random.below(5)));
  for (std::int64_t& extent : shape) extent = random.below(random.below(8) ? 6 : 60);
  const auto dtype = [&] { return kAllDTypes[random.below(kDTypes)]; };
  const DType state = random.below(2) ? DType::float32 : DType::float64;
  const auto& rule = rule_cases()[static_cast<std::size_t>(random.below(std::ssize(rule_cases())))];
  Spec spec(rule, {dtype(), dtype(), state}, shape);
  if (random.below(2)) {
    spec.parameter = random_view(shape, random);
    spec.gradient = random_view(shape, random);
    spec.state = random.below(2) ? spec.parameter : random_view(shape, random);
  }
  for (std::int64_t& elements : spec.misaligned) elements = random.below(3) ? 0 : random.below(9);
  if (random.below(30) == 0) spec.fill = Fill::special;
  spec.count = random.below(3);
  spec.gradient_factor = random.below(2) ? -1 : 1;
  spec.lr = 0.125 * static_cast<double>(1 + random.below(3));
  spec.rate = static_cast<Rate>(random.below(3));
  spec.copies = static_cast<Copies>(random.below(3));
  if (random.below(3) == 0) add_epilogue(spec, random);
  return spec;
}

Wish random_wish(Random& random) {
  Wish wish;
  wish.options = {random.number(), random.below(2) == 0};
  if (random.below(2)) wish.options.gradient_bound = std::fabs(random.number());
  if (random.below(2)) wish.max_norm = std::fabs(random.number()) * 10;
  wish.skip_nonfinite = random.below(2);
  if (random.below(2)) wish.loss_scale = static_cast<float>(1 << random.below(16));
  if (random.below(2)) wish.found_inf = static_cast<float>(random.below(4) == 0);
  return wish;
}

void check_anything(int problems) {
  for (int seed = 0; seed < problems; ++seed) {
    scene() = "seed " + std::to_string(seed);
    Random random(static_cast<std::uint64_t>(seed));
    std::vector<Spec> specs;
    for (std::int64_t n = random.below(random.below(3) ? 40 : 300); n > 0; --n)
      specs.push_back(random_spec(random));
    const bool on_device = random.below(2);
    for (Spec& spec : specs)
      if (!on_device) spec.copies = Copies::none;
    Problem problem(specs, static_cast<std::uint64_t>(seed) + 1);
    if (on_device) problem.keep_progress_on_device();
    for (int step = 0; step < 3; ++step) {
      problem.check_sums();
      problem.take(random.below(4) ? random_wish(random) : Wish{{0.5, random.below(2) == 0}});
      problem.fill_gradients();
    }
  }
}

// ---- the CPU's checksums -----------------------------------------------------------------------

constexpr int kSteps = 1000;
constexpr std::int64_t kElements = 1000;

GradientNorm norm_on_device(cuda::Workspace& workspace, WorkList list) {
  std::vector<double> sums = cuda::tile_sums(workspace, 0, list, 1);
  return norm_of(sum_in_groups(sums.data(), std::ssize(sums)));
}

// As in test_checksums.cpp, number for number.
std::uint64_t checksum(const RuleCase& rule_case, DType dtype) {
  const auto rule = rule_case.make();
  const DTypes dtypes = all_of(dtype);
  const View view = View::of({kElements});
  Random random(11);
  const auto next_number = [&] { return random.number(); };
  std::deque<Array> arrays;
  arrays.emplace_back(view, dtypes.parameter, 0).fill(next_number);
  arrays.emplace_back(view, dtypes.gradient, 0);
  for (std::size_t s = 0; s < rule->state_names().size(); ++s)
    arrays.emplace_back(view, dtypes.state, 0).fill([&] { return rule->initial_state(); });

  Work work{};
  work.compute = dtypes.state;
  for (std::size_t i = 0; i < arrays.size(); ++i) work.iteration.operand[i] = arrays[i].on_device();
  work.iteration.plan_dense(kElements, static_cast<int>(arrays.size()));
  count_operands(work, arrays.size() - kState);

  const Work* one = &work;
  cuda::Workspace workspace(0);
  Progress progress;
  for (int step = 0; step < kSteps; ++step) {
    arrays[kGradient].fill(next_number);
    const GradientNorm norm = norm_on_device(workspace, {&one, 1});
    progress = rule->advance(progress);
    const auto coefficients =
        rule->coefficients(progress, work.compute, 1e-2, arrays.size() - kState);
    work.rule = &coefficients;
    cuda::Step taken{};
    taken.workspace = &workspace;
    taken.list = {&one, 1};
    taken.options.gradient_factor = 10 / norm.value;
    cuda::take(taken);
  }
  std::uint64_t h = hash("", 0);
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const std::vector<std::byte> bytes = arrays[i].from_device();
    if (i != kGradient) h = hash(bytes.data(), bytes.size(), h);
  }
  return hash(&progress.momentum_product, sizeof progress.momentum_product, h);
}

void check_checksums(const char* path) {
  std::ifstream file(path);
  CHECK(file);
  std::string expected;
  for (const RuleCase& rule : rule_cases()) {
    for (const DType dtype : kAllDTypes) {
      std::ostringstream line;
      line << rule.name;
      for (const auto& [option, value] : rule.options) line << ' ' << option << '=' << value;
      line << ' ' << name_of(dtype) << ' ' << std::hex << checksum(rule, dtype);
      CHECK(std::getline(file, expected));
      if (line.str() != expected)
        std::fprintf(stderr, "%s\n%s\n", expected.c_str(), line.str().c_str());
      CHECK(line.str() == expected);
    }
  }
  CHECK(!std::getline(file, expected));
}

void run(bool quick) {
  check_rules(quick);
  check_alignment(quick);
  check_special_numbers(quick);
  check_anchors(quick);
  check_rows(quick);
  check_epilogues(quick);
  check_blocks(quick);
  check_decisions_on_rows();
  check_rows_that_are_behind(quick);
  check_captured_rows();
  if (!quick) check_large();
  check_all_strided(quick);
  check_many_axes(quick);
  check_lists(quick);
  check_rule_tables();
  check_group_boundaries(quick);
  check_clearing();
  check_samples(quick);
  check_all_decisions(quick);
  check_progress_memory();
  check_many_steps(quick);
  check_groups(quick);
  check_captures();
  check_anything(quick ? 30 : 300);
}

}  // namespace
}  // namespace fusestep::testing

// `test_cuda quick` is for sanitizers that slow everything down; with the name of a file, the test
// compares checksums with it as well. 77 tells ctest that there is nothing to run this on.
int main(int argc, char** argv) {
  using namespace fusestep;
  try {
    cuda::check_available();
  } catch (const cuda::Error& error) {
    std::printf("cuda: skipped: %s\n", error.what());
    return 77;
  }
  const bool quick = argc > 1 && std::string_view(argv[1]) == "quick";
  testing::run(quick);
  if (argc > 1 && !quick) testing::check_checksums(argv[1]);
  std::puts("cuda: passed");
}
