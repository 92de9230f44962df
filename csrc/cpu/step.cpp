// A step's jobs, from the tables that library.h describes, through the schedule; and the scalars
// that are written behind it.
#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"
#include "library.h"
#include "schedule.h"
#include "threads.h"

namespace am::cpu {
namespace {

constexpr int64_t kMemoryBytes[kNumDTypes] = {4, 8, 4, 4};

Column scalar_of(const StepTensor& t, Scalar scalar) {
  return {t.scalars[scalar], (t.doubles >> scalar & 1) != 0};
}

LowTensor low_tensor(const StepTensor& t, double step) {
  const PackedTensor& packed = *t.packed;
  LowTensor low{};
  low.dtype = static_cast<DType>(t.dtype);
  low.param = t.param;
  low.grad = t.grad;
  for (size_t k = 0; k < 2; ++k)
    low.memories[k] = {t.memories[k], static_cast<Format>(packed.formats[k]), packed.scales[k],
                       packed.blocks[k]};
  low.remainder = packed.remainder;
  low.rounds = packed.rounds != 0 && low.dtype == kBFloat16;
  low.may_guess = t.rows == kNoRows && low.param != low.grad &&
                  (low.dtype == kFloat32 || low.is_param_staged());
  low.offset = packed.offset;
  low.stretch = packed.stretch;
  low.skip = packed.skip;
  low.keys = step_keys(packed.key, step);
  return low;
}

// Where a tensor's elements are: of the whole of it, or from an element on.
template <size_t kMemories>
struct Views {
  DType dtype = kFloat32;
  char* param = nullptr;
  char* grad = nullptr;
  char* memories[kMemories] = {};
  // In the place of these where something is stored in few bits, and the view's first element.
  const LowTensor* low = nullptr;
  int64_t first = 0;

  void open(const StepTensor& t, const LowTensor* low_tensor) {
    dtype = static_cast<DType>(t.dtype);
    low = low_tensor;
    param = static_cast<char*>(t.param);
    grad = static_cast<char*>(const_cast<void*>(t.grad));
    for (size_t k = 0; k < kMemories; ++k) memories[k] = static_cast<char*>(t.memories[k]);
  }

  // From an element on.
  Views from(int64_t begin) const {
    Views views = *this;
    views.first += begin;
    if (low != nullptr) return views;
    views.param = param_at(begin);
    views.grad = grad_at(begin);
    for (size_t k = 0; k < kMemories; ++k) views.memories[k] = memory_at(k, begin);
    return views;
  }

  LowChunk low_chunk(int64_t begin, int64_t n) const { return {low, first + begin, n}; }
  // A chunk's pointers. The sums only read through them.
  char* param_at(int64_t begin) const { return param + begin * bytes_of(dtype); }
  char* grad_at(int64_t begin) const { return grad + begin * bytes_of(dtype); }
  char* memory_at(size_t k, int64_t begin) const {
    return memories[k] + begin * kMemoryBytes[dtype];
  }
};

// ---- hyperparameters --------------------------------------------------------------

// The columns of hypers, a row for each group.
constexpr size_t kAdamWColumns = 9, kSGDColumns = 7;

AdamWHyper adamw_hyper(const double* h, double lr) {
  return {lr, h[0], h[1], h[2], h[3], h[4], h[5] != 0.0, h[6] != 0.0, h[7] != 0.0};
}

SGDHyper sgd_hyper(const double* h, double lr) {
  return {lr, h[0], h[1], h[2], h[3] != 0.0, h[4] != 0.0, h[5] != 0.0};
}

// Each tensor's group.
std::vector<int64_t> group_of_tensors(const Step& step) {
  std::vector<int64_t> group_of;
  group_of.reserve(step.size);
  for (int64_t group = 0; group < step.groups; ++group)
    group_of.insert(group_of.end(), step.group_sizes[group], group);
  return group_of;
}

// ---- jobs: a segment of a step, or rows of which each is one --------------------------

// Packs that begin with a line of the cache: those of which each lies in two cost 7 % of a step of
// rows (Zen 3, AVX2).
constexpr size_t kLineBytes = 64;
struct alignas(kLineBytes) CacheLine {
  char bytes[kLineBytes];
};

// Elements of a row whose step one thread does from its caches.
constexpr int64_t kLongestRow = 1 << 15;
// Elements of the rows, of what is stored in few bits, that are in float32 together.
constexpr int64_t kStagedRows = 1 << 10;

// What both optimizers' jobs have.
template <size_t kMemories>
struct JobBase {
  Views<kMemories> views;
  int64_t tensor;
  int64_t numel, rows = kNoRows, row_numel = 0;
  int64_t index = 0;         // of the first row, in beta_prods and betas
  Sums* row_sums = nullptr;  // of the seam's rows
  Column steps, prev_lrs, betas;
  double lr, beta_max, step;
  bool shared, counts = false;
  Sums sums{0.0, 0.0};
  double beta = 0.0;

