// Checks what a step is given, hands pointers to the schedule, writes the scalars.
// Everything is checked before anything is written.
#include "step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "schedule.h"

namespace am::cpu {
namespace {

using at::Tensor;

// torch's own choice, so that ATEN_CPU_CAPABILITY rules this package too.
const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = [&]() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
    const auto starts_with = [&](const char* name) { return capability.rfind(name, 0) == 0; };
    if (starts_with("AVX512") || starts_with("AVX10")) return kernels_avx512;
    if (starts_with("AVX2")) return kernels_avx2;
    return kernels_default;
  }();
  return chosen;
#else
  return kernels_default;
#endif
}

// ---- reading what was given -----------------------------------------------------

// Where a 0-dim tensor's value lies. Kept from when it is read to when it is written: to look
// at the tensor once more would take longer than either.
struct Scalar {
  void* data = nullptr;
  bool is_double = false;

  double read() const {
    return is_double ? *static_cast<double*>(data) : *static_cast<float*>(data);
  }
  void write(double value) const {
    if (is_double) {
      *static_cast<double*>(data) = value;
    } else {
      *static_cast<float*>(data) = static_cast<float>(value);
    }
  }
};

Scalar open_scalar(const Tensor& t, const char* name, size_t i) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                   " of tensor ", i, " has dtype ", t.scalar_type(),
                   "; it has to be float32 or float64");
  TORCH_CHECK_VALUE(t.numel() == 1 && t.is_cpu(), name, " of tensor ", i, " has shape ", t.sizes(),
                    " on ", t.device(), "; it has to be a 0-dim tensor on the CPU");
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

DType dtype_of(const Tensor& param, size_t i) {
  switch (param.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "param ", i, " has dtype ", param.scalar_type(),
                       "; the cpu backend takes float32, float64, bfloat16 and float16");
  }
}

constexpr int64_t kParamBytes[kNumDTypes] = {4, 8, 2, 2};
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
  // Parameter and memories are stored in the type of the arithmetic, and the gradient is another
  // tensor: a repair reads it once more, when the parameter has been written to.
  bool is_exact = false;
  std::unique_ptr<Copies> copies;

  void open(const Tensor& p, const Tensor& g, const Tensor* const (&m)[kMemories],
            const char* const (&names)[kMemories], size_t i) {
    dtype = dtype_of(p, i);
    numel = p.numel();
    check_like(g, p, "grad", i);
    bool direct =
        g.scalar_type() == p.scalar_type() && p.is_non_overlapping_and_dense() && same_layout(g, p);
    at::ScalarType type = memory_type(dtype);
    for (size_t k = 0; k < kMemories; ++k) {
      check_like(*m[k], p, names[k], i);
      direct = direct && m[k]->scalar_type() == memory_type(dtype) && same_layout(*m[k], p);
      type = at::promoteTypes(type, m[k]->scalar_type());
    }
    is_exact = p.scalar_type() == type;
    for (const Tensor* memory : m) is_exact = is_exact && memory->scalar_type() == type;
    if (direct) {
      point(p, g, [&](size_t k) -> const Tensor& { return *m[k]; });
      is_exact = is_exact && param != grad;
      return;
    }
    is_exact = is_exact && p.const_data_ptr() != g.const_data_ptr();
    // The kernels would not mind, but copies could not be written back.
    TORCH_CHECK(c10::InferenceMode::is_enabled() || !p.is_inference(), "param ", i,
                " was made in inference mode, and cannot be updated in place outside of it");
    at::assert_no_internal_overlap(p);
    for (const Tensor* memory : m) at::assert_no_internal_overlap(*memory);
    copies = std::make_unique<Copies>();
    const auto copy = [&](const Tensor& t) { return t.to(type).contiguous(); };
    copies->param = copy(p);
    copies->grad = copy(g);
    for (size_t k = 0; k < kMemories; ++k) copies->memories[k] = copy(*m[k]);
    dtype = type == at::kDouble ? kFloat64 : kFloat32;
    point(copies->param, copies->grad,
          [&](size_t k) -> const Tensor& { return copies->memories[k]; });
  }

  void store(const Tensor& p, const Tensor* const (&m)[kMemories]) const {
    if (copies == nullptr) return;
    if (!p.is_same(copies->param)) p.copy_(copies->param);
    for (size_t k = 0; k < kMemories; ++k)
      if (!m[k]->is_same(copies->memories[k])) m[k]->copy_(copies->memories[k]);
  }

  // A chunk's pointers. The sums only read through them.
  char* param_at(int64_t begin) const { return param + begin * kParamBytes[dtype]; }
  char* grad_at(int64_t begin) const { return grad + begin * kParamBytes[dtype]; }
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

// ---- jobs: one tensor of a step ---------------------------------------------------

struct AdamWJob {
  Views<2> views;
  AdamWCoefficients<double> coefficients;
  Scalar steps, beta_prods, prev_lrs, betas;
  double lr, beta_max, step, beta_prod;
  bool shared, guesses;
  int64_t numel;
  Sums sums{0.0, 0.0};
  double beta = 0.0;

