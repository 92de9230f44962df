// describe: what a step's tables are made of; and bump_versions.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string_view>
#include <vector>

#include "functions.h"
#include "layouts.h"
#include "python.h"
#include "tensor_refs.h"

namespace am {
namespace {

using at::Tensor;

// Words that most often are those of the last time: then they are only compared, which takes less
// time than writing them.
class Words {
 public:
  // last: bytes.
  explicit Words(PyObject* last) : last_(last) {
    const std::string_view bytes = view_of(last);
    TORCH_CHECK_VALUE(bytes.size() % sizeof(int64_t) == 0, "expected bytes of whole words");
    begin_ = next_ = reinterpret_cast<const int64_t*>(bytes.data());
    end_ = begin_ + bytes.size() / sizeof(int64_t);
  }

  void push(int64_t word) {
    if (next_ != end_ && *next_ == word) {
      ++next_;
    } else {
      push_other(word);
    }
  }

  void push(at::IntArrayRef words) {
    for (const int64_t word : words) push(word);
  }

  // As bytes: the last ones themselves, if they are these.
  Owned finish() {
    if (!differs_ && next_ == end_) return Owned::share(last_);
    begin_others();
    const char* bytes = reinterpret_cast<const char*>(others_.data());
    return Owned::take(PyBytes_FromStringAndSize(
        bytes, static_cast<Py_ssize_t>(others_.size() * sizeof(int64_t))));
  }

 private:
  [[gnu::noinline]] void push_other(int64_t word) {
    begin_others();
    others_.push_back(word);
  }

  void begin_others() {
    if (differs_) return;
    differs_ = true;
    others_.reserve(end_ - begin_ + 1);
    others_.assign(begin_, next_);
    next_ = end_;
  }

  PyObject* last_;
  const int64_t *begin_, *next_, *end_;
  bool differs_ = false;  // then all are in others_, and next_ is end_
  std::vector<int64_t> others_;
};

// dtype, device and number of dimensions in a word.
int64_t kind_of(const Tensor& t) {
  const auto byte = [](auto value) { return static_cast<int64_t>(value) & 0xff; };
  const c10::Device device = t.device();
  return byte(t.scalar_type()) << 32 | byte(device.type()) << 24 | byte(device.index()) << 16 |
         t.dim();
}

}  // namespace

// Tells autograd that tensors were written to, as torch.autograd.graph.increment_version does.
PyObject* bump_versions(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    Arguments read("bump_versions", args, size, 1);
    const TensorRefs refs = refs_of(read.list());
    for (size_t i = 0; i < refs.size(); ++i) bump_version_ahead(refs, i);
    return none();
  });
}

// The addresses of the tensors, list by list, and all else about them that tables are made
// of: dtypes, devices, layouts, shapes and strides. Where
// they are what they were, the very objects that are given as the last ones.
//
// updated: bumps the versions of all but the gradients, in this walk: a walk of its own would
// take as long as half of this one.
PyObject* describe(PyObject*, PyObject* const* args, Py_ssize_t size) {
  return call([&] {
    constexpr Py_ssize_t kGrads = 1;
    Arguments read("describe", args, size, 4);
    PyObject* const lists = read.tuple();
    Words addresses(read.bytes()), structure(read.bytes());
    const bool updated = read.boolean();
    for (Py_ssize_t k = 0; k < PyTuple_Size(lists); ++k) {
      const TensorRefs refs = refs_of(PyTuple_GetItem(lists, k));
      const bool bump = updated && k != kGrads;
      for_each_ahead(refs, [&](size_t i) {
        const Tensor& t = refs[i];
        if (bump) bump_version_ahead(refs, i);
        addresses.push(address_of(t));
        // These have the layout, and whether it was made in inference mode.
        structure.push(static_cast<int64_t>(t.key_set().raw_repr()));
        structure.push(kind_of(t));
        structure.push(t.sizes());
        structure.push(t.strides());
      });
    }
    std::vector<Owned> result;
    result.push_back(addresses.finish());
    result.push_back(structure.finish());
    return tuple_of(std::move(result));
  });
}

}  // namespace am
