// Checks what a step is given, hands pointers to the schedule, writes the scalars.
// Everything is checked before anything is written.
#include "step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "low.h"
#include "schedule.h"
#include "tensors.h"

namespace am::cpu {
namespace {

using at::Tensor;

// ---- reading what was given -----------------------------------------------------

// Kept from when it is read to when it is written: to look at the tensor once more would take
// longer than either.
Column open_scalar(const Tensor& t, const char* name, size_t i) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                   " of tensor ", i, " has dtype ", t.scalar_type(),
                   "; it has to be float32 or float64");
  TORCH_CHECK_VALUE(t.numel() == 1 && t.is_cpu(), name, " of tensor ", i, " has shape ", t.sizes(),
                    " on ", t.device(), "; it has to be a 0-dim tensor on the CPU");
  return {t.data_ptr(), t.scalar_type() == at::kDouble};
}

// beta or beta_prod: one, or, where `by_row`, one a row of the parameter.
Column open_row_scalar(const Tensor& t, const Tensor& param, bool by_row, const char* name,
                       size_t i) {
  if (!by_row) return open_scalar(t, name, i);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                   " of tensor ", i, " has dtype ", t.scalar_type(),
                   "; it has to be float32 or float64");
  TORCH_CHECK_VALUE(
      t.dim() == 1 && param.dim() > 0 && t.size(0) == param.size(0) && t.is_contiguous() &&
          t.is_cpu(),
      name, " of tensor ", i, " has shape ", t.sizes(), " on ", t.device(),
      "; it has to be contiguous on the CPU, with an element for each row of its parameter, ",
      param.sizes());
  return {t.data_ptr(), t.scalar_type() == at::kDouble};
}

double read_optional(const OptionalTensor& t, double otherwise) {
  return t.has_value() ? t->item<double>() : otherwise;
}

bool is_skipped(const Options& options) { return read_optional(options.found_inf, 0.0) != 0.0; }

void check_length(const TensorRefs& list, const char* name, size_t tensors) {
  TORCH_CHECK_VALUE(list.size() == tensors, name, " holds ", list.size(), " tensors, params ",
                    tensors);
}

void check_like(const Tensor& t, const Tensor& param, const char* name, size_t i) {
  TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()) && t.layout() == at::kStrided, name,
                   " of tensor ", i, " is ", t.layout(), " ", t.scalar_type(),
                   "; it has to be a dense real floating-point tensor");
  TORCH_CHECK_VALUE(t.sizes() == param.sizes(), name, " of tensor ", i, " has shape ", t.sizes(),
                    ", its parameter ", param.sizes());
  TORCH_CHECK_VALUE(t.is_cpu(), name, " of tensor ", i, " is on ", t.device(),
                    ", its parameter on the CPU");
}

constexpr int64_t kMemoryBytes[kNumDTypes] = {4, 8, 4, 4};

at::ScalarType memory_type(DType dtype) { return dtype == kFloat64 ? at::kDouble : at::kFloat; }

// Whether element i of one lies where element i of the other does. Strides of
// dimensions of size 1 say nothing (convolution weights differ in them).
bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.strides() == b.strides()) return true;
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

// One tensor's data as the kernels take it: dense, in one layout, the memory in
// float32 or float64. Whatever is not so (a strided view, a gradient of another
// dtype or other strides, float64 state of a float32 parameter) goes through copies
// in the type of the memory, and store() writes the results back.
template <size_t kMemories>
struct Views {
  struct Copies {
    Tensor param, grad, memories[kMemories];
  };

  DType dtype = kFloat32;
  int64_t numel = 0;
  char* param = nullptr;
  char* grad = nullptr;
  char* memories[kMemories] = {};
  // A repair may begin with what is stored, and the gradient is another tensor: a repair reads it
  // once more, when the parameter has been written to.
  bool may_guess = false;
  std::shared_ptr<const Copies> copies;
  // In the place of all pointers where something is stored in few bits, and the view's first
  // element.
  const LowTensor* low = nullptr;
  int64_t first = 0;

  void open(const LowTensor& tensor, int64_t size) {
    dtype = tensor.dtype;
    numel = size;
    may_guess = tensor.may_guess;
    low = &tensor;
  }