  bool is_idle(const Sums& own) const { return am::is_idle(step, lr, own.den); }
  // Whether the step counts as one of its tensor.
  bool is_counted() const {
    if (step != 0.0 || lr != 0.0) return true;
    return rows == kNoRows ? !is_idle(sums) : counts;
  }
};

// Rows one by one, of which the second reading is from the caches.
template <class Job>
bool step_each(const Job& job, int64_t first, int64_t n) {
  bool counts = false;
  for (int64_t row = first; row < first + n; ++row)
    counts |= job.finish_row(row, job.begin_row(row));
  return counts;
}

struct AdamWJob : JobBase<2> {
  AdamWCoefficients<double> coefficients;  // corrected, but for rows
  Column beta_prods;
  double beta_prod;
  bool guesses;

  AdamWChunk chunk(int64_t begin, int64_t n) const {
    return {views.param_at(begin), views.grad_at(begin), views.memory_at(0, begin),
            views.memory_at(1, begin), n};
  }
  Sums begin_chunk(int64_t begin, int64_t n) const {
    if (!guesses) return take_sums(begin, n, coefficients);
    if (views.low != nullptr)
      return kernels().low_adamw_guess(views.low_chunk(begin, n), coefficients);
    return kernels().adamw_guess[views.dtype](chunk(begin, n), coefficients);
  }
  void set_beta() { beta = adamw_beta(sums.num, sums.den, beta_max, step); }
  bool is_done() const {
    return is_idle(sums) || (guesses && !adamw_missed(beta, sums.den, beta_max));
  }
  void finish_chunk(int64_t begin, int64_t n) const {
    if (!guesses) return update(begin, n, coefficients, 1.0 - beta);
    const double miss = (beta_max - beta) / beta_max;
    if (views.low != nullptr) {
      kernels().low_adamw_repair(views.low_chunk(begin, n), coefficients, miss);
    } else {
      kernels().adamw_repair[views.dtype](chunk(begin, n), coefficients, miss);
    }
  }

  Sums take_sums(int64_t begin, int64_t n, const AdamWCoefficients<double>& c) const {
    if (views.low != nullptr) return kernels().low_adamw_sums(views.low_chunk(begin, n), c);
    return kernels().adamw_sums[views.dtype](chunk(begin, n), c);
  }
  void update(int64_t begin, int64_t n, const AdamWCoefficients<double>& c, double take) const {
    if (views.low != nullptr) return kernels().low_adamw_update(views.low_chunk(begin, n), c, take);
    kernels().adamw_update[views.dtype](chunk(begin, n), c, take);
  }

  AdamWCoefficients<double> corrected(int64_t row) const {
    return adamw_corrected(coefficients, beta_max, beta_prods.read(row));
  }
  Sums begin_row(int64_t row) const {
    return take_sums(row * row_numel, row_numel, corrected(row));
  }
  bool finish_row(int64_t row, const Sums& own) const {
    if (is_idle(own)) return false;
    const double own_beta = adamw_beta(own.num, own.den, beta_max, step);
    update(row * row_numel, row_numel, corrected(row), 1.0 - own_beta);
    write_beta(row, beta_prods.read(row), own_beta);
    return true;
  }
  void write_beta(int64_t row, double prod, double value) const {
    beta_prods.write(prod * value, row);
    betas.write(value, row);
  }
  // The segment's own, where it is not of rows.
  void open_segment() {
    beta_prod = beta_prods.read(index);
    coefficients = corrected(index);
  }
  void write_segment() const { write_beta(index, beta_prod, beta); }

