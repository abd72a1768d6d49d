// A delta sweep (see delta.h) token by token, in the order of the definition: decoding, short sequences, and whatever other
// kernels do not take. Decoding reads and writes each state once, with all loads under way before the first is used.
#include "delta_segments.cuh"
#include "state_tile.cuh"

namespace cla {

// Which vectors can be copied.
enum { Q_COPIED = 1, K_COPIED = 2, GATE_COPIED = 4, A_COPIED = 8, B_COPIED = 16, VALUE_COPIED = 32 };

template <int ROWS, bool LOW_RANK, bool REVERSE> struct DeltaRecurrent {
  using State = StateTile<ROWS>;
  static constexpr int COLUMNS = State::COLUMNS, GROUP = TILE_WARPS;
  static_assert(CLA_DELTA_SEGMENT % GROUP == 0, "segments begin with groups");
  // The vectors of a token in shared memory, and what it leaves.
  static constexpr int Q = 0, K = ROWS, DECAY = 2 * ROWS, A = 3 * ROWS, B = 4 * ROWS, VALUE = (LOW_RANK ? 5 : 3) * ROWS;
  static constexpr int BETA = VALUE + COLUMNS, TOKEN = BETA + 4, INNER = 0, OUT = COLUMNS, RESULT = 2 * COLUMNS;
  static constexpr int RESULTS = 2 * GROUP * TOKEN, SHARED = 4 * (RESULTS + 2 * GROUP * RESULT);

  const cla_delta_sweep &s;
  const int copied;
  float *shared;
  int head, first_column;
  int64_t sequence;
  Steps steps;
  TokenGroups<GROUP> groups;
  TokenVector q, k, gate, a, b, value;
  State state;

  CLA_DEVICE DeltaRecurrent(const cla_delta_sweep &s, int copied, unsigned tiles, const Place &place)
      : s(s), copied(copied), shared((float *)shared_memory()), head(place.head), first_column(block_x() % tiles * COLUMNS),
        sequence(place.sequence), steps(s.of.cu_seqlens, s.of.tokens, sequence, REVERSE), groups(steps.count, REVERSE),
        q(s.of.q, steps.batch, head), k(s.of.k, steps.batch, head), gate(s.of.gate, steps.batch, head),
        a(s.of.a, steps.batch, head), b(s.of.b, steps.batch, head), value(s.value, steps.batch, head) {}

  CLA_DEVICE int columns() const { return s.of.v_dim - first_column < COLUMNS ? s.of.v_dim - first_column : COLUMNS; }
  CLA_DEVICE static int warp() { return State::warp(); }
  CLA_DEVICE static int lane() { return State::lane(); }
  CLA_DEVICE float *token(int group, int i) const { return shared + ((group & 1) * GROUP + i) * TOKEN; }
  CLA_DEVICE float *result(int group, int i) const { return shared + RESULTS + ((group & 1) * GROUP + i) * RESULT; }
  CLA_DEVICE bool by_channel() const { return s.of.gate_kind == CLA_GATE_ROWS; }
  CLA_DEVICE bool by_token() const { return s.of.gate_kind == CLA_GATE_SCALAR; }

  // Single numbers of a warp's token, one group ahead: its vectors are on their way to shared memory.
  struct Fetched {
    float beta, decay;
  };
  CLA_DEVICE Fetched fetch(int group) const {
    Fetched f = {1.f, 0.f};
    if (warp() >= groups.size(group)) return f;
    const int64_t t = steps.start + groups.place(group, warp());
    const int width = s.of.k_dim;
    float *to = token(group, warp());
    q.fetch<ROWS>(s.of.q, copied & Q_COPIED, t, 0, width, to + Q);
    k.fetch<ROWS>(s.of.k, copied & K_COPIED, t, 0, width, to + K);
    if (by_channel()) gate.fetch<ROWS>(s.of.gate, copied & GATE_COPIED, t, 0, width, to + DECAY);
    if (LOW_RANK) a.fetch<ROWS>(s.of.a, copied & A_COPIED, t, 0, width, to + A);
    if (LOW_RANK) b.fetch<ROWS>(s.of.b, copied & B_COPIED, t, 0, width, to + B);
    value.fetch<COLUMNS>(s.value, copied & VALUE_COPIED, t, first_column, s.of.v_dim, to + VALUE);
    copies_commit();
    if (!LOW_RANK) f.beta = Rows(s.of.beta, steps.batch, opaque(head)).load(t, 0);
    if (by_token()) f.decay = load_element(gate.data, s.of.gate.dtype, t * s.of.gate.token);
    return f;
  }
  CLA_DEVICE void place(int group, const Fetched &f) const {
    if (warp() >= groups.size(group)) return;
    float *to = token(group, warp());
    if (lane() == 0) to[BETA] = f.beta;
    if (by_token() && lane() == 0) to[DECAY] = exp_fast(f.decay);
    copies_wait<0>();
    TokenVector::convert<ROWS>(s.of.q, copied & Q_COPIED, to + Q);
    TokenVector::convert<ROWS>(s.of.k, copied & K_COPIED, to + K);
    if (by_channel()) {
      TokenVector::convert<ROWS>(s.of.gate, copied & GATE_COPIED, to + DECAY, [](float g) { return exp_fast(g); });
    }
    if (LOW_RANK) TokenVector::convert<ROWS>(s.of.a, copied & A_COPIED, to + A);
    if (LOW_RANK) TokenVector::convert<ROWS>(s.of.b, copied & B_COPIED, to + B);
    TokenVector::convert<COLUMNS>(s.value, copied & VALUE_COPIED, to + VALUE);
  }

  CLA_DEVICE void keep(int64_t segment) {
    float *to = anchor_of(s.anchors, sequence, segment, head, s.of.heads, (int64_t)s.of.k_dim * s.of.v_dim);
    state.store(to + first_column, s.of.v_dim, 1, s.of.k_dim, columns());
  }
  // Before the first token of a segment.
  CLA_DEVICE void keep_before(int group) {
    if (!s.anchors.data || (LOW_RANK && REVERSE && group > 0)) return;
    const int64_t at = groups.start(group);
    const bool first = REVERSE ? group == 0 || (at + GROUP) % CLA_DELTA_SEGMENT == 0 : at % CLA_DELTA_SEGMENT == 0;
    if (first) keep(at / CLA_DELTA_SEGMENT);
  }
  CLA_DEVICE void fade(const float *of) {
    if (by_channel()) {
      state.scale_rows(of + DECAY);
    } else if (by_token()) {
      state.scale_columns({of[DECAY], of[DECAY]});
    }
  }
  // X += row column^T, each lane with its own column's number, or with those of a vector.
  CLA_DEVICE void add(const float *row, float own) {
    float column[State::WIDTH];
    state.spread(own, column);
    state.add(row, column);
  }
  CLA_DEVICE void add(const float *row, const float *columns, float factor) {
    float column[State::WIDTH];
    state.by_column(columns, column);
    state.add(row, {factor * column[0], factor * column[1]});
  }

  CLA_DEVICE void solve(int group, int i) {
    if (i == 0) keep_before(group);
    const float *of = token(group, i);
    const float beta = of[BETA];
    float m, out = 0.f;
    if (!REVERSE) {
      if (!LOW_RANK) fade(of);
      m = state.read(of + (LOW_RANK ? A : K));
      if (LOW_RANK) {
        fade(of);
        add(of + K, of + VALUE, 1.f);
        add(of + B, m);
      } else {
        m = of[VALUE + state.own_column()] - m;
        add(of + K, beta * m);
      }
      if (s.out.data) out = s.of.scale * state.read(of + Q);
    } else {
      add(of + Q, of + VALUE, s.of.scale);
      m = state.read(of + (LOW_RANK ? B : K));
      if (LOW_RANK) {
        out = state.read(of + K);
        fade(of);
        // What a token reads is read before the state fades.
        const int64_t place = groups.place(group, i);
        if (s.anchors.data && place > 0 && place % CLA_DELTA_SEGMENT == 0) keep(place / CLA_DELTA_SEGMENT - 1);
        add(of + A, m);
      } else {
        out = beta * m;
        add(of + K, -out);
        fade(of);
      }
    }
    float *to = result(group, i);
    if (State::is_set(0)) to[INNER + state.own_column()] = m;
    if (State::is_set(1)) to[OUT + state.own_column()] = out;
  }
  // A warp has all of a token's results.
  CLA_DEVICE void store(int group) const {
    if (warp() >= groups.size(group)) return;
    const int64_t t = steps.start + groups.place(group, warp());
    const float *from = result(group, warp());
    if (s.inner.data) store(s.inner, t, from + INNER);
    if (s.out.data) store(s.out, t, from + OUT);
  }
  CLA_DEVICE void store(const cla_tensor &x, int64_t t, const float *from) const {
    const Rows rows(x, steps.batch, opaque(head));
    for (int c = lane(); c < columns(); c += 32) rows.store(t, first_column + c, from[c]);
  }

  CLA_DEVICE void begin() {
    if (s.first.data) {
      const float *from = s.first.data + sequence * s.first.sequence + head * s.first.head + first_column * s.first.col;
      state.load(from, s.first.row, s.first.col, s.of.k_dim, columns());
    } else {
      state.zero();
    }
  }
  CLA_DEVICE void run() {
    for_groups(
        groups, warp() * State::OF_WARP < columns(), [&] { begin(); }, [&](int group) { return fetch(group); },
        [&](int group, const Fetched &f) { place(group, f); }, [&](int group, int i) { solve(group, i); },
        [&](int group) { store(group); });
    if (!s.last.data) return;
    float *to = s.last.data + sequence * s.last.sequence + head * s.last.head + first_column * s.last.col;
    state.store(to, s.last.row, s.last.col, s.of.k_dim, columns());
  }
};

template <int ROWS, bool LOW_RANK, bool REVERSE>
CLA_KERNEL(TILE_THREADS, ROWS > 128 ? 1 : REVERSE && !LOW_RANK ? 2 : 3)
void delta_recurrent_kernel(const CLA_CONSTANT cla_delta_sweep s, int copied) {
  const unsigned tiles = (s.of.v_dim + StateTile<ROWS>::COLUMNS - 1) / StateTile<ROWS>::COLUMNS;
  DeltaRecurrent<ROWS, LOW_RANK, REVERSE>(s, copied, tiles, place_of(block_x() / tiles, s.of.heads)).run();
}

template <int ROWS, bool LOW_RANK, bool REVERSE> int32_t launch_delta_recurrent(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaRecurrent<ROWS, LOW_RANK, REVERSE>;
  const int64_t tiles = (s.of.v_dim + Kernel::COLUMNS - 1) / Kernel::COLUMNS;
  const Dims grid = {(int64_t)s.of.sequences * s.of.heads * tiles, 1};
  const int width = s.of.k_dim;
  const int copied = (can_be_copied(s.of.q, width) ? Q_COPIED : 0) | (can_be_copied(s.of.k, width) ? K_COPIED : 0) |
                     (can_be_copied(s.of.gate, width) ? GATE_COPIED : 0) | (can_be_copied(s.of.a, width) ? A_COPIED : 0) |
                     (can_be_copied(s.of.b, width) ? B_COPIED : 0) | (can_be_copied(s.value, s.of.v_dim) ? VALUE_COPIED : 0);
  return launch(delta_recurrent_kernel<ROWS, LOW_RANK, REVERSE>, grid, TILE_THREADS, Kernel::SHARED, stream, s, copied);
}

}  // namespace cla

extern "C" int32_t cla_delta_recurrent(const cla_delta_sweep *sweep, void *stream) {
  return cla::by_rows(sweep->of.k_dim, [&](auto rows) {
    constexpr int ROWS = decltype(rows)::value;
    if (sweep->of.low_rank) {
      return sweep->reverse ? cla::launch_delta_recurrent<ROWS, true, true>(*sweep, stream)
                            : cla::launch_delta_recurrent<ROWS, true, false>(*sweep, stream);
    }
    return sweep->reverse ? cla::launch_delta_recurrent<ROWS, false, true>(*sweep, stream)
                          : cla::launch_delta_recurrent<ROWS, false, false>(*sweep, stream);
  });
}