  // by_row: rows have to lie one behind the other.
  void open(const Tensor& p, const Tensor& g, const Tensor* const (&m)[kMemories],
            const char* const (&names)[kMemories], bool by_row, size_t i) {
    dtype = dtype_of(p, "param", i);
    numel = p.numel();
    check_like(g, p, "grad", i);
    bool direct =
        g.scalar_type() == p.scalar_type() && p.is_non_overlapping_and_dense() && same_layout(g, p);
    if (by_row && p.size(0) > 1) direct = direct && p.stride(0) * p.size(0) == numel;
    at::ScalarType type = memory_type(dtype);
    for (size_t k = 0; k < kMemories; ++k) {
      check_like(*m[k], p, names[k], i);
      direct = direct && m[k]->scalar_type() == memory_type(dtype) && same_layout(*m[k], p);
      type = at::promoteTypes(type, m[k]->scalar_type());
    }
    may_guess = p.scalar_type() == type;
    for (const Tensor* memory : m) may_guess = may_guess && memory->scalar_type() == type;
    if (direct) {
      point(p, g, [&](size_t k) -> const Tensor& { return *m[k]; });
      may_guess = may_guess && param != grad;
      return;
    }
    may_guess = may_guess && p.const_data_ptr() != g.const_data_ptr();
    // The kernels would not mind, but copies could not be written back.
    TORCH_CHECK(c10::InferenceMode::is_enabled() || !p.is_inference(), "param ", i,
                " was made in inference mode, and cannot be updated in place outside of it");
    at::assert_no_internal_overlap(p);
    for (const Tensor* memory : m) at::assert_no_internal_overlap(*memory);
    const auto own = std::make_shared<Copies>();
    const auto copy = [&](const Tensor& t) { return t.to(type).contiguous(); };
    own->param = copy(p);
    own->grad = copy(g);
    for (size_t k = 0; k < kMemories; ++k) own->memories[k] = copy(*m[k]);
    dtype = type == at::kDouble ? kFloat64 : kFloat32;
    point(own->param, own->grad, [&](size_t k) -> const Tensor& { return own->memories[k]; });
    copies = own;
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

  void store(const Tensor& p, const Tensor* const (&m)[kMemories]) const {
    if (copies == nullptr) return;
    if (!p.is_same(copies->param)) p.copy_(copies->param);
    for (size_t k = 0; k < kMemories; ++k)
      if (!m[k]->is_same(copies->memories[k])) m[k]->copy_(copies->memories[k]);
  }

  LowChunk low_chunk(int64_t begin, int64_t n) const { return {low, first + begin, n}; }
  // A chunk's pointers. The sums only read through them.
  char* param_at(int64_t begin) const { return param + begin * bytes_of(dtype); }
  char* grad_at(int64_t begin) const { return grad + begin * bytes_of(dtype); }
  char* memory_at(size_t k, int64_t begin) const {
    return memories[k] + begin * kMemoryBytes[dtype];
  }

 private:
  template <class Memory>
  void point(const Tensor& p, const Tensor& g, Memory memory) {
    param = static_cast<char*>(p.data_ptr());
    grad = static_cast<char*>(const_cast<void*>(g.const_data_ptr()));
    for (size_t k = 0; k < kMemories; ++k) memories[k] = static_cast<char*>(memory(k).data_ptr());
  }
};

template <size_t kMemories>
void open_views(Views<kMemories>& views, const Tensor& p, const Tensor& g,
                const Tensor* const (&m)[kMemories], const char* const (&names)[kMemories],
                LowTensors<kMemories>& low, double step, bool by_row, size_t i) {
  if (const LowTensor* tensor = low.open(p, g, m, names, step, by_row, i)) {
    views.open(*tensor, p.numel());
  } else {
    views.open(p, g, m, names, by_row, i);
  }
}

// ---- hyperparameters --------------------------------------------------------------

// The columns of hypers, a row for each group, as in ../ops.cpp.
constexpr size_t kAdamWColumns = 9, kSGDColumns = 7;

AdamWHyper adamw_hyper(const double* h, double lr) {
  return {lr, h[0], h[1], h[2], h[3], h[4], h[5] != 0.0, h[6] != 0.0, h[7] != 0.0};
}

SGDHyper sgd_hyper(const double* h, double lr) {
  return {lr, h[0], h[1], h[2], h[3] != 0.0, h[4] != 0.0, h[5] != 0.0};
}

// Each tensor's group.
std::vector<size_t> group_of_tensors(const Options& options, size_t tensors, size_t columns) {
  const size_t n = options.group_sizes.size();
  TORCH_CHECK_VALUE(options.lrs.is_cpu() && options.lrs.scalar_type() == at::kDouble &&
                        options.lrs.is_contiguous() &&
                        options.lrs.numel() == static_cast<int64_t>(n),
                    "lrs has to be a float64 CPU tensor of ", n, " values");
  TORCH_CHECK_VALUE(options.hypers.size() == n * columns, "hypers holds ", options.hypers.size(),
                    " values; it has to hold ", columns, " for each of ", n, " groups");
  std::vector<size_t> group_of;
  group_of.reserve(tensors);
  for (size_t group = 0; group < n; ++group) {
    TORCH_CHECK_VALUE(options.group_sizes[group] >= 0, "group_sizes holds ",
                      options.group_sizes[group]);
    group_of.insert(group_of.end(), options.group_sizes[group], group);
  }
  TORCH_CHECK_VALUE(group_of.size() == tensors, "group_sizes add up to ", group_of.size(),
                    ", params holds ", tensors);
  return group_of;
}

// ---- jobs: a segment of a step, or rows of which each is one --------------------------

// Elements of a row whose step one thread does from its caches.
constexpr int64_t kLongestRow = 1 << 15;
// Elements of the rows, of what is stored in few bits, that are in float32 together.
constexpr int64_t kStagedRows = 1 << 10;

// What both optimizers' jobs have.
template <size_t kMemories>
struct JobBase {
  Views<kMemories> views;
  size_t tensor;
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
    static thread_local std::vector<double> scratch;
    const size_t most = 2 * kRowScratch * (row_numel + 16);
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

template <class Job>
auto schedule(std::vector<Job*> jobs) {
  const auto parallel_for = [](int64_t parts, const auto& f) {
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) f(part);
    });
  };
  return Schedule<Job, decltype(parallel_for)>(std::move(jobs), at::get_num_threads(),
                                               parallel_for);
}

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

