// Checks what a step is given, hands its tensors to the kernels as tables, writes back what went
// through copies. Everything is checked before anything is written.
#include "step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <memory>
#include <vector>

#include "packed.h"
#include "tensors.h"

namespace am::cpu {
namespace {

using at::Tensor;

// ---- reading what was given -----------------------------------------------------

void set_scalar(StepTensor& row, Scalar scalar, const Tensor& t) {
  row.scalars[scalar] = t.data_ptr();
  row.doubles |= int64_t{t.scalar_type() == at::kDouble} << scalar;
}

void open_scalar(StepTensor& row, Scalar scalar, const Tensor& t, const char* name, size_t i) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                   " of tensor ", i, " has dtype ", t.scalar_type(),
                   "; it has to be float32 or float64");
  TORCH_CHECK_VALUE(t.numel() == 1 && t.is_cpu(), name, " of tensor ", i, " has shape ", t.sizes(),
                    " on ", t.device(), "; it has to be a 0-dim tensor on the CPU");
  set_scalar(row, scalar, t);
}

// beta or beta_prod: one, or, where `by_row`, one a row of the parameter.
void open_row_scalar(StepTensor& row, Scalar scalar, const Tensor& t, const Tensor& param,
                     bool by_row, const char* name, size_t i) {
  if (!by_row) return open_scalar(row, scalar, t, name, i);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name,
                   " of tensor ", i, " has dtype ", t.scalar_type(),
                   "; it has to be float32 or float64");
  TORCH_CHECK_VALUE(
      t.dim() == 1 && param.dim() > 0 && t.size(0) == param.size(0) && t.is_contiguous() &&
          t.is_cpu(),
      name, " of tensor ", i, " has shape ", t.sizes(), " on ", t.device(),
      "; it has to be contiguous on the CPU, with an element for each row of its parameter, ",
      param.sizes());
  set_scalar(row, scalar, t);
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
struct Copies {
  Tensor param, grad, memories[kMemories];

  void store(const Tensor& p, const Tensor* const (&m)[kMemories]) const {
    if (!p.is_same(param)) p.copy_(param);
    for (size_t k = 0; k < kMemories; ++k)
      if (!m[k]->is_same(memories[k])) m[k]->copy_(memories[k]);
  }
};

template <size_t kMemories, class Memory>
void point(StepTensor& row, const Tensor& p, const Tensor& g, Memory memory) {
  row.param = p.data_ptr();
  row.grad = g.const_data_ptr();
  for (size_t k = 0; k < kMemories; ++k) row.memories[k] = memory(k).data_ptr();
}

// by_row: rows have to lie one behind the other. Returns the copies, if there are any.
template <size_t kMemories>
std::unique_ptr<Copies<kMemories>> open_data(StepTensor& row, const Tensor& p, const Tensor& g,
                                             const Tensor* const (&m)[kMemories],
                                             const char* const (&names)[kMemories], bool by_row,
                                             size_t i) {
  const DType dtype = dtype_of(p, "param", i);
  row.dtype = dtype;
  check_like(p, p, "param", i);
  check_like(g, p, "grad", i);
  bool direct =
      g.scalar_type() == p.scalar_type() && p.is_non_overlapping_and_dense() && same_layout(g, p);
  if (by_row && p.size(0) > 1) direct = direct && p.stride(0) * p.size(0) == row.numel;
  at::ScalarType type = memory_type(dtype);
  for (size_t k = 0; k < kMemories; ++k) {
    check_like(*m[k], p, names[k], i);
    direct = direct && m[k]->scalar_type() == memory_type(dtype) && same_layout(*m[k], p);
    type = at::promoteTypes(type, m[k]->scalar_type());
  }
  bool may_guess = p.scalar_type() == type;
  for (const Tensor* memory : m) may_guess = may_guess && memory->scalar_type() == type;
  if (direct) {
    point<kMemories>(row, p, g, [&](size_t k) -> const Tensor& { return *m[k]; });
    row.may_guess = may_guess && row.param != row.grad;
    return nullptr;
  }
  row.may_guess = may_guess && p.const_data_ptr() != g.const_data_ptr();
  // The kernels would not mind, but copies could not be written back.
  TORCH_CHECK(c10::InferenceMode::is_enabled() || !p.is_inference(), "param ", i,
              " was made in inference mode, and cannot be updated in place outside of it");
  at::assert_no_internal_overlap(p);
  for (const Tensor* memory : m) at::assert_no_internal_overlap(*memory);
  auto own = std::make_unique<Copies<kMemories>>();
  const auto copy = [&](const Tensor& t) { return t.to(type).contiguous(); };
  own->param = copy(p);
  own->grad = copy(g);
  for (size_t k = 0; k < kMemories; ++k) own->memories[k] = copy(*m[k]);
  row.dtype = type == at::kDouble ? kFloat64 : kFloat32;
  point<kMemories>(row, own->param, own->grad,
                   [&](size_t k) -> const Tensor& { return own->memories[k]; });
  return own;
}