  bool step_rows(int64_t first, int64_t n) const {
    // A step that may be none writes nothing before den is there.
    if (step == 0.0 && lr == 0.0) return step_each(*this, first, n);
    // Kept from step to step: memory that is new each time costs as much as the step.
    static thread_local std::vector<CacheLine> scratch;
    const size_t most = 2 * kRowScratch * (row_numel + 32) * kMemoryBytes[views.dtype] / kLineBytes;
    if (scratch.size() < most) scratch.resize(most);
    AdamWRows run{{}, n, beta_prods, betas, first, beta_max, step, scratch.data()};
    if (views.low == nullptr) {
      run.first = chunk(first * row_numel, row_numel);
      kernels().adamw_rows[views.dtype](run, coefficients);
      return true;
    }
    static thread_local std::vector<float> room;
    const int64_t at_once = std::max<int64_t>(1, kStagedRows / row_numel);
    const size_t most_room = kLowRoom * (at_once * row_numel + 16);
    if (room.size() < most_room) room.resize(most_room);
    const LowChunk row = views.low_chunk(first * row_numel, row_numel);
    kernels().low_adamw_rows({row, run, at_once, room.data()}, coefficients);
    return true;
  }
};

struct SGDJob : JobBase<1> {
  SGDCoefficients<double> coefficients;

  SGDChunk chunk(int64_t begin, int64_t n) const {
    return {views.param_at(begin), views.grad_at(begin), views.memory_at(0, begin), n};
  }
  Sums take_sums(int64_t begin, int64_t n, const SGDCoefficients<double>& c) const {
    if (views.low != nullptr) return kernels().low_sgd_sums(views.low_chunk(begin, n), c);
    return kernels().sgd_sums[views.dtype](chunk(begin, n), c);
  }
  // A first step has no memory: d = g, and both sums are zero, or next to it.
  Sums begin_chunk(int64_t begin, int64_t n) const {
    if (step != 0.0) return take_sums(begin, n, coefficients);
    if (lr != 0.0) return {0.0, 0.0};
    SGDCoefficients<double> c = coefficients;
    c.weight_decay = 0.0;
    return {0.0, sgd_first_den(take_sums(begin, n, c).den)};
  }
  void set_beta() { beta = sgd_beta(sums.num, sums.den, beta_max, step); }
  bool is_done() const { return is_idle(sums); }
  void finish_chunk(int64_t begin, int64_t n) const { update(begin, n, beta); }
  void update(int64_t begin, int64_t n, double own_beta) const {
    double keep, take;
    sgd_mixture(own_beta, coefficients.memory_lambda, step, &keep, &take);
    if (views.low != nullptr) {
      kernels().low_sgd_update(views.low_chunk(begin, n), coefficients, keep, take);
    } else {
      kernels().sgd_update[views.dtype](chunk(begin, n), coefficients, keep, take);
    }
  }

  Sums begin_row(int64_t row) const { return begin_chunk(row * row_numel, row_numel); }
  bool finish_row(int64_t row, const Sums& own) const {
    if (is_idle(own)) return false;
    const double own_beta = sgd_beta(own.num, own.den, beta_max, step);
    update(row * row_numel, row_numel, own_beta);
    betas.write(own_beta, row);
    return true;
  }
  void write_segment() const { betas.write(beta, index); }