// How many numbers of beta a tensor has, if they are its rows'.
template <class Job>
void set_rows(Job& job, const Tensor& beta) {
  job.numel = job.views.numel;
  if (beta.dim() == 0) return;
  TORCH_CHECK_VALUE(!job.shared, "beta of tensor ", job.tensor, " has shape ", beta.sizes(),
                    "; where it is shared by all tensors it has to be a 0-dim tensor");
  job.rows = beta.size(0);
  job.row_numel = job.numel / std::max<int64_t>(1, job.rows);
}

// Where the jobs' sums go, and from where they are taken, for the seam: [segments, 2].
template <class Job, class F>
void for_each_line(std::vector<Job>& jobs, const Tensor& rows, F f) {
  static_assert(sizeof(Sums) == 2 * sizeof(double));
  // Those of the second half are only read.
  auto* line = reinterpret_cast<Sums*>(const_cast<void*>(rows.const_data_ptr()));
  for (Job& job : jobs) {
    f(job, line);
    line += job.rows == kNoRows ? 1 : job.rows;
  }
}

template <class Job>
int64_t count_lines(const std::vector<Job>& jobs) {
  int64_t lines = 0;
  for (const Job& job : jobs) lines += job.rows == kNoRows ? 1 : job.rows;
  return lines;
}