// ---- the table --------------------------------------------------------------------

// How many hyperparameters a group has beside lr.
constexpr size_t kAdamWColumns = 9, kSGDColumns = 7;

// Whether each tensor's group shares one beta with others; checks the groups.
std::vector<bool> shared_of_tensors(const Options& options, size_t tensors, size_t columns) {
  const size_t n = options.group_sizes.size();
  TORCH_CHECK_VALUE(options.lrs.is_cpu() && options.lrs.scalar_type() == at::kDouble &&
                        options.lrs.is_contiguous() &&
                        options.lrs.numel() == static_cast<int64_t>(n),
                    "lrs has to be a float64 CPU tensor of ", n, " values");
  TORCH_CHECK_VALUE(options.hypers.size() == n * columns, "hypers holds ", options.hypers.size(),
                    " values; it has to hold ", columns, " for each of ", n, " groups");
  std::vector<bool> shared;
  shared.reserve(tensors);
  for (size_t group = 0; group < n; ++group) {
    TORCH_CHECK_VALUE(options.group_sizes[group] >= 0, "group_sizes holds ",
                      options.group_sizes[group]);
    TORCH_CHECK_VALUE(options.group_sizes[group] <= static_cast<int64_t>(tensors - shared.size()),
                      "group_sizes add up to more than params holds: ", tensors);
    shared.insert(shared.end(), options.group_sizes[group],
                  options.hypers[(group + 1) * columns - 1] != 0.0);
  }
  TORCH_CHECK_VALUE(shared.size() == tensors, "group_sizes add up to ", shared.size(),
                    ", params holds ", tensors);
  return shared;
}

// The tables of a step, and what they point to that is nobody else's.
template <size_t kMemories>
class Table {
 public:
  Table(const Options& options, const TensorRefs& packed, size_t tensors, size_t columns)
      : options_(options),
        packed_(packed, options.rounding, tensors),
        shared_(shared_of_tensors(options, tensors, columns)),
        rows_(tensors),
        copies_(tensors) {}

  StepTensor& operator[](size_t i) { return rows_[i]; }
  size_t size() const { return rows_.size(); }

  // Opens tensor i but for its scalars.
  void open(size_t i, const Tensor& p, const Tensor& g, const Tensor* const (&m)[kMemories],
            const char* const (&names)[kMemories], const Tensor& beta) {
    const bool by_row = beta.dim() > 0;
    TORCH_CHECK_VALUE(!by_row || !shared_[i], "beta of tensor ", i, " has shape ", beta.sizes(),
                      "; where it is shared by all tensors it has to be a 0-dim tensor");
    StepTensor& row = rows_[i];
    row.numel = p.numel();
    row.rows = by_row ? beta.size(0) : kNoRows;
    row.packed = packed_.open(row, p, g, m, names, by_row, i);
    if (row.packed == nullptr) copies_[i] = open_data(row, p, g, m, names, by_row, i);
  }

