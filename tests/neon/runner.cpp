// Runs the cases of tests/test_neon.py by the CPU kernels that it is linked with.
//
//   runner CASES RESULTS
//
// A case is a memory, tables and tensors in one piece, in which a pointer is a place in it, and the
// calls that work on it. CASES has of each, in words of 8 bytes: the memory's words, and how many
// pointers and calls there are; the memory; the places of its pointers; and the calls, kCallWords
// each. RESULTS has the memories as the calls have left them.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/library.h"

namespace {

using namespace am::cpu;

enum Function { kAdamWBegin, kAdamWFinish, kSGDBegin, kSGDFinish, kSquares };

constexpr size_t kCallWords = 5;

void check(bool is_fine, const char* what) {
  if (is_fine) return;
  std::fprintf(stderr, "runner: %s\n", what);
  std::exit(1);
}

std::vector<int64_t> read_words(std::FILE* file, int64_t n) {
  std::vector<int64_t> words(n);
  check(std::fread(words.data(), 8, n, file) == words.size(), "the file of cases is cut off");
  return words;
}

// call: a Function and its arguments, which are places, or -1 for none.
void run(const int64_t* call, char* memory) {
  const auto at = [&](int k) { return call[k] < 0 ? nullptr : memory + call[k]; };
  const auto step = reinterpret_cast<const Step*>(at(1));
  const auto rows = reinterpret_cast<double*>(at(2));
  const auto flags = reinterpret_cast<uint8_t*>(at(3));
  switch (call[0]) {
    case kAdamWBegin:
      return adamem_cpu_adamw_begin(step, rows, flags);
    case kAdamWFinish:
      return adamem_cpu_adamw_finish(step, rows, flags);
    case kSGDBegin:
      return adamem_cpu_sgd_begin(step, rows);
    case kSGDFinish:
      return adamem_cpu_sgd_finish(step, rows, flags);
    case kSquares:
      return adamem_cpu_squares(reinterpret_cast<const Elements*>(at(1)), call[2],
                                reinterpret_cast<const Threads*>(at(3)),
                                reinterpret_cast<double*>(at(4)));
  }
  check(false, "no such function");
}

// A pointer that is a place in the memory becomes an address, and an address a place.
void move_pointers(std::vector<int64_t>& memory, const std::vector<int64_t>& pointers,
                   int64_t distance) {
  for (const int64_t place : pointers) memory[place / 8] += distance;
}

}  // namespace

int main(int argc, char** argv) {
  check(argc == 3, "runner CASES RESULTS");
  std::FILE* const cases = std::fopen(argv[1], "rb");
  std::FILE* const results = std::fopen(argv[2], "wb");
  check(cases != nullptr && results != nullptr, "a file cannot be opened");
  int64_t sizes[3];
  while (std::fread(sizes, 8, 3, cases) == 3) {
    std::vector<int64_t> memory = read_words(cases, sizes[0]);
    const std::vector<int64_t> pointers = read_words(cases, sizes[1]);
    const std::vector<int64_t> calls = read_words(cases, sizes[2] * kCallWords);
    const auto base = reinterpret_cast<int64_t>(memory.data());
    move_pointers(memory, pointers, base);
    for (size_t i = 0; i < calls.size(); i += kCallWords)
      run(&calls[i], reinterpret_cast<char*>(memory.data()));
    move_pointers(memory, pointers, -base);
    check(std::fwrite(memory.data(), 8, memory.size(), results) == memory.size(), "disk full");
  }
  check(std::fclose(results) == 0, "disk full");
}
