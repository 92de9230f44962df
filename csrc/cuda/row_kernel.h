// The kernel for units of rows. A row's elements are read once: what its update takes of them stays
// on chip, in shared memory, until its sums are there, and with them its beta.
//
// A row has a team of threads, a block's or some of a warp's, and a chunk's rows are taken by
// turns. What a thread holds it reads back itself. A half of a step takes the sums alone, or the
// update alone; so does, one after the other, all of a step where it may be none, or where a row is
// too long to be held (of float64). A memory in few bits is rounded once: the last one when the
// sums are taken, the first one with the parameter.
#pragma once

#include "kernels.h"

namespace am::cuda {

extern __shared__ uint4 shared_memory[];

// So that a team's access to a list takes whole sectors of 32 bytes.
constexpr int kLeastTeam = 4;
// The longest piece of a warp, and what a block holds at most of an element.
constexpr int kPiece = 8 * kWarp;
constexpr int kMostHeld = 4;

// How many threads a multiprocessor is to have, by its registers: with 16-bit types not as many as
// begin has, for what they hold. And the largest block: the power of 2 below.
constexpr int rows_threads(int blocks) { return blocks == kBlocks16Bit ? 640 : blocks * kThreads; }
constexpr int most_threads(int blocks) { return blocks < 4 ? 2 * kThreads : 4 * kThreads; }

// How a launch's blocks are divided.
struct RowsLaunch {
  int team;   // threads to a row, a power of 2
  int teams;  // of a block; 1 where a warp is not enough
  int slots;  // pieces that a team can hold
};

// kHeld numbers of each of a team's elements, in shared memory. A warp's access to one of them is
// to one stretch of memory, of 16 bytes a thread.
template <class T, int kHeld, int kVector>
struct Held {
  static constexpr int kWide = 16 / sizeof(T);
  static constexpr int kPart = kVector < kWide ? kVector : kWide;

  struct alignas(kPart * sizeof(T)) Part {
    T values[kPart];
  };

  static constexpr int kSlotBytes = kHeld * kVector * sizeof(T);

  Part* parts;
  int slots;

  __device__ Part& at(int which, int j, int slot) const {
    return parts[(which * (kVector / kPart) + j / kPart) * slots + slot];
  }

  template <class Own, int kCount>
  __device__ void put(Own piece, const T (&values)[kCount][kHeld]) const {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if constexpr (kCount == 1) {
        at(h, piece.j, piece.slot).values[piece.j % kPart] = values[0][h];
      } else {
#pragma unroll
        for (int first = 0; first < kCount; first += kPart) {
          Part part;
#pragma unroll
          for (int i = 0; i < kPart; ++i) part.values[i] = values[first + i][h];
          at(h, first, piece.slot) = part;
        }
      }
    }
  }

  template <class Own, int kCount>
  __device__ void get(Own piece, T (&values)[kCount][kHeld]) const {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if constexpr (kCount == 1) {
        values[0][h] = at(h, piece.j, piece.slot).values[piece.j % kPart];
      } else {
#pragma unroll
        for (int first = 0; first < kCount; first += kPart) {
          const Part part = at(h, first, piece.slot);
#pragma unroll
          for (int i = 0; i < kPart; ++i) values[first + i][h] = part.values[i];
        }
      }
    }
  }
};

// What a unit's rows share, in shared memory: read from the tables once. It takes so many bytes at
// most.
constexpr int kMostShared = 512;

template <class O>
struct Shared {
  typename O::TensorRow line;
  typename O::Coefficients coefficients;
  typename O::Chunk::Tensor tensor;
  Scalars<O::kScalars> scalars;

  // By all threads of the block.
  __device__ void read(const Step& s, int64_t unit) {
    const auto* words = reinterpret_cast<const double*>(&O::row(s, unit));
    for (int k = static_cast<int>(threadIdx.x); k < O::kColumns; k += static_cast<int>(blockDim.x))
      reinterpret_cast<double*>(&line)[k] = words[k];
    if (threadIdx.x == 0) {
      tensor = O::Chunk::Tensor::of(s, unit);
      scalars = O::scalars(s, unit);
    }
    __syncthreads();
    if (threadIdx.x == 0) coefficients = narrow_all<typename O::Compute>(line.coefficients);
    __syncthreads();
  }
};

template <class O>
using HeldBy = Held<typename O::Compute, O::kHeld, O::Chunk::kVector>;

// The sum over the lanes of each part of a warp that has so many.
__device__ inline Sums add_over_lanes(Sums sums, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sums.num += __shfl_xor_sync(0xFFFFFFFFu, sums.num, offset);
    sums.den += __shfl_xor_sync(0xFFFFFFFFu, sums.den, offset);
  }
  return sums;
}

// The sum over a team in a fixed order, for all of its threads. What they have read before can be
// written behind it. warps: not those of the call before.
__device__ inline Sums add_over_team(Sums (&warps)[kWarp], Team team, double num, double den) {
  Sums sums = add_over_lanes({num, den}, team.width());
  if (team.size > kWarp) {
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    sums = add_over_lanes(lane < team.size / kWarp ? warps[lane] : Sums{0.0, 0.0}, kWarp);
  }
  __syncwarp();
  return sums;
}