  void store(size_t i, const Tensor& p, const Tensor* const (&m)[kMemories]) const {
    if (copies_[i] != nullptr) copies_[i]->store(p, m);
  }

  Step step() const {
    return {rows_.data(),
            static_cast<int64_t>(rows_.size()),
            options_.group_sizes.data(),
            options_.lrs.template const_data_ptr<double>(),
            options_.hypers.data(),
            static_cast<int64_t>(options_.group_sizes.size()),
            read_optional(options_.grad_scale, 1.0),
            torch_threads()};
  }

  int64_t segments() const {
    int64_t n = 0;
    for (const StepTensor& row : rows_) n += row.rows == kNoRows ? 1 : row.rows;
    return n;
  }

  // Those of the seam, to be read.
  Tensor check_rows(const Tensor& rows) const {
    const int64_t n = segments();
    TORCH_CHECK_VALUE(rows.is_cpu() && rows.scalar_type() == at::kDouble && rows.dim() == 2 &&
                          rows.size(0) == n && rows.size(1) == 2,
                      "rows has to be a float64 CPU tensor of shape [", n, ", 2], not ",
                      rows.scalar_type(), " ", rows.sizes());
    return rows.contiguous();
  }

 private:
  const Options& options_;
  PackedTable<kMemories> packed_;
  std::vector<bool> shared_;
  std::vector<StepTensor> rows_;
  std::vector<std::unique_ptr<Copies<kMemories>>> copies_;
};

template <size_t kMemories>
Tensor new_rows(const Table<kMemories>& table) {
  return at::zeros({table.segments(), 2}, at::kDouble);
}

// finish: what the library does. Then, of the tensors of which the step counts, store(i), what was
// updated in copies, and bump(i), their versions.
template <size_t kMemories, class Finish, class Store, class Bump>
void finish_table(const Table<kMemories>& table, const OptionalTensor& rows, Finish finish,
                  Store store, Bump bump) {
  const Tensor lines = rows.has_value() ? table.check_rows(*rows) : Tensor();
  std::vector<uint8_t> counted(table.size());
  const Step step = table.step();
  finish(&step, rows.has_value() ? lines.const_data_ptr<double>() : nullptr, counted.data());
  for_each_tensor(table.size(), [&](size_t i) {
    if (counted[i] == 0) return;
    store(i);
    bump(i);
  });
}

// Tensor i's of each list in `packed`, of n tensors.
void bump_packed(const TensorRefs& packed, size_t n, size_t i) {
  for (size_t k = i; k < packed.size(); k += n) bump_version(packed[k]);
}

// ---- AM-AdamW ---------------------------------------------------------------------

void check_lengths(const AdamWTensors& t) {
  const size_t n = t.params.size();
  TORCH_CHECK_VALUE(t.grads.size() == n && t.exp_avgs.size() == n && t.exp_avg_sqs.size() == n,
                    "params, grads, exp_avgs and exp_avg_sqs differ in length: ", n, ", ",
                    t.grads.size(), ", ", t.exp_avgs.size(), ", ", t.exp_avg_sqs.size());
  check_length(t.steps, "steps", n);
  check_length(t.beta_prods, "beta_prods", n);
  check_length(t.prev_lrs, "prev_lrs", n);
  check_length(t.betas, "betas", n);
}

Table<2> adamw_table(const AdamWTensors& t, const Options& options) {
  check_lengths(t);
  Table<2> table(options, t.packed, t.params.size(), kAdamWColumns);
  for_each_tensor(table.size(), [&](size_t i) {
    StepTensor& row = table[i];
    const bool by_row = t.betas[i].dim() > 0;
    open_row_scalar(row, kBetaProd, t.beta_prods[i], t.params[i], by_row, "beta_prod", i);
    open_row_scalar(row, kBeta, t.betas[i], t.params[i], by_row, "beta", i);
    open_scalar(row, kStep, t.steps[i], "step", i);
    table.open(i, t.params[i], t.grads[i], {&t.exp_avgs[i], &t.exp_avg_sqs[i]},
               {"exp_avg", "exp_avg_sq"}, t.betas[i]);
    open_scalar(row, kPrevLr, t.prev_lrs[i], "prev_lr", i);
  });
  return table;
}

}  // namespace

