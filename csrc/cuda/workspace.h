// The memory that the steps of one optimizer need on one GPU, besides the arrays themselves.
//
// It is never moved and never given back while the workspace lives: a captured CUDA graph goes on
// using the addresses that it has met.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "cuda/arguments.h"
#include "cuda/runtime.h"
#include "rules/row_history.h"
#include "rules/rule.h"

namespace fusestep::cuda {

class Workspace {
  struct Buffer {
    void* memory = nullptr;
    std::size_t bytes = 0;
  };

 public:
  explicit Workspace(int device);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  int device() const { return device_; }

  // What there is one of.
  struct Record {
    Counters counters;
    Decision decision;
    double lr;
  };
  Record* record(Stream stream);

  // So many of each; their content is lost where there was less room before.
  double* sums(std::size_t count, Stream stream) { return reserve<double>(sums_, count, stream); }
  double* prescaled_sums(std::size_t count, Stream stream) {
    return reserve<double>(prescaled_sums_, count, stream);
  }
  AnyRuleEntry* table(std::size_t count, Stream stream) {
    return reserve<AnyRuleEntry>(table_, count, stream);
  }
  std::int64_t* row_lists(std::size_t count, Stream stream) {
    return reserve<std::int64_t>(row_lists_, count, stream);
  }
  WeighedSample* weighed_samples(std::size_t count, Stream stream) {
    return reserve<WeighedSample>(weighed_samples_, count, stream);
  }
  std::byte* gradients(std::size_t bytes, Stream stream) {
    return reserve<std::byte>(gradients_, bytes, stream);
  }
  std::byte* scratch(std::size_t bytes, Stream stream) {
    return reserve<std::byte>(scratch_, bytes, stream);
  }
  rules::Progress* progress(std::size_t count, Stream stream) {
    return reserve<rules::Progress>(progress_, count, stream);
  }

  std::byte* missed_steps(std::size_t bytes, Stream stream) {
    return reserve<std::byte>(missed_steps_, bytes, stream);
  }

  // The steps that rows of a table may have missed: room for all of them, of which the first
  // `count` are there.
  class StepTable {
   public:
    AnyRuleEntry* entries() const { return static_cast<AnyRuleEntry*>(buffer_.memory); }
    std::size_t count = 0;

   private:
    friend Workspace;
    std::weak_ptr<const rules::RowHistory> history_;
    std::int64_t series_ = 0;
    Buffer buffer_;
  };
  StepTable& step_table(const rules::RowHistory& history, Stream stream);

 private:
  template <class T>
  T* reserve(Buffer& buffer, std::size_t count, Stream stream) {
    return static_cast<T*>(reserve_bytes(buffer, count * sizeof(T), stream));
  }
  void* reserve_bytes(Buffer& buffer, std::size_t bytes, Stream stream);

  int device_;
  Buffer sums_, prescaled_sums_, table_, progress_, record_, row_lists_, scratch_, missed_steps_,
      weighed_samples_, gradients_;
  std::deque<StepTable> step_tables_;
  std::vector<void*> all_;
};

}  // namespace fusestep::cuda