// A row's sums. Where kHolds, what its update takes goes to `held`, and the last memory, which
// depends on no beta, is written; the row that lies so many elements ahead, if any, is on its way
// to L2 meanwhile.
template <class O, bool kHolds>
__device__ __forceinline__ void row_sums(const typename O::Chunk& row, Team team,
                                         const typename O::TensorRow& line,
                                         const typename O::Coefficients& c, const HeldBy<O>& held,
                                         int ahead, typename O::Compute& num,
                                         typename O::Compute& den) {
  using T = typename O::Compute;
  row.for_each_piece(team, [&](auto piece) {
    constexpr int kCount = decltype(piece)::kCount;
    T g[kCount], m[O::kMemories][kCount], x[kCount], kept[kCount][O::kHeld] = {};
    if (kHolds && ahead > 0) row.prefetch(piece, ahead);
    row.template load<kHolds ? Use::kLast : Use::kAgain, true>(piece, g, m, x);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (piece.has(j))
        O::add(line, c, g[j], m[0][j], m[O::kMemories - 1][j], x[j], num, den, kept[j]);
    if constexpr (kHolds) {
      held.put(piece, kept);
      if constexpr (O::kMemories > 1)
        row.store_memory(piece, 1, m[1], row.random_of_memories(piece));
    }
  });
}

// The rest of the update of a row that is held.
template <class O>
__device__ __forceinline__ void move_row(const typename O::Chunk& row, Team team,
                                         const typename O::Coefficients& c,
                                         const typename O::Amount& amount, const HeldBy<O>& held) {
  using T = typename O::Compute;
  row.for_each_piece(team, [&](auto piece) {
    constexpr int kCount = decltype(piece)::kCount;
    T d[kCount], x[kCount], kept[kCount][O::kHeld];
    held.get(piece, kept);
#pragma unroll
    for (int j = 0; j < kCount; ++j) O::move(c, amount, kept[j], d[j], x[j]);
    row.store_memory(piece, 0, d, row.random_of_memories(piece));
    row.store_param(piece, x);
  });
}

template <class O>
__global__ void __launch_bounds__(rows_threads(O::Chunk::kBlocks), 1)
    rows_kernel(const __grid_constant__ Step step, const __grid_constant__ Bucket bucket,
                const __grid_constant__ RowsLaunch launch) {
  using T = typename O::Compute;
  constexpr int kVector = O::Chunk::kVector;
  __shared__ Sums warps[2][kWarp];
  __shared__ Shared<O> unit;
  static_assert(sizeof(unit) <= kMostShared);
  const RowsPlace place(step, bucket.first_chunk + blockIdx.x);
  unit.read(step, place.unit);
  const typename O::TensorRow& line = unit.line;
  if (line.begin == kNothing && step.part != kBegin) return;
  const int own = static_cast<int>(threadIdx.x) / launch.team;
  const Team team = {static_cast<int>(threadIdx.x) & (launch.team - 1), launch.team};
  auto* parts = reinterpret_cast<typename HeldBy<O>::Part*>(shared_memory);
  const int each = launch.slots * (HeldBy<O>::kSlotBytes / sizeof(*parts));
  const HeldBy<O> held = {parts + own * each, launch.slots};
  const auto seam = [&](int64_t row) -> Sums& {
    return step.rows[layout_at(step, kFirstSegment, place.unit) + row];
  };
  const bool is_done = line.begin == kNothing || !O::has_sums(line);
  const bool holds = step.part == kWhole && !is_done && !may_be_none(line) &&
                     place.numel <= launch.slots * kVector;
  for (int first = 0; first < place.count; first += launch.teams) {
    const int i = first + own;
    // A team without a row goes along: its warp's others may have one.
    const bool exists = i < place.count;
    const int64_t k = place.first + (exists ? i : 0);
    const typename O::Chunk row(unit.tensor, bucket, line.rounding, k * place.numel,
                                exists ? place.numel : 0);
    typename O::Coefficients c = unit.coefficients;
    O::correct(c, unit.scalars, line, k);
    T num = 0, den = 0;
    Sums sums = {0.0, 0.0};
    if (step.part == kFinish) {
      if (exists && team.rank == 0) sums = seam(k);
    } else if (!is_done) {
      if (holds) {
        const bool goes_on = i + launch.teams < place.count;
        row_sums<O, true>(row, team, line, c, held, goes_on ? launch.teams * place.numel : 0, num,
                          den);
      } else {
        row_sums<O, false>(row, team, line, c, held, 0, num, den);
      }
      sums = {static_cast<double>(num), static_cast<double>(den)};
    }
    sums = add_over_team(warps[first & 1], team, sums.num, sums.den);
    if (step.part != kFinish) sums = O::chunk_sums(line, sums);
    if (!exists) continue;
    if (step.part == kBegin) {
      if (team.rank == 0) seam(k) = sums;
      continue;
    }
    if (is_idle(line.step, line.coefficients.lr, sums.den)) continue;
    const double beta = O::beta_of(line, sums);
    const typename O::Amount amount = O::amount_of(line, beta);
    if (holds) {
      // Its coefficients are the tensor's.
      move_row<O>(row, team, unit.coefficients, amount, held);
    } else {
      O::update(row, team, c, amount);
    }
    if (team.rank == 0) {
      O::write_segment(unit.scalars, beta, k);
      // The same values from all of the tensor's rows that have a gradient.
      if (may_be_none(line)) O::write_step(unit.scalars, line);
    }
  }
}

}  // namespace am::cuda
