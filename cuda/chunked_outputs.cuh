// The results of a chunked sweep, and their way from registers to memory.
#pragma once
#include "chunked_gates.cuh"

namespace cla {

template <class L> struct ChunkOutputs : ChunkGates<L> {
  using Base = ChunkGates<L>;
  using Base::s, Base::steps, Base::out, Base::warp, Base::group, Base::row0, Base::pair, Base::columns;
  using Base::out_tile, Base::wide_out, Base::decays, Base::anchor, Base::count_at, Base::row_of, Base::tid;
  using Pieces = typename Base::template Pieces<L::COLUMNS, L::SIZE>;
  static constexpr int THREADS = L::THREADS, COLUMNS = L::COLUMNS, PITCH = L::PITCH;
  static constexpr bool BY_COLUMN = L::BY_COLUMN;

  bool waits = false;  // whether there are some in shared memory

  CLA_DEVICE ChunkOutputs(const cla_sweep &s, const Maps<L> &maps) : Base(s, maps) {}

  // The thread's columns of the state (rows of its transpose) within the block, h = 0 or 1.
  CLA_DEVICE int column(int h) const { return 64 * group + 16 * warp + row0 + 8 * h; }

  // Of the chunk at `step`, in `stage`. Output waits in shared memory where there is room for it.
  CLA_DEVICE void finish(float (&acc)[8][4], int stage, int64_t step, int from, int to) {
    CLA_UNROLL
    for (int j = 0; j < 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        const int t = 8 * j + pair + (e & 1), c = column(e >> 1);
        acc[j][e] *= s.out_scale;
        if (BY_COLUMN && t >= from && t < to && c < columns()) {
          acc[j][e] *= exp2_fast(decays()[t * PITCH + c] - anchor()[c]);
        }
        if (L::WIDE_OUT) {
          *wide_out(t, c) = acc[j][e];
        } else if (!L::STAGED_OUT && t >= from && t < to && c < columns()) {
          out.store(steps.token(step + t), c, acc[j][e]);
        }
      }
    }
    if (L::STAGED_OUT && !L::WIDE_OUT) stage_out(acc, out_tile(stage).from_column(64 * group));
    waits = L::STAGED_OUT;
  }

  // The transpose of acc into the output tile: whole rows of it go to memory later, in full lines.
  CLA_DEVICE void stage_out(const float (&acc)[8][4], Tile to) {
    CLA_UNROLL
    for (int j = 0; j < 8; j += 2) {
      uint32_t x[4];
      CLA_UNROLL
      for (int i = 0; i < 4; i++) {
        const float low = acc[j + i / 2][2 * (i & 1)], high = acc[j + i / 2][2 * (i & 1) + 1];
        x[i] = L::IN == CLA_F16 ? pack_f16(low, high) : pack_bf16(low, high);
      }
      store_transposed(to, 8 * j, 16 * warp, x);
    }
  }
  // What waits of the chunk at `step`, which was in `stage`, its steps from..to.
  CLA_DEVICE void flush(Pieces &at, int stage, int64_t step, int from, int to) {
    if (L::WIDE_OUT) {
      constexpr int PER_ROW = COLUMNS / 4, EVERY = THREADS / PER_ROW;
      const int tid = opaque(this->tid);
      const int first = tid / PER_ROW, c = tid % PER_ROW * 4;
      const int64_t stride = (s.reverse ? -4 : 4) * out.token;
      unsigned char *data = out.data + steps.token(0) * out.token * 4 + (step + first) * stride + 4 * c;
      CLA_UNROLL
      for (int i = 0; i < CHUNK / EVERY; i++) {
        const int row = first + i * EVERY;
        if (row >= from && row < to && c < columns()) {
          store16_streaming(data + i * EVERY * stride, load16(wide_out(row, c)));
        }
      }
    } else {
      const unsigned char *data = out_tile(stage).piece(at.row, at.column / 8);
      CLA_UNROLL
      for (int i = 0; i < at.EACH; i++) {
        const int row = at.row + i * at.EVERY;
        if (at.column < columns() && row >= from && row < to) {
          store16_streaming(at.data + i * at.stride, load16(data + i * at.EVERY * 128));
        }
      }
    }
    waits = false;
    if (to == count_at(step)) at.next_chunk();
  }
  CLA_DEVICE void flush(Pieces &at, int stage, int64_t step) { flush(at, stage, step, 0, count_at(step)); }

  // By one thread: the whole chunk at `step`, as sub-tiles.
  CLA_DEVICE void store_tile(int stage, int64_t step) {
    constexpr int EACH = L::WIDE_OUT ? 32 : 64;
    CLA_UNROLL
    for (int c = 0; c < COLUMNS; c += EACH) {
      const void *from = L::WIDE_OUT ? (const void *)wide_out(0, c) : out_tile(stage).from_column(c).base;
      store_subtile(this->maps.out, this->first_column + c, this->first_token(step), this->place.head, steps.batch, from);
    }
  }
  // By all threads: of the chunk at `step`, the steps that there are. Behind them may be those of another sequence.
  CLA_DEVICE void store_rows(int stage, int64_t step) {
    constexpr int EACH = L::WIDE_OUT ? 4 : 8, PER_ROW = COLUMNS / EACH;
    for (int i = tid; i < count_at(step) * PER_ROW; i += THREADS) {
      const int t = i / PER_ROW, c = i % PER_ROW * EACH, row = row_of(t);
      if (c >= columns()) continue;
      const void *from = L::WIDE_OUT ? (const void *)wide_out(row, c) : out_tile(stage).piece(row, c / 8);
      store16_streaming(out.row(steps.token(step + t)) + 16 / EACH * c, load16(from));
    }
  }
};

}  // namespace cla