  AdamWChunk chunk(int64_t begin, int64_t n) const {
    return {views.param_at(begin), views.grad_at(begin), views.memory_at(0, begin),
            views.memory_at(1, begin), n};
  }
  Sums begin_chunk(int64_t begin, int64_t n) const {
    const auto& kernel = guesses ? kernels().adamw_guess : kernels().adamw_sums;
    return kernel[views.dtype](chunk(begin, n), coefficients);
  }
  bool is_idle() const { return am::is_idle(step, lr, sums.den); }
  void set_beta() { beta = adamw_beta(sums.num, sums.den, beta_max, step); }
  bool is_done() const { return is_idle() || (guesses && !adamw_missed(beta, sums.den, beta_max)); }
  void finish_chunk(int64_t begin, int64_t n) const {
    if (guesses) {
      kernels().adamw_repair[views.dtype](chunk(begin, n), coefficients,
                                          (beta_max - beta) / beta_max);
    } else {
      kernels().adamw_update[views.dtype](chunk(begin, n), coefficients, 1.0 - beta);
    }
  }
};

struct SGDJob {
  Views<1> views;
  SGDCoefficients<double> coefficients;
  Scalar steps, prev_lrs, betas;
  double lr, beta_max, step;
  bool shared;
  int64_t numel;
  Sums sums{0.0, 0.0};
  double beta = 0.0;

  SGDChunk chunk(int64_t begin, int64_t n) const {
    return {views.param_at(begin), views.grad_at(begin), views.memory_at(0, begin), n};
  }
  // A first step has no memory: d = g, and both sums are zero, or next to it.
  Sums begin_chunk(int64_t begin, int64_t n) const {
    if (step != 0.0) return kernels().sgd_sums[views.dtype](chunk(begin, n), coefficients);
    if (lr != 0.0) return {0.0, 0.0};
    SGDCoefficients<double> c = coefficients;
    c.weight_decay = 0.0;
    return {0.0, sgd_first_den(kernels().sgd_sums[views.dtype](chunk(begin, n), c).den)};
  }
  bool is_idle() const { return am::is_idle(step, lr, sums.den); }
  void set_beta() { beta = sgd_beta(sums.num, sums.den, beta_max, step); }
  bool is_done() const { return is_idle(); }
  void finish_chunk(int64_t begin, int64_t n) const {
    double keep, take;
    sgd_mixture(beta, coefficients.memory_lambda, step, &keep, &take);
    kernels().sgd_update[views.dtype](chunk(begin, n), coefficients, keep, take);
  }
};

// Calls f(i) for every tensor. With thousands of them, looking each one up in memory is
// most of a step's time, so that is shared among the threads too.
template <class F>
void for_each_tensor(size_t tensors, F f) {
  at::parallel_for(0, static_cast<int64_t>(tensors), 256, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;  // the other threads do not have the caller's
    for (int64_t i = begin; i < end; ++i) f(static_cast<size_t>(i));
  });
}

template <class Job>
auto schedule(std::vector<Job>& jobs) {
  const auto parallel_for = [](int64_t parts, const auto& f) {
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) f(part);
    });
  };
  return Schedule<Job, decltype(parallel_for)>(jobs, at::get_num_threads(), parallel_for);
}

template <class Job>
Tensor rows_of(const std::vector<Job>& jobs) {
  const Tensor rows = at::empty({static_cast<int64_t>(jobs.size()), 2}, at::kDouble);
  double* p = rows.mutable_data_ptr<double>();
  for (const Job& job : jobs) {
    *p++ = job.sums.num;
    *p++ = job.sums.den;
  }
  return rows;
}

// Gives the tensors that share one beta the sums over all of them.
template <class Job>
void share_sums(std::vector<Job>& jobs) {
  Sums total{0.0, 0.0};
  for (const Job& job : jobs) {
    if (!job.shared) continue;
    total.num += job.sums.num;
    total.den += job.sums.den;
  }
  // A first step needs no sums but to see whether it is one.
  for (Job& job : jobs)
    if (job.shared && job.step != 0.0) job.sums = total;
}

// With rows: the second half. Without: both, in one walk where no tensor's beta waits for
// another's sums.
template <class Job>
void finish(std::vector<Job>& jobs, const OptionalTensor& rows) {
  if (!rows.has_value()) {
    if (std::none_of(jobs.begin(), jobs.end(), [](const Job& job) { return job.shared; })) {
      schedule(jobs).step();
      return;
    }
    schedule(jobs).begin();
    share_sums(jobs);
    schedule(jobs).finish();
    return;
  }
  const auto n = static_cast<int64_t>(jobs.size());
  TORCH_CHECK_VALUE(rows->is_cpu() && rows->scalar_type() == at::kDouble && rows->dim() == 2 &&
                        rows->size(0) == n && rows->size(1) == 2,
                    "rows has to be a float64 CPU tensor of shape [", n, ", 2], not ",
                    rows->scalar_type(), " ", rows->sizes());
  const auto access = rows->accessor<double, 2>();
  for (int64_t i = 0; i < n; ++i) jobs[i].sums = {access[i][0], access[i][1]};
  schedule(jobs).finish();
}

