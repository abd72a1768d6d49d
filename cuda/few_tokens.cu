// A sweep token by token over so few tokens that it waits for its states: decoding. They are read and written once, whole
// lines a warp and 16 bytes a thread, with all loads under way before the first is used; so each warp has some of the rows of
// all of a block's 32 columns, and what is read of a state is summed up through shared memory.
#include "few_tokens.cuh"

namespace cla {

constexpr int BLOCK_COLUMNS = 32, COLUMN_GROUPS = 8, ROW_GROUPS = 16, FEW_THREADS = COLUMN_GROUPS * ROW_GROUPS;

// Thread (x, y) has columns 4 x to 4 x + 3 of rows y, y + 16, y + 32, ... of which there are EACH.
template <int EACH>
CLA_KERNEL(FEW_THREADS, EACH > 8 ? 2 : 8) void few_tokens_kernel(const CLA_CONSTANT cla_sweep s) {
  const int tid = thread_index(), x = tid % COLUMN_GROUPS, y = tid / COLUMN_GROUPS;
  // Neighbouring blocks have neighbouring columns: their rows lie side by side in memory.
  const int tiles = (s.cols + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  const Place place(block_x() / tiles, s.heads, 1);
  const Steps steps(s.cu_seqlens, s.tokens, place.sequence, s.reverse);
  const int block_column = block_x() % tiles * BLOCK_COLUMNS, column = block_column + 4 * x;
  const bool rows_fade = s.gate_kind == CLA_GATE_ROWS, cols_fade = s.gate_kind == CLA_GATE_COLS;

  // Of the step at hand: read, write and decay of the rows, value and decay of the columns; then sums over rows.
  float *shared = (float *)shared_memory();
  float *read_row = shared, *write_row = shared + ROW_GROUPS * EACH, *row_decay = shared + 2 * ROW_GROUPS * EACH;
  float *value_row = shared + 3 * ROW_GROUPS * EACH, *column_decay = value_row + BLOCK_COLUMNS;
  float *sums = column_decay + BLOCK_COLUMNS;  // [warps, columns]

  float state[EACH][4];
  const float *first = s.first.data ? s.first.data + place.sequence * s.first.sequence + place.head * s.first.head : nullptr;
  const bool first_in_pieces = first && s.first.col == 1 && s.first.row % 4 == 0 && ((uintptr_t)first & 15) == 0;
  CLA_UNROLL
  for (int i = 0; i < EACH; i++) {
    const int row = y + ROW_GROUPS * i;
    const bool valid = first && row < s.rows;
    if (valid && first_in_pieces && column + 4 <= s.cols) {
      load4(state[i], first + row * s.first.row + column);
    } else {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) {
        state[i][c] = valid && column + c < s.cols ? first[row * s.first.row + (column + c) * s.first.col] : 0.f;
      }
    }
  }
  // Log decays of what a thread has: the whole state's, then by row or column.
  auto fade = [&](auto log_decay) {
    float by_column[4];
    CLA_UNROLL
    for (int c = 0; c < 4; c++) by_column[c] = cols_fade && column + c < s.cols ? exp_fast(log_decay(column + c)) : 1.f;
    const float whole = s.gate_kind == CLA_GATE_SCALAR ? exp_fast(log_decay(0)) : 1.f;
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      const int row = y + ROW_GROUPS * i;
      const float by_row = rows_fade && row < s.rows ? exp_fast(log_decay(row)) : whole;
      CLA_UNROLL
      for (int c = 0; c < 4; c++) state[i][c] *= by_row * by_column[c];
    }
  };

