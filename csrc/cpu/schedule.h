// Which thread works on which chunk, and when. Free of torch: the caller hands in
// parallel_for(parts, f), which calls f(0) ... f(parts - 1), each once, on any
// number of threads.
//
// A step has two halves: what takes the sums, and what waits for beta. Where the second
// has to read a tensor once more, it is as fast as it is served from cache. Hence three
// sizes of tensor:
//   small   one thread does both halves at once, if that is no more than its share of
//           the step;
//   medium  waves of tensors that fit in the caches together: all threads begin the
//           wave, then all finish it, each thread its own chunks again;
//   large   a wave of its own; the second half walks backwards, so that it starts with
//           what the first has just read.
// A chunk's sums, and the order in which a tensor's chunks are added, depend on
// nothing but the tensor's size, so neither do the bits of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace am::cpu {

// Job: one tensor of a step, with
//   int64_t numel;
//   Sums sums;                        what its chunks' sums add up to
//   Sums begin_chunk(int64_t begin, int64_t numel) const;
//   void set_beta();                  from sums
//   bool is_done() const;             whether nothing is left for the second half
//   void finish_chunk(int64_t begin, int64_t numel) const;
template <class Job, class ParallelFor>
class Schedule {
 public:
  Schedule(std::vector<Job>& jobs, int64_t threads, ParallelFor parallel_for)
      : jobs_(jobs), threads_(threads), parallel_for_(parallel_for) {}

  // The two sides of the seam.
  void begin() { begin_wave(all()); }
  void finish() { finish_wave(all()); }

  // Both at once, where no tensor's beta waits for another's sums.
  void step() {
    std::vector<Job*> small, wave;
    int64_t wave_numel = 0, total = 0;
    for (const Job& job : jobs_) total += job.numel;
    const int64_t largest_small = std::min(kSmall, std::max(kMinCost, total / threads_));
    for (Job& job : jobs_) {
      if (job.numel <= largest_small) {
        small.push_back(&job);
        continue;
      }
      if (wave_numel + job.numel > kWave) {
        step_wave(wave);
        wave.clear();
        wave_numel = 0;
      }
      wave.push_back(&job);
      wave_numel += job.numel;
    }
    step_wave(wave);
    step_small(small);
  }

 private:
  static constexpr int64_t kSmall = 1 << 15;
  static constexpr int64_t kWave = 1 << 18;
  // What a tensor costs beside its elements, in elements.
  static constexpr int64_t kTensorCost = 256;
  // Less than this is not worth waking a thread for.
  static constexpr int64_t kMinCost = 8192;

  struct Item {
    Job* job;
    int64_t begin, numel;
    Sums sums;
  };

  std::vector<Job*> all() {
    std::vector<Job*> jobs;
    jobs.reserve(jobs_.size());
    for (Job& job : jobs_) jobs.push_back(&job);
    return jobs;
  }

  // Splits items into runs of about equal cost, one a thread, and calls f(first, last) for
  // each. An item goes where its middle lies.
  template <class F>
  void split(const std::vector<int64_t>& costs, F f) {
    std::vector<int64_t> middles(costs.size());
    int64_t total = 0;
    for (size_t i = 0; i < costs.size(); ++i) {
      middles[i] = total + costs[i] / 2;
      total += costs[i];
    }
    const int64_t parts = std::max<int64_t>(1, std::min(threads_, total / kMinCost));
    const auto boundary = [&](int64_t part) -> int64_t {
      if (part == parts) return static_cast<int64_t>(middles.size());
      return std::lower_bound(middles.begin(), middles.end(), total * part / parts) -
             middles.begin();
    };
    parallel_for_(parts, [&](int64_t part) { f(boundary(part), boundary(part + 1)); });
  }

  // A partial sum covers this many elements. A chunk costs some 40 ns beside its elements, and
  // too few of them leave threads without work.
  static int64_t chunk_numel(const Job& job) { return job.numel <= 1 << 16 ? 1 << 12 : 1 << 14; }

  static std::vector<Item> chunks(const std::vector<Job*>& jobs) {
    std::vector<Item> items;
    for (Job* job : jobs) {
      const int64_t chunk = chunk_numel(*job);
      for (int64_t begin = 0; begin < job->numel; begin += chunk)
        items.push_back({job, begin, std::min(chunk, job->numel - begin), {0.0, 0.0}});
    }
    return items;
  }

  static std::vector<int64_t> costs(const std::vector<Item>& items) {
    std::vector<int64_t> result;
    result.reserve(items.size());
    for (const Item& item : items) result.push_back(item.numel + kTensorCost);
    return result;
  }

  void begin_wave(const std::vector<Job*>& jobs) {
    std::vector<Item> items = chunks(jobs);
    split(costs(items), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        items[i].sums = items[i].job->begin_chunk(items[i].begin, items[i].numel);
    });
    for (Job* job : jobs) job->sums = {0.0, 0.0};
    for (const Item& item : items) {
      item.job->sums.num += item.sums.num;
      item.job->sums.den += item.sums.den;
    }
  }

  void finish_wave(const std::vector<Job*>& jobs) {
    std::vector<Job*> unfinished;
    for (Job* job : jobs) {
      job->set_beta();
      if (!job->is_done()) unfinished.push_back(job);
    }
    const std::vector<Item> items = chunks(unfinished);
    if (items.empty()) return;
    split(costs(items), [&](int64_t first, int64_t last) {
      for (int64_t i = last - 1; i >= first; --i)
        items[i].job->finish_chunk(items[i].begin, items[i].numel);
    });
  }

  void step_wave(const std::vector<Job*>& jobs) {
    if (jobs.empty()) return;
    begin_wave(jobs);
    finish_wave(jobs);
  }

  void step_small(const std::vector<Job*>& jobs) {
    if (jobs.empty()) return;
    std::vector<int64_t> costs;
    costs.reserve(jobs.size());
    for (const Job* job : jobs) costs.push_back(job->numel + kTensorCost);
    split(costs, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) step_one(*jobs[i]);
    });
  }

  static void step_one(Job& job) {
    const int64_t chunk = chunk_numel(job);
    job.sums = {0.0, 0.0};
    for (int64_t begin = 0; begin < job.numel; begin += chunk) {
      const Sums part = job.begin_chunk(begin, std::min(chunk, job.numel - begin));
      job.sums.num += part.num;
      job.sums.den += part.den;
    }
    job.set_beta();
    if (job.is_done()) return;
    for (int64_t begin = (job.numel - 1) / chunk * chunk; begin >= 0; begin -= chunk)
      job.finish_chunk(begin, std::min(chunk, job.numel - begin));
  }

  std::vector<Job>& jobs_;
  int64_t threads_;
  ParallelFor parallel_for_;
};

}  // namespace am::cpu
