// A sweep token by token, in the order of the definition: short sequences, and whatever the chunked kernels do not take.
#include "few_tokens.cuh"
#include "state_tile.cuh"

namespace cla {

// Which vectors can be copied.
enum { READ_COPIED = 1, WRITE_COPIED = 2, VALUE_COPIED = 4, GATE_COPIED = 8 };

template <int ROWS> struct Recurrent {
  using State = StateTile<ROWS>;
  static constexpr int COLUMNS = State::COLUMNS, GROUP = TILE_WARPS;
  using Groups = TokenGroups<GROUP>;
  // The vectors of a token in shared memory, and its output.
  static constexpr int READ = 0, WRITE = ROWS, VALUE = 2 * ROWS, DECAY = VALUE + COLUMNS;
  static constexpr int TOKEN = DECAY + (ROWS > COLUMNS ? ROWS : COLUMNS);
  static constexpr int OUTS = 2 * GROUP * TOKEN, SHARED = 4 * (OUTS + 2 * GROUP * COLUMNS);

  const cla_sweep &s;
  const int copied;
  float *shared;
  Place at;
  int first_column;
  Steps steps;
  Groups groups;
  TokenVector read, write, value, gate;
  State state;

  CLA_DEVICE Recurrent(const cla_sweep &s, int copied, unsigned tiles)
      : s(s), copied(copied), shared((float *)shared_memory()), at(place_of(block_x() / tiles, s.heads)),
        first_column(block_x() % tiles * COLUMNS), steps(s.cu_seqlens, s.tokens, at.sequence, s.reverse),
        groups(steps.count, s.reverse), read(s.read, steps.batch, at.head), write(s.write, steps.batch, at.head),
        value(s.value, steps.batch, at.head), gate(s.gate, steps.batch, at.head) {}

  CLA_DEVICE int columns() const { return s.cols - first_column < COLUMNS ? s.cols - first_column : COLUMNS; }
  CLA_DEVICE static int warp() { return State::warp(); }
  CLA_DEVICE static int lane() { return State::lane(); }
  CLA_DEVICE float *token(int group, int i) const { return shared + ((group & 1) * GROUP + i) * TOKEN; }
  CLA_DEVICE float *out(int group, int i) const { return shared + OUTS + ((group & 1) * GROUP + i) * COLUMNS; }
  CLA_DEVICE bool by_row() const { return s.gate_kind == CLA_GATE_ROWS; }
  CLA_DEVICE bool by_column() const { return s.gate_kind == CLA_GATE_COLS; }
  CLA_DEVICE bool by_token() const { return s.gate_kind == CLA_GATE_SCALAR; }

  // Asks for the vectors of a warp's token, and returns its log decay if that is one number. Between two tokens it is that of
  // the later one, whichever comes first.
  CLA_DEVICE float fetch(int group) const {
    if (warp() >= groups.size(group)) return 0.f;
    const int64_t place = groups.place(group, warp()), t = steps.start + place, faded_by = s.reverse ? place + 1 : place;
    const int64_t step = s.reverse ? steps.count - 1 - place : place;
    const bool fades = faded_by < steps.count, writes = s.writes && steps.writes(s, step);
    float *to = token(group, warp());
    read.fetch<ROWS>(s.read, copied & READ_COPIED, t, 0, s.rows, to + READ);
    write.fetch<ROWS>(s.write, copied & WRITE_COPIED, t, 0, writes ? s.rows : 0, to + WRITE);
    value.fetch<COLUMNS>(s.value, copied & VALUE_COPIED, t, first_column, s.cols, to + VALUE);
    const bool whole = copied & GATE_COPIED;
    const int64_t by = steps.start + faded_by;
    if (by_row()) gate.fetch<ROWS>(s.gate, whole, by, 0, fades ? s.rows : 0, to + DECAY);
    if (by_column()) gate.fetch<COLUMNS>(s.gate, whole, by, first_column, fades ? s.cols : 0, to + DECAY);
    copies_commit();
    return by_token() && fades ? load_element(gate.data, s.gate.dtype, by * s.gate.token) : 0.f;
  }
  CLA_DEVICE void place(int group, float log_decay) const {
    if (warp() >= groups.size(group)) return;
    float *to = token(group, warp());
    const auto decay = [](float g) { return exp_fast(g); };
    copies_wait<0>();
    TokenVector::convert<ROWS>(s.read, copied & READ_COPIED, to + READ);
    TokenVector::convert<ROWS>(s.write, copied & WRITE_COPIED, to + WRITE);
    TokenVector::convert<COLUMNS>(s.value, copied & VALUE_COPIED, to + VALUE);
    if (by_row()) TokenVector::convert<ROWS>(s.gate, copied & GATE_COPIED, to + DECAY, decay);
    if (by_column()) TokenVector::convert<COLUMNS>(s.gate, copied & GATE_COPIED, to + DECAY, decay);
    if (by_token() && lane() == 0) to[DECAY] = decay(log_decay);
  }
  CLA_DEVICE void fade(const float *decay) {
    if (by_row()) {
      state.scale_rows(decay);
    } else if (by_column()) {
      float by[State::WIDTH];
      state.by_column(decay, by);
      state.scale_columns(by);
    } else if (by_token()) {
      state.scale_columns({decay[0], decay[0]});
    }
  }
  // The faded state at the last token of a segment.
  CLA_DEVICE void keep(int64_t place) {
    if (place + 1 != steps.count && (place + 1) % s.segment != 0) return;
    Place end = at;
    end.segment = place / s.segment;
    float *to = s.ends + end.index(s.heads, s.segments) * s.ends_rows * (int64_t)s.cols;
    state.store(to + first_column, s.cols, 1, s.rows, columns(), s.last_scale);
  }
  CLA_DEVICE void solve(int group, int i) {
    const float *of = token(group, i);
    // Not where it is loaded: that would wait for it, with nothing else under way.
    if (group == 0 && i == 0 && s.first.data) state.scale_columns({s.first_scale, s.first_scale});
    fade(of + DECAY);
    if (s.ends) keep(groups.place(group, i));
    float sum = 0.f;
    if (s.out.data && !s.inclusive) sum = state.read(of + READ);
    if (s.writes) {
      float column[State::WIDTH];
      state.by_column(of + VALUE, column);
      state.add(of + WRITE, column);
    }
    if (s.out.data && s.inclusive) sum = state.read(of + READ);
    if (State::is_set(0)) out(group, i)[state.own_column()] = s.out_scale * sum;
  }
  // A warp has all of a token's outputs.
  CLA_DEVICE void store(int group) const {
    if (!s.out.data || warp() >= groups.size(group)) return;
    const Rows rows(s.out, steps.batch, opaque(at.head));
    const int64_t t = steps.start + groups.place(group, warp());
    for (int c = lane(); c < columns(); c += 32) rows.store(t, first_column + c, out(group, warp())[c]);
  }

  CLA_DEVICE void begin() {
    if (s.first.data) {
      const float *from =
          s.first.data + at.sequence * s.first.sequence + at.head * s.first.head + first_column * s.first.col;
      state.load(from, s.first.row, s.first.col, s.rows, columns());
    } else {
      state.zero();
    }
  }
  CLA_DEVICE void run() {
    for_groups(
        groups, warp() * State::OF_WARP < columns(), [&] { begin(); }, [&](int group) { return fetch(group); },
        [&](int group, float log_decay) { place(group, log_decay); }, [&](int group, int i) { solve(group, i); },
        [&](int group) { store(group); });
    if (!s.last.data) return;
    if (s.reverse && steps.count > 0 && s.gate_kind != CLA_NO_GATE) fade_after();
    float *to = s.last.data + at.sequence * s.last.sequence + at.head * s.last.head + first_column * s.last.col;
    const float scale = steps.count == 0 ? s.last_scale * s.first_scale : s.last_scale;
    state.store(to, s.last.row, s.last.col, s.rows, columns(), scale);
  }
  // What is due after the last step.
  CLA_DEVICE void fade_after() {
    const Rows gates(s.gate, steps.batch, at.head);
    state.each([&](int i, int c) {
      const int row = state.row(i), column = first_column + state.column + c;
      if (row >= s.rows || column >= s.cols) return;
      state.x[i][c] *= exp_fast(steps.decay_after(gates, by_row() ? row : by_column() ? column : 0));
    });
  }
};

template <int ROWS>
CLA_KERNEL(TILE_THREADS, ROWS > 128 ? 1 : 2)
void recurrent_kernel(const CLA_CONSTANT cla_sweep s, int copied) {
  // Neighbouring blocks have neighbouring columns: their rows lie side by side in memory.
  Recurrent<ROWS>(s, copied, (s.cols + StateTile<ROWS>::COLUMNS - 1) / StateTile<ROWS>::COLUMNS).run();
}

template <int ROWS> int32_t launch_recurrent(const cla_sweep &s, void *stream) {
  using Kernel = Recurrent<ROWS>;
  const Dims grid = {(int64_t)s.sequences * s.heads * ((s.cols + Kernel::COLUMNS - 1) / Kernel::COLUMNS), 1};
  const int copied = (can_be_copied(s.read, s.rows) ? READ_COPIED : 0) | (can_be_copied(s.write, s.rows) ? WRITE_COPIED : 0) |
                     (can_be_copied(s.value, s.cols) ? VALUE_COPIED : 0) |
                     (can_be_copied(s.gate, s.gate_kind == CLA_GATE_ROWS ? s.rows : s.cols) ? GATE_COPIED : 0);
  return launch(recurrent_kernel<ROWS>, grid, TILE_THREADS, Kernel::SHARED, stream, s, copied);
}

}  // namespace cla

extern "C" int32_t cla_sweep_recurrent(const cla_sweep *sweep, void *stream) {
  const int64_t tokens = sweep->cu_seqlens ? sweep->tokens / sweep->sequences : sweep->tokens;
  if (tokens <= cla::FEW_TOKENS && !sweep->ends) return cla::sweep_few_tokens(*sweep, stream);
  static_assert(CLA_RECURRENT_ROWS == 256, "the most that threads have");
  return cla::by_rows(sweep->rows, [&](auto rows) { return cla::launch_recurrent<decltype(rows)::value>(*sweep, stream); });
}