Tensor adamw_begin_(const AdamWTensors& t, const Options& options) {
  const Table<2> table = adamw_table(t, options);
  Tensor rows = new_rows(table);
  if (is_skipped(options)) return rows;
  std::vector<uint8_t> guessed(table.size());
  const Step step = table.step();
  adamem_cpu_adamw_begin(&step, rows.mutable_data_ptr<double>(), guessed.data());
  for_each_tensor(table.size(), [&](size_t i) {
    if (guessed[i] != 0) table.store(i, t.params[i], {&t.exp_avgs[i], &t.exp_avg_sqs[i]});
  });
  return rows;
}

void adamw_finish_(const AdamWTensors& t, const Options& options, const OptionalTensor& rows) {
  if (is_skipped(options)) return;
  const Table<2> table = adamw_table(t, options);
  finish_table(
      table, rows, adamem_cpu_adamw_finish,
      [&](size_t i) { table.store(i, t.params[i], {&t.exp_avgs[i], &t.exp_avg_sqs[i]}); },
      [&](size_t i) {
        for (const TensorRefs* list : {&t.params, &t.exp_avgs, &t.exp_avg_sqs, &t.steps,
                                       &t.beta_prods, &t.prev_lrs, &t.betas})
          bump_version_ahead(*list, i);
        bump_packed(t.packed, t.params.size(), i);
      });
}

// ---- AM-SGD -----------------------------------------------------------------------

namespace {

void check_lengths(const SGDTensors& t) {
  const size_t n = t.params.size();
  TORCH_CHECK_VALUE(t.grads.size() == n && t.momentum_buffers.size() == n,
                    "params, grads and momentum_buffers differ in length: ", n, ", ",
                    t.grads.size(), ", ", t.momentum_buffers.size());
  check_length(t.steps, "steps", n);
  check_length(t.prev_lrs, "prev_lrs", n);
  check_length(t.betas, "betas", n);
}

Table<1> sgd_table(const SGDTensors& t, const Options& options) {
  check_lengths(t);
  Table<1> table(options, t.packed, t.params.size(), kSGDColumns);
  for_each_tensor(table.size(), [&](size_t i) {
    StepTensor& row = table[i];
    const bool by_row = t.betas[i].dim() > 0;
    open_row_scalar(row, kBeta, t.betas[i], t.params[i], by_row, "beta", i);
    open_scalar(row, kStep, t.steps[i], "step", i);
    table.open(i, t.params[i], t.grads[i], {&t.momentum_buffers[i]}, {"momentum_buffer"},
               t.betas[i]);
    open_scalar(row, kPrevLr, t.prev_lrs[i], "prev_lr", i);
  });
  return table;
}

}  // namespace

Tensor sgd_begin(const SGDTensors& t, const Options& options) {
  const Table<1> table = sgd_table(t, options);
  Tensor rows = new_rows(table);
  const Step step = table.step();
  adamem_cpu_sgd_begin(&step, rows.mutable_data_ptr<double>());
  return rows;
}

void sgd_finish_(const SGDTensors& t, const Options& options, const OptionalTensor& rows) {
  if (is_skipped(options)) return;
  const Table<1> table = sgd_table(t, options);
  finish_table(
      table, rows, adamem_cpu_sgd_finish,
      [&](size_t i) { table.store(i, t.params[i], {&t.momentum_buffers[i]}); },
      [&](size_t i) {
        for (const TensorRefs* list :
             {&t.params, &t.momentum_buffers, &t.steps, &t.prev_lrs, &t.betas})
          bump_version_ahead(*list, i);
        bump_packed(t.packed, t.params.size(), i);
      });
}

}  // namespace am::cpu