  for (int64_t step = 0; step < steps.count; step++) {
    const int64_t t = steps.token(step);
    // Made anew for each step, out of what is in constant memory: registers are for the state, so that many blocks are there
    // when all that decoding does is to wait for memory.
    const int head = opaque(place.head);
    const Rows read(s.read, steps.batch, head), write(s.write, steps.batch, head), value(s.value, steps.batch, head),
        gate(s.gate, steps.batch, head);
    CLA_NO_UNROLL
    for (int r = tid; r < ROW_GROUPS * EACH; r += FEW_THREADS) {
      const bool valid = r < s.rows;
      read_row[r] = valid ? read.load(t, r) : 0.f;
      write_row[r] = valid && s.writes && steps.writes(s, step) ? write.load(t, r) : 0.f;
      const float decay = !valid || cols_fade || s.gate_kind == CLA_NO_GATE
                              ? 1.f
                              : exp_fast(steps.decay_before(gate, step, rows_fade ? r : 0));
      // Not where the state is loaded: that would wait for it, with nothing else under way.
      row_decay[r] = step == 0 ? decay * s.first_scale : decay;
    }
    if (tid < BLOCK_COLUMNS) {
      const bool valid = block_column + tid < s.cols;
      value_row[tid] = valid ? value.load(t, block_column + tid) : 0.f;
      column_decay[tid] = valid && cols_fade ? exp_fast(steps.decay_before(gate, step, block_column + tid)) : 1.f;
    }
    barrier();
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      const int row = y + ROW_GROUPS * i;
      const float q = read_row[row], k = write_row[row], decay = row_decay[row];
      CLA_UNROLL
      for (int c = 0; c < 4; c++) {
        const float faded = state[i][c] * (decay * column_decay[4 * x + c]);
        state[i][c] = faded + k * value_row[4 * x + c];
        sum[c] += q * (s.inclusive ? state[i][c] : faded);
      }
    }
    if (s.out.data) {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) {
        sum[c] += shuffle_xor(sum[c], 8);
        sum[c] += shuffle_xor(sum[c], 16);
        if ((tid & 31) < COLUMN_GROUPS) sums[(tid / 32) * BLOCK_COLUMNS + 4 * x + c] = sum[c];
      }
    }
    barrier();
    if (s.out.data && tid < BLOCK_COLUMNS && block_column + tid < s.cols) {
      float total = 0.f;
      CLA_UNROLL
      for (int w = 0; w < FEW_THREADS / 32; w++) total += sums[w * BLOCK_COLUMNS + tid];
      Rows(s.out, steps.batch, opaque(place.head)).store(t, block_column + tid, s.out_scale * total);
    }
  }

  if (!s.last.data) return;
  const float scale = steps.count == 0 ? s.last_scale * s.first_scale : s.last_scale;
  if (s.gate_kind != CLA_NO_GATE && s.reverse && steps.count > 0) {
    const Rows gate(s.gate, steps.batch, place.head);
    fade([&](int d) { return steps.decay_after(gate, d); });
  }
  float *last = s.last.data + place.sequence * s.last.sequence + place.head * s.last.head;
  const bool last_in_pieces = s.last.col == 1 && s.last.row % 4 == 0 && ((uintptr_t)last & 15) == 0;
  CLA_UNROLL
  for (int i = 0; i < EACH; i++) {
    const int row = y + ROW_GROUPS * i;
    if (row >= s.rows) continue;
    CLA_UNROLL
    for (int c = 0; c < 4; c++) state[i][c] *= scale;
    if (last_in_pieces && column + 4 <= s.cols) {
      store4(last + row * s.last.row + column, state[i]);
    } else {
      CLA_UNROLL
      for (int c = 0; c < 4; c++) {
        if (column + c < s.cols) last[row * s.last.row + (column + c) * s.last.col] = state[i][c];
      }
    }
  }
}

template <int EACH> int32_t launch_few_tokens(const cla_sweep &s, void *stream) {
  const Dims grid = {(int64_t)s.sequences * s.heads * ((s.cols + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS), 1};
  const int floats = 3 * ROW_GROUPS * EACH + 2 * BLOCK_COLUMNS + FEW_THREADS / 32 * BLOCK_COLUMNS;
  return launch(few_tokens_kernel<EACH>, grid, FEW_THREADS, 4 * floats, stream, s);
}

int32_t sweep_few_tokens(const cla_sweep &s, void *stream) {
  if (s.rows <= 16) return launch_few_tokens<1>(s, stream);
  if (s.rows <= 32) return launch_few_tokens<2>(s, stream);
  if (s.rows <= 64) return launch_few_tokens<4>(s, stream);
  if (s.rows <= 128) return launch_few_tokens<8>(s, stream);
  static_assert(ROW_GROUPS * 16 == CLA_RECURRENT_ROWS, "the most that threads have");
  return launch_few_tokens<16>(s, stream);
}

}  // namespace cla