  bool step_rows(int64_t first, int64_t n) const { return step_each(*this, first, n); }
};

// Those of the jobs for which f(job).
template <class Job, class F>
std::vector<Job*> select(std::vector<Job>& jobs, F f) {
  std::vector<Job*> selected;
  selected.reserve(jobs.size());
  for (Job& job : jobs)
    if (f(job)) selected.push_back(&job);
  return selected;
}

template <class Job>
std::vector<Job*> all(std::vector<Job>& jobs) {
  return select(jobs, [](const Job&) { return true; });
}

// The jobs with one for each row in the place of those whose rows are too long for a cache.
template <class Job, class F>
std::vector<Job> with_long_rows(std::vector<Job> jobs, F set_beta_prod) {
  const auto is_long = [](const Job& job) { return job.row_numel > kLongestRow; };
  if (std::none_of(jobs.begin(), jobs.end(), is_long)) return jobs;
  std::vector<Job> result;
  for (Job& job : jobs) {
    if (!is_long(job)) {
      result.push_back(std::move(job));
      continue;
    }
    for (int64_t row = 0; row < job.rows; ++row) {
      Job own = job;
      own.views = job.views.from(row * job.row_numel);
      own.numel = job.row_numel;
      own.rows = kNoRows;
      own.index = row;
      set_beta_prod(own);
      result.push_back(std::move(own));
    }
  }
  return result;
}

// Where the jobs' sums go, and from where they are taken, for the seam: [segments, 2].
template <class Job, class F>
void for_each_line(std::vector<Job>& jobs, Sums* line, F f) {
  static_assert(sizeof(Sums) == 2 * sizeof(double));
  for (Job& job : jobs) {
    f(job, line);
    line += job.rows == kNoRows ? 1 : job.rows;
  }
}

template <class Job>
void begin(const Step& step, std::vector<Job>& jobs, double* rows) {
  for_each_line(jobs, reinterpret_cast<Sums*>(rows),
                [](Job& job, Sums* line) { job.row_sums = line; });
  Schedule(step.threads, all(jobs)).begin();
  for (Job& job : jobs)
    if (job.rows == kNoRows) *job.row_sums = job.sums;
}

// Gives the tensors that share one beta the sums over all of them.
template <class Job>
void share_sums(const std::vector<Job*>& jobs) {
  Sums total{0.0, 0.0};
  for (const Job* job : jobs) {
    total.num += job->sums.num;
    total.den += job->sums.den;
  }
  // A first step needs no sums but to see whether it is one.
  for (Job* job : jobs)
    if (job->step != 0.0) job->sums = total;
}

// Writes what a step leaves beside what its kernels have written.
template <class Job>
void write_state(const Step& step, const std::vector<Job>& jobs, uint8_t* counted) {
  const int64_t n = static_cast<int64_t>(jobs.size());
  const auto is_first = [&](int64_t i) { return i == 0 || jobs[i - 1].tensor != jobs[i].tensor; };
  for_each_tensor(step.threads, n, [&](int64_t i) {
    if (!is_first(i)) return;
    bool counts = false;
    for (int64_t k = i; k == i || (k < n && !is_first(k)); ++k) {
      const Job& job = jobs[k];
      if (!job.is_counted()) continue;
      counts = true;
      if (job.rows == kNoRows) job.write_segment();
    }
    const Job& job = jobs[i];
    counted[job.tensor] = counts;
    if (!counts) return;
    job.steps.write(job.step + 1.0);
    job.prev_lrs.write(job.lr);
  });
}

// With rows: the second half. Without: both, in one walk where no segment's beta waits for
// another's sums.
template <class Job>
void finish(const Step& step, std::vector<Job>& jobs, const double* rows, uint8_t* counted) {
  if (rows != nullptr) {
    // They are only read.
    for_each_line(jobs, reinterpret_cast<Sums*>(const_cast<double*>(rows)),
                  [](Job& job, Sums* line) {
                    job.row_sums = line;
                    if (job.rows == kNoRows) job.sums = *line;
                  });
    Schedule(step.threads, all(jobs)).finish();
  } else {
    const auto shared = select(jobs, [](const Job& job) { return job.shared; });
    Schedule(step.threads, shared).begin();
    share_sums(shared);
    Schedule(step.threads, shared).finish();
    Schedule(step.threads, select(jobs, [](const Job& job) { return !job.shared; })).step();
  }
  write_state(step, jobs, counted);
}

// The jobs of this thread's last step, whose memory the next one takes: 3 MB for 5,000 tensors.
// What is new each time has to be mapped page by page, for half as long again as such a step takes.
template <class Job>
std::vector<Job>& last_jobs() {
  static thread_local std::vector<Job> jobs;
  return jobs;
}

// Opens a job for each tensor by open(job, tensor, its group). low: where those are kept that the
// jobs refer to.
template <class Job, class F>
std::vector<Job> make_jobs(const Step& step, std::vector<LowTensor>& low, F open) {
  const std::vector<int64_t> group_of = group_of_tensors(step);
  const StepTensor* const end = step.tensors + step.size;
  if (std::any_of(step.tensors, end, [](const StepTensor& t) { return t.packed != nullptr; }))
    low.resize(step.size);
  std::vector<Job> jobs = std::move(last_jobs<Job>());
  jobs.clear();
  jobs.resize(step.size);
  for_each_tensor(step.threads, step.size, [&](int64_t i) {
    const StepTensor& t = step.tensors[i];
    Job& job = jobs[i];
    job.tensor = i;
    job.steps = scalar_of(t, kStep);
    job.prev_lrs = scalar_of(t, kPrevLr);
    job.betas = scalar_of(t, kBeta);
    job.step = job.steps.read();
    if (t.packed != nullptr) low[i] = low_tensor(t, job.step);
    job.views.open(t, t.packed != nullptr ? &low[i] : nullptr);
    job.numel = t.numel;
    job.rows = t.rows;
    if (t.rows != kNoRows) job.row_numel = t.numel / std::max<int64_t>(1, t.rows);
    open(job, t, group_of[i]);
  });
  return jobs;
}

// ---- AM-AdamW ---------------------------------------------------------------------

std::vector<AdamWJob> adamw_jobs(const Step& step, std::vector<LowTensor>& low) {
  const auto open = [&](AdamWJob& job, const StepTensor& t, int64_t group) {
    const double* row = step.hypers + group * kAdamWColumns;
    const AdamWHyper hyper = adamw_hyper(row, step.lrs[group]);
    job.beta_prods = scalar_of(t, kBetaProd);
    job.shared = row[kAdamWColumns - 1] != 0.0;
    job.lr = hyper.lr;
    job.beta_max = hyper.beta_max;
    const bool may_guess = job.views.low != nullptr ? job.views.low->may_guess : t.may_guess != 0;
    job.guesses = adamw_guesses(hyper, job.step, may_guess);
    job.coefficients =
        adamw_coefficients<double>(hyper, job.step, job.prev_lrs.read(), step.grad_scale);
    if (job.rows == kNoRows) job.open_segment();
  };
  return with_long_rows(make_jobs<AdamWJob>(step, low, open),
                        [](AdamWJob& job) { job.open_segment(); });
}

// ---- AM-SGD -----------------------------------------------------------------------

std::vector<SGDJob> sgd_jobs(const Step& step, std::vector<LowTensor>& low) {
  const auto open = [&](SGDJob& job, const StepTensor&, int64_t group) {
    const double* row = step.hypers + group * kSGDColumns;
    const SGDHyper hyper = sgd_hyper(row, step.lrs[group]);
    job.shared = row[kSGDColumns - 1] != 0.0;
    job.lr = hyper.lr;
    job.beta_max = hyper.beta_max;
    job.coefficients = sgd_coefficients<double>(hyper, job.prev_lrs.read(), step.grad_scale);
  };
  return with_long_rows(make_jobs<SGDJob>(step, low, open), [](SGDJob&) {});
}

}  // namespace
}  // namespace am::cpu

