// Which thread works on which chunk, and when.
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
// Where a job is of rows that have betas of their own, one thread does both halves of a row at
// once, and each takes a part of the rows.
// A chunk's sums, and the order in which a segment's chunks are added, depend on
// nothing but the segment's size, so neither do the bits of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "library.h"
#include "threads.h"

namespace am::cpu {

// Job: a segment of a step, or rows of which each is one, with
//   int64_t numel;
//   int64_t rows, row_numel;          rows: kNoRows for a segment
//   bool counts;                      whether one of its rows has counted the step
//   Sums sums;                        what a segment's chunks' sums add up to
//   Sums begin_chunk(int64_t begin, int64_t numel) const;
//   void set_beta();                  from sums
//   bool is_done() const;             whether nothing is left for the second half
//   void finish_chunk(int64_t begin, int64_t numel) const;
//   Sums* row_sums;                   of its rows
//   Sums begin_row(int64_t row) const;
//   bool finish_row(int64_t row, const Sums&) const;       whether it counts the step
//   bool step_rows(int64_t first, int64_t rows) const;     both; whether one of them does
template <class Job>
class Schedule {
 public:
  Schedule(const Threads& threads, std::vector<Job*> jobs)
      : threads_(threads), jobs_(std::move(jobs)) {}

  // The two sides of the seam.
  void begin() { begin_wave(jobs_); }
  void finish() { finish_wave(jobs_); }

  // Both at once, where no segment's beta waits for another's sums.
  void step() {
    std::vector<Job*> small, wave;
    int64_t wave_numel = 0, total = 0;
    for (const Job* job : jobs_) total += job->numel;
    const int64_t largest_small = std::min(kSmall, std::max(kMinCost, total / threads_.count));
    for (Job* job : jobs_) {
      if (job->rows != kNoRows || job->numel <= largest_small) {
        small.push_back(job);
        continue;
      }
      if (wave_numel + job->numel > kWave) {
        step_wave(wave);
        wave.clear();
        wave_numel = 0;
      }
      wave.push_back(job);
      wave_numel += job->numel;
    }
    step_wave(wave);
    step_small(small);
  }

 private:
  static constexpr int64_t kSmall = 1 << 15;
  static constexpr int64_t kWave = 1 << 18;
  // What a tensor, and a row, costs beside its elements, in elements.
  static constexpr int64_t kTensorCost = 256;
  static constexpr int64_t kRowCost = 64;
  // Elements of the rows that are handed out together, or a single row.
  static constexpr int64_t kRun = 1 << 12;
  // Less than this is not worth waking a thread for.
  static constexpr int64_t kMinCost = 8192;

  // Elements of a segment, or rows.
  struct Item {
    Job* job;
    int64_t begin, numel;
    Sums sums;
    bool counts;
  };

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
    const int64_t parts = std::max<int64_t>(1, std::min(threads_.count, total / kMinCost));
    const auto boundary = [&](int64_t part) -> int64_t {
      if (part == parts) return static_cast<int64_t>(middles.size());
      return std::lower_bound(middles.begin(), middles.end(), total * part / parts) -
             middles.begin();
    };
    parallel_for(threads_, parts, [&](int64_t part) { f(boundary(part), boundary(part + 1)); });
  }

  // A partial sum covers this many elements. A chunk costs some 40 ns beside its elements, and
  // too few of them leave threads without work.
  static int64_t chunk_numel(const Job& job) { return job.numel <= 1 << 16 ? 1 << 12 : 1 << 14; }

  static std::vector<Item> chunks(const std::vector<Job*>& jobs) {
    std::vector<Item> items;
    for (Job* job : jobs) {
      const bool of_rows = job->rows != kNoRows;
      const int64_t chunk = of_rows ? rows_of_run(*job) : chunk_numel(*job);
      const int64_t size = of_rows ? job->rows : job->numel;
      for (int64_t begin = 0; begin < size; begin += chunk)
        items.push_back({job, begin, std::min(chunk, size - begin), {0.0, 0.0}, false});
    }
    return items;
  }

  static int64_t rows_of_run(const Job& job) {
    return std::max<int64_t>(1, kRun / std::max<int64_t>(1, job.row_numel));
  }

  static std::vector<int64_t> costs(const std::vector<Item>& items) {
    std::vector<int64_t> result;
    result.reserve(items.size());
    for (const Item& item : items) {
      const bool of_rows = item.job->rows != kNoRows;
      const int64_t numel = of_rows ? item.numel * (item.job->row_numel + kRowCost) : item.numel;
      result.push_back(numel + kTensorCost);
    }
    return result;
  }

  void begin_wave(const std::vector<Job*>& jobs) {
    std::vector<Item> items = chunks(jobs);
    split(costs(items), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Item& item = items[i];
        if (item.job->rows != kNoRows) {
          for (int64_t row = item.begin; row < item.begin + item.numel; ++row)
            item.job->row_sums[row] = item.job->begin_row(row);
        } else {
          item.sums = item.job->begin_chunk(item.begin, item.numel);
        }
      }
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
      if (job->rows == kNoRows) {
        job->set_beta();
        if (job->is_done()) continue;
      }
      unfinished.push_back(job);
    }
    std::vector<Item> items = chunks(unfinished);
    if (items.empty()) return;
    split(costs(items), [&](int64_t first, int64_t last) {
      for (int64_t i = last - 1; i >= first; --i) {
        Item& item = items[i];
        if (item.job->rows != kNoRows) {
          for (int64_t row = item.begin; row < item.begin + item.numel; ++row)
            item.counts |= item.job->finish_row(row, item.job->row_sums[row]);
        } else {
          item.job->finish_chunk(item.begin, item.numel);
        }
      }
    });
    take_counts(items);
  }

  static void take_counts(const std::vector<Item>& items) {
    for (const Item& item : items) item.job->counts = item.job->counts || item.counts;
  }

  void step_wave(const std::vector<Job*>& jobs) {
    if (jobs.empty()) return;
    begin_wave(jobs);
    finish_wave(jobs);
  }

  // One after the other: whole segments, and runs of rows.
  void step_small(const std::vector<Job*>& jobs) {
    std::vector<Item> items;
    for (Job* job : jobs) {
      if (job->rows == kNoRows) {
        items.push_back({job, 0, job->numel, {0.0, 0.0}, false});
        continue;
      }
      const int64_t run = rows_of_run(*job);
      for (int64_t first = 0; first < job->rows; first += run)
        items.push_back({job, first, std::min(run, job->rows - first), {0.0, 0.0}, false});
    }
    if (items.empty()) return;
    split(costs(items), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last;) {
        Item& item = items[i++];
        if (item.job->rows == kNoRows) {
          step_one(*item.job);
          continue;
        }
        int64_t rows = item.numel;  // of this run, and of those behind it
        for (; i < last && items[i].job == item.job; ++i) rows += items[i].numel;
        item.counts = item.job->step_rows(item.begin, rows);
      }
    });
    take_counts(items);
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

  const Threads& threads_;
  std::vector<Job*> jobs_;
};

}  // namespace am::cpu
