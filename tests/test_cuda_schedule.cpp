// Walks csrc/cuda/schedule.h with threads in place of blocks, for test_cuda_schedule.py:
//
//   schedule blocks threads launches count... < items
//
// `threads` of the `blocks` run at a time, the others start when one of these is through. The
// counts are numbers of chunks, one a tensor. Says on stderr what was done wrong.
#include <cstdlib>
#include <iostream>
#include <string>

#include "../csrc/cuda/schedule.h"

using namespace am::cuda;

namespace {

[[noreturn]] void fail(const std::string& what, int64_t tensor, int64_t chunk) {
  std::fprintf(stderr, "tensor %ld, chunk %ld: %s\n", long(tensor), long(chunk), what.c_str());
  std::exit(1);
}

// A stand-in for one tensor: what a block writes without an atomic, it has to have the right to.
struct Tensor {
  int64_t chunks;
  std::vector<int> sums, updates;  // times that a chunk was summed, updated, in all launches
  int beta = 0;                    // times that beta was set
};

struct Run {
  std::vector<Tensor> tensors;
  std::vector<Item> items;
  std::vector<Progress> progress;
  Control control = {};
  int launch = 0;  // from 1
};

struct Block {
  Run& run;
  uint32_t number;
  int64_t ahead = 0;

  explicit Block(Run& r) : run(r), number(launch_number(r.control)) {
    ahead = claim_item(run.control);
  }

  int64_t claim() {
    const int64_t claimed = ahead;
    ahead = claim_item(run.control);
    return claimed;
  }

  Item item(int64_t k) const { return run.items[k]; }

  void sum(Item item) {
    Tensor& tensor = run.tensors[item.tensor];
    if (tensor.beta != run.launch - 1) fail("summed after its beta", item.tensor, item.chunk);
    if (tensor.chunks == 0) return;
    if (++tensor.sums[item.chunk] != run.launch) fail("summed twice", item.tensor, item.chunk);
  }

  bool is_last(int32_t i) {
    const int64_t chunks = run.tensors[i].chunks;
    return is_last_of_tensor(run.progress[i], chunks > 0 ? chunks : 1);
  }

  void set_beta(int32_t i) {
    Tensor& tensor = run.tensors[i];
    for (int64_t chunk = 0; chunk < tensor.chunks; ++chunk)
      if (tensor.sums[chunk] != run.launch) fail("beta before its sums", i, chunk);
    if (++tensor.beta != run.launch) fail("beta twice", i, -1);
    publish(run.progress[i], number);
  }

  void wait(int32_t i) {
    while (!is_published(run.progress[i], number)) sched_yield();
  }

  void update(Item item) {
    Tensor& tensor = run.tensors[item.tensor];
    if (tensor.beta != run.launch) fail("updated before its beta", item.tensor, item.chunk);
    if (++tensor.updates[item.chunk] != run.launch) fail("updated twice", item.tensor, item.chunk);
  }
};

void launch(Run& run, unsigned blocks, unsigned threads) {
  ++run.launch;
  std::atomic<unsigned> next{0};
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i)
    running.emplace_back([&] {
      while (next++ < blocks) {
        Block block(run);
        walk(block, static_cast<int64_t>(run.items.size()));
        leave(run.control, blocks, block.number);
      }
    });
  for (std::thread& thread : running) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned blocks = std::atoi(argv[1]), threads = std::atoi(argv[2]);
  const int launches = std::atoi(argv[3]);
  Run run;
  for (int i = 4; i < argc; ++i) {
    const int64_t chunks = std::atoll(argv[i]);
    run.tensors.push_back({chunks, std::vector<int>(chunks), std::vector<int>(chunks), 0});
  }
  for (Item item; std::cin >> item.tensor >> item.chunk;) run.items.push_back(item);
  run.progress.resize(run.tensors.size());
  for (int i = 0; i < launches; ++i) launch(run, blocks, threads);
  for (size_t i = 0; i < run.tensors.size(); ++i) {
    const Tensor& tensor = run.tensors[i];
    if (tensor.beta != launches) fail("beta not set", i, -1);
    for (int64_t chunk = 0; chunk < tensor.chunks; ++chunk)
      if (tensor.updates[chunk] != launches) fail("not updated", i, chunk);
  }
  return 0;
}