using namespace am::cpu;

void adamem_cpu_adamw_begin(const Step* step, double* rows, uint8_t* guessed) {
  std::vector<LowTensor> low;
  std::vector<AdamWJob> jobs = adamw_jobs(*step, low);
  begin(*step, jobs, rows);
  for (const AdamWJob& job : jobs) guessed[job.tensor] = job.guesses && job.rows == kNoRows;
  last_jobs<AdamWJob>() = std::move(jobs);
}

void adamem_cpu_adamw_finish(const Step* step, const double* rows, uint8_t* counted) {
  std::vector<LowTensor> low;
  std::vector<AdamWJob> jobs = adamw_jobs(*step, low);
  finish(*step, jobs, rows, counted);
  last_jobs<AdamWJob>() = std::move(jobs);
}

void adamem_cpu_sgd_begin(const Step* step, double* rows) {
  std::vector<LowTensor> low;
  std::vector<SGDJob> jobs = sgd_jobs(*step, low);
  begin(*step, jobs, rows);
  last_jobs<SGDJob>() = std::move(jobs);
}

void adamem_cpu_sgd_finish(const Step* step, const double* rows, uint8_t* counted) {
  std::vector<LowTensor> low;
  std::vector<SGDJob> jobs = sgd_jobs(*step, low);
  finish(*step, jobs, rows, counted);
  last_jobs<SGDJob>() = std::move(jobs);
}