template <class Job>
Tensor begin(std::vector<Job>& jobs, bool is_skipped) {
  const Tensor rows = at::zeros({count_lines(jobs), 2}, at::kDouble);
  if (is_skipped) return rows;
  for_each_line(jobs, rows, [](Job& job, Sums* line) { job.row_sums = line; });
  schedule(all(jobs)).begin();
  for (Job& job : jobs)
    if (job.rows == kNoRows) *job.row_sums = job.sums;
  return rows;
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

// With rows: the second half. Without: both, in one walk where no segment's beta waits for
// another's sums.
template <class Job>
void finish(std::vector<Job>& jobs, const OptionalTensor& rows) {
  if (!rows.has_value()) {
    const auto shared = select(jobs, [](const Job& job) { return job.shared; });
    schedule(shared).begin();
    share_sums(shared);
    schedule(shared).finish();
    schedule(select(jobs, [](const Job& job) { return !job.shared; })).step();
    return;
  }
  const int64_t n = count_lines(jobs);
  TORCH_CHECK_VALUE(rows->is_cpu() && rows->scalar_type() == at::kDouble && rows->dim() == 2 &&
                        rows->size(0) == n && rows->size(1) == 2,
                    "rows has to be a float64 CPU tensor of shape [", n, ", 2], not ",
                    rows->scalar_type(), " ", rows->sizes());
  const Tensor lines = rows->contiguous();  // the jobs point into it
  for_each_line(jobs, lines, [](Job& job, Sums* line) {
    job.row_sums = line;
    if (job.rows == kNoRows) job.sums = *line;
  });
  schedule(all(jobs)).finish();
}

// Writes what a step leaves beside what its kernels have written. store: what was updated in
// copies, for a tensor's first job; bump: the tensor's versions.
template <class Job, class Store, class Bump>
void write_state(const std::vector<Job>& jobs, Store store, Bump bump) {
  const auto is_first = [&](size_t i) { return i == 0 || jobs[i - 1].tensor != jobs[i].tensor; };
  for_each_tensor(jobs.size(), [&](size_t i) {
    if (!is_first(i)) return;
    bool counts = false;
    for (size_t k = i; k == i || (k < jobs.size() && !is_first(k)); ++k) {
      const Job& job = jobs[k];
      if (!job.is_counted()) continue;
      counts = true;
      if (job.rows == kNoRows) job.write_segment();
    }
    if (!counts) return;
    store(jobs[i]);
    jobs[i].steps.write(jobs[i].step + 1.0);
    jobs[i].prev_lrs.write(jobs[i].lr);
    bump(jobs[i].tensor);
  });
}

// Tensor i's of each list in `packed`, of n tensors.
void bump_packed(const TensorRefs& packed, size_t n, size_t i) {
  for (size_t k = i; k < packed.size(); k += n) bump_version(packed[k]);
}

// ---- AM-AdamW ---------------------------------------------------------------------

// low: of these tensors, which the jobs refer to.
std::vector<AdamWJob> adamw_jobs(const AdamWTensors& t, const Options& options,
                                 LowTensors<2>& low) {
  const size_t n = t.params.size();
  TORCH_CHECK_VALUE(t.grads.size() == n && t.exp_avgs.size() == n && t.exp_avg_sqs.size() == n,
                    "params, grads, exp_avgs and exp_avg_sqs differ in length: ", n, ", ",
                    t.grads.size(), ", ", t.exp_avgs.size(), ", ", t.exp_avg_sqs.size());
  check_length(t.steps, "steps", n);
  check_length(t.beta_prods, "beta_prods", n);
  check_length(t.prev_lrs, "prev_lrs", n);
  check_length(t.betas, "betas", n);
  const std::vector<size_t> group_of = group_of_tensors(options, n, kAdamWColumns);
  const double* lrs = options.lrs.const_data_ptr<double>();
  const double scale = read_optional(options.grad_scale, 1.0);

  std::vector<AdamWJob> jobs(n);
  for_each_tensor(n, [&](size_t i) {
    AdamWJob& job = jobs[i];
    const Tensor& param = t.params[i];
    const bool by_row = t.betas[i].dim() > 0;
    job.beta_prods = open_row_scalar(t.beta_prods[i], param, by_row, "beta_prod", i);
    job.betas = open_row_scalar(t.betas[i], param, by_row, "beta", i);
    job.steps = open_scalar(t.steps[i], "step", i);
    job.step = job.steps.read();
    open_views(job.views, param, t.grads[i], {&t.exp_avgs[i], &t.exp_avg_sqs[i]},
               {"exp_avg", "exp_avg_sq"}, low, job.step, by_row, i);
    job.tensor = i;
    const double* row = &options.hypers[group_of[i] * kAdamWColumns];
    job.shared = row[kAdamWColumns - 1] != 0.0;
    set_rows(job, t.betas[i]);
    job.prev_lrs = open_scalar(t.prev_lrs[i], "prev_lr", i);
    const AdamWHyper hyper = adamw_hyper(row, lrs[group_of[i]]);
    job.lr = hyper.lr;
    job.beta_max = hyper.beta_max;
    job.guesses = adamw_guesses(hyper, job.step, job.views.may_guess);
    job.coefficients = adamw_coefficients<double>(hyper, job.step, job.prev_lrs.read(), scale);
    if (!by_row) job.open_segment();
  });
  return with_long_rows(std::move(jobs), [](AdamWJob& job) { job.open_segment(); });
}

}  // namespace