// ---- AM-AdamW ---------------------------------------------------------------------

std::vector<AdamWJob> adamw_jobs(const AdamWTensors& t, const Options& options) {
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
    job.views.open(t.params[i], t.grads[i], {&t.exp_avgs[i], &t.exp_avg_sqs[i]},
                   {"exp_avg", "exp_avg_sq"}, i);
    job.numel = job.views.numel;
    const double* row = &options.hypers[group_of[i] * kAdamWColumns];
    job.shared = row[kAdamWColumns - 1] != 0.0;
    job.steps = open_scalar(t.steps[i], "step", i);
    job.beta_prods = open_scalar(t.beta_prods[i], "beta_prod", i);
    job.prev_lrs = open_scalar(t.prev_lrs[i], "prev_lr", i);
    job.betas = open_scalar(t.betas[i], "beta", i);
    job.step = job.steps.read();
    job.beta_prod = job.beta_prods.read();
    const AdamWHyper hyper = adamw_hyper(row, lrs[group_of[i]]);
    job.lr = hyper.lr;
    job.beta_max = hyper.beta_max;
    job.guesses = adamw_guesses(hyper, job.step, job.views.is_exact);
    job.coefficients = adamw_corrected(
        adamw_coefficients<double>(hyper, job.step, job.prev_lrs.read(), scale), hyper.beta_max,
        job.beta_prod);
  });
  return jobs;
}

}  // namespace

Tensor adamw_begin_(const AdamWTensors& t, const Options& options) {
  std::vector<AdamWJob> jobs = adamw_jobs(t, options);
  if (is_skipped(options)) return rows_of(jobs);
  schedule(jobs).begin();
  for_each_tensor(jobs.size(), [&](size_t i) {
    if (jobs[i].guesses) jobs[i].views.store(t.params[i], {&t.exp_avgs[i], &t.exp_avg_sqs[i]});
  });
  return rows_of(jobs);
}

void adamw_finish_(const AdamWTensors& t, const Options& options, const OptionalTensor& rows) {
  if (is_skipped(options)) return;
  std::vector<AdamWJob> jobs = adamw_jobs(t, options);
  finish(jobs, rows);
  for_each_tensor(jobs.size(), [&](size_t i) {
    const AdamWJob& job = jobs[i];
    if (job.is_idle()) return;
    job.views.store(t.params[i], {&t.exp_avgs[i], &t.exp_avg_sqs[i]});
    job.steps.write(job.step + 1.0);
    job.beta_prods.write(job.beta_prod * job.beta);
    job.prev_lrs.write(job.lr);
    job.betas.write(job.beta);
    for (const TensorRefs* list :
         {&t.params, &t.exp_avgs, &t.exp_avg_sqs, &t.steps, &t.beta_prods, &t.prev_lrs, &t.betas})
      bump_version_ahead(*list, i);
  });
}

// ---- AM-SGD -----------------------------------------------------------------------

namespace {

std::vector<SGDJob> sgd_jobs(const SGDTensors& t, const Options& options) {
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
    job.views.open(t.params[i], t.grads[i], {&t.momentum_buffers[i]}, {"momentum_buffer"}, i);
    job.numel = job.views.numel;
    const double* row = &options.hypers[group_of[i] * kSGDColumns];
    job.shared = row[kSGDColumns - 1] != 0.0;
    job.steps = open_scalar(t.steps[i], "step", i);
    job.prev_lrs = open_scalar(t.prev_lrs[i], "prev_lr", i);
    job.betas = open_scalar(t.betas[i], "beta", i);
    job.step = job.steps.read();
    const SGDHyper hyper = sgd_hyper(row, lrs[group_of[i]]);
    job.lr = hyper.lr;
    job.beta_max = hyper.beta_max;
    job.coefficients = sgd_coefficients<double>(hyper, job.prev_lrs.read(), scale);
  });
  return jobs;
}

}  // namespace

Tensor sgd_begin(const SGDTensors& t, const Options& options) {
  std::vector<SGDJob> jobs = sgd_jobs(t, options);
  schedule(jobs).begin();
  return rows_of(jobs);
}

void sgd_finish_(const SGDTensors& t, const Options& options, const OptionalTensor& rows) {
  if (is_skipped(options)) return;
  std::vector<SGDJob> jobs = sgd_jobs(t, options);
  finish(jobs, rows);
  for_each_tensor(jobs.size(), [&](size_t i) {
    const SGDJob& job = jobs[i];
    if (job.is_idle()) return;
    job.views.store(t.params[i], {&t.momentum_buffers[i]});
    job.steps.write(job.step + 1.0);
    job.prev_lrs.write(job.lr);
    job.betas.write(job.beta);
    for (const TensorRefs* list : {&t.params, &t.momentum_buffers, &t.steps, &t.prev_lrs, &t.betas})
      bump_version_ahead(*list, i);
  });
}

}  // namespace am::cpu