Tensor adamw_begin_(const AdamWTensors& t, const Options& options) {
  LowTensors<2> low(t.packed, options.rounding, t.params.size());
  std::vector<AdamWJob> jobs = adamw_jobs(t, options, low);
  const Tensor rows = begin(jobs, is_skipped(options));
  if (is_skipped(options)) return rows;
  for_each_tensor(jobs.size(), [&](size_t i) {
    const AdamWJob& job = jobs[i];
    if (job.guesses && job.rows == kNoRows && (i == 0 || jobs[i - 1].tensor != job.tensor))
      job.views.store(t.params[job.tensor], {&t.exp_avgs[job.tensor], &t.exp_avg_sqs[job.tensor]});
  });
  return rows;
}

void adamw_finish_(const AdamWTensors& t, const Options& options, const OptionalTensor& rows) {
  if (is_skipped(options)) return;
  LowTensors<2> low(t.packed, options.rounding, t.params.size());
  std::vector<AdamWJob> jobs = adamw_jobs(t, options, low);
  finish(jobs, rows);
  write_state(
      jobs,
      [&](const AdamWJob& job) {
        job.views.store(t.params[job.tensor],
                        {&t.exp_avgs[job.tensor], &t.exp_avg_sqs[job.tensor]});
      },
      [&](size_t i) {
        for (const TensorRefs* list : {&t.params, &t.exp_avgs, &t.exp_avg_sqs, &t.steps,
                                       &t.beta_prods, &t.prev_lrs, &t.betas})
          bump_version_ahead(*list, i);
        bump_packed(t.packed, t.params.size(), i);
      });
}

// ---- AM-SGD -----------------------------------------------------------------------

namespace {

std::vector<SGDJob> sgd_jobs(const SGDTensors& t, const Options& options, LowTensors<1>& low) {
  const size_t n = t.params.size();
  TORCH_CHECK_VALUE(t.grads.size() == n && t.momentum_buffers.size() == n,
                    "params, grads and momentum_buffers differ in length: ", n, ", ",
                    t.grads.size(), ", ", t.momentum_buffers.size());
  check_length(t.steps, "steps", n);
  check_length(t.prev_lrs, "prev_lrs", n);
  check_length(t.betas, "betas", n);
  const std::vector<size_t> group_of = group_of_tensors(options, n, kSGDColumns);
  const double* lrs = options.lrs.const_data_ptr<double>();
  const double scale = read_optional(options.grad_scale, 1.0);

  std::vector<SGDJob> jobs(n);
  for_each_tensor(n, [&](size_t i) {
    SGDJob& job = jobs[i];
    const bool by_row = t.betas[i].dim() > 0;
    job.betas = open_row_scalar(t.betas[i], t.params[i], by_row, "beta", i);
    job.steps = open_scalar(t.steps[i], "step", i);
    job.step = job.steps.read();
    open_views(job.views, t.params[i], t.grads[i], {&t.momentum_buffers[i]}, {"momentum_buffer"},
               low, job.step, by_row, i);
    job.tensor = i;
    const double* row = &options.hypers[group_of[i] * kSGDColumns];
    job.shared = row[kSGDColumns - 1] != 0.0;
    set_rows(job, t.betas[i]);
    job.prev_lrs = open_scalar(t.prev_lrs[i], "prev_lr", i);
    const SGDHyper hyper = sgd_hyper(row, lrs[group_of[i]]);
    job.lr = hyper.lr;
    job.beta_max = hyper.beta_max;
    job.coefficients = sgd_coefficients<double>(hyper, job.prev_lrs.read(), scale);
  });
  return with_long_rows(std::move(jobs), [](SGDJob&) {});
}

}  // namespace

Tensor sgd_begin(const SGDTensors& t, const Options& options) {
  LowTensors<1> low(t.packed, options.rounding, t.params.size());
  std::vector<SGDJob> jobs = sgd_jobs(t, options, low);
  return begin(jobs, false);
}

void sgd_finish_(const SGDTensors& t, const Options& options, const OptionalTensor& rows) {
  if (is_skipped(options)) return;
  LowTensors<1> low(t.packed, options.rounding, t.params.size());
  std::vector<SGDJob> jobs = sgd_jobs(t, options, low);
  finish(jobs, rows);
  write_state(
      jobs,
      [&](const SGDJob& job) {
        job.views.store(t.params[job.tensor], {&t.momentum_buffers[job.tensor]});
      },
      [&](size_t i) {
        for (const TensorRefs* list :
             {&t.params, &t.momentum_buffers, &t.steps, &t.prev_lrs, &t.betas})
          bump_version_ahead(*list, i);
        bump_packed(t.packed, t.params.size(), i);
      });
}

}  // namespace am::cpu
