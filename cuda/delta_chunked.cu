// The chunked delta sweep: see delta_chunk.cuh for the equations. The three products of a segment that wait for one another are
// X^T K^T, the right side times T^T and the state's update; outputs are computed beside them.
#include "delta_chunked_low_rank.cuh"

namespace cla {

// AHEAD: what is read of a segment is copied while the one before it is solved, and so there twice. SHARED_COLUMNS: each of two
// warpgroups has R of the rows, and they exchange what both read of the state.
template <int R_, int W_, bool BY_CHANNEL_, bool AHEAD_, bool SHARED_COLUMNS_ = false> struct DeltaChunkLayout {
  static constexpr int R = R_, W = W_;
  static constexpr bool BY_CHANNEL = BY_CHANNEL_, AHEAD = AHEAD_, SHARED_COLUMNS = SHARED_COLUMNS_;
  static constexpr int COLUMNS = SHARED_COLUMNS ? 64 : 64 * W, ROWS = SHARED_COLUMNS ? W * R : R;
  static_assert(AHEAD || !BY_CHANNEL, "decayed keys leave no room anyway");
  static_assert(!SHARED_COLUMNS || (W == 2 && !AHEAD), "as it is written");
  static constexpr int KEY = ROWS * 128, VALUES = COLUMNS * 128;
  // Keys that a decay by channel has been multiplied into are too many for a second stage: what is read of the state and what
  // is written to it are each loaded when those of the segment before have been used.
  static constexpr int DECAYED = BY_CHANNEL ? PreparedKeys<R>::BYTES : 0;
  // A stage has all else that is read of one segment.
  static constexpr int K = 0, Q = KEY, VALUE = BY_CHANNEL ? 0 : 2 * KEY, PREPARED = VALUE + VALUES;
  static constexpr int STAGES = DECAYED, STAGE = PREPARED + Prepared::BYTES;
  // Results wait for the next segment in one of two tiles, so that whole rows go out and nobody waits for them; where nothing is
  // copied ahead in one, since those of the segment before have gone when all meet a second time.
  static constexpr int OUT = STAGES + (AHEAD ? 2 : 1) * STAGE;
  // What warpgroups have read, in f32: each for the system, and the second for the output.
  static constexpr int EXCHANGED = CHUNK * 64 * 4, EXCHANGE = OUT + (AHEAD ? 2 : 1) * VALUES;
  static constexpr int SHARED = EXCHANGE + (SHARED_COLUMNS ? 3 * EXCHANGED : 0);
};

// What a sweep leaves beside its final state: the output, or m, or, in reverse, both. That it is known to the compiler keeps
// branches out from between products that are under way.
enum class Leaves { OUTPUT, WRITTEN, BOTH_IN_REVERSE };

// One warpgroup that solves has another beside it that moves rows in and out: there are registers for two. Sweeps that leave
// states have more to store than to compute, and gain nothing.
constexpr bool moves_apart(int w, Leaves leaves) { return w == 1 && leaves == Leaves::OUTPUT; }
template <class L, Leaves LEAVES>
using SweepOf = DeltaChunkSweep<L::R, L::W, LEAVES == Leaves::BOTH_IN_REVERSE, moves_apart(L::W, LEAVES) ? 128 : 128 * L::W,
                                L::SHARED_COLUMNS>;

template <class L, Leaves LEAVES> struct DeltaChunked : SweepOf<L, LEAVES> {
  static constexpr int R = L::R, W = L::W, ROWS = L::ROWS;
  static constexpr bool BY_CHANNEL = L::BY_CHANNEL, SHARED_COLUMNS = L::SHARED_COLUMNS;
  using Base = SweepOf<L, LEAVES>;
  using Keys = PreparedKeys<R>;
  using Base::s, Base::shared, Base::tid, Base::group, Base::head, Base::begin, Base::end, Base::steps, Base::state, Base::columns;
  using Base::segment, Base::count_at, Base::of_columns, Base::prepared_index, Base::zero, Base::each_pair;
  using Base::scale, Base::with_values, Base::add_by_triangle, Base::store_inner, Base::wait_with;
  using Base::COLUMNS, Base::STEPS, Base::WGMMA;
  template <int N> using Operand = typename Base::template Operand<N>;
  template <int WIDTH> using Pieces = typename Base::template Pieces<WIDTH>;
  static constexpr bool REVERSE = LEAVES == Leaves::BOTH_IN_REVERSE, OUTPUT = LEAVES == Leaves::OUTPUT;
  static constexpr bool APART = moves_apart(W, LEAVES);
  static constexpr int MOVING = APART ? 128 : 128 * W, THREADS = 128 * W + (APART ? MOVING : 0);

  CLA_DEVICE DeltaChunked(const cla_delta_sweep &s) : Base(s) {}

  CLA_DEVICE unsigned char *stage(int i) const { return shared + L::STAGES + (L::AHEAD ? i & 1 : 0) * L::STAGE; }
  CLA_DEVICE static Tile tile(unsigned char *stage, int at) { return {stage + at}; }
  CLA_DEVICE static Tile prepared(unsigned char *stage, int which) { return {stage + L::PREPARED + which}; }
  // What is read of the state, written to it, and which of these q is.
  CLA_DEVICE Tile reads(unsigned char *stage) const { return own_key(BY_CHANNEL ? shared + Keys::READS : stage + L::K); }
  CLA_DEVICE Tile writes(unsigned char *stage) const { return own_key(BY_CHANNEL ? shared + Keys::WRITES : stage + L::K); }
  CLA_DEVICE Tile queries(unsigned char *stage) const { return own_key(BY_CHANNEL ? shared + Keys::QUERIES : stage + L::Q); }
  CLA_DEVICE Tile own_key(unsigned char *key) const { return Tile{key}.from_column(this->group_row()); }
  CLA_DEVICE Tile own_values(unsigned char *stage) const { return tile(stage, L::VALUE).from_column(this->group_column()); }
  // Whether the warpgroup has the part of its columns in results and values that it need not share.
  CLA_DEVICE bool leads() const { return !SHARED_COLUMNS || group == 0; }
  CLA_DEVICE Tile out_tile(int i) const { return {shared + L::OUT + (L::AHEAD ? i & 1 : 0) * L::VALUES}; }
  CLA_DEVICE static const float *factors(unsigned char *stage, int which) {
    return (const float *)(stage + L::PREPARED + Prepared::FACTORS) + which;
  }

  // ---- loading ----

  struct Moved {
    Pieces<ROWS> k, q;
    Pieces<COLUMNS> value, out;
    bool in_pieces;

    CLA_DEVICE Moved(const DeltaChunked &sweep)
        : Moved(sweep, Rows(sweep.s.of.k, sweep.steps.batch, sweep.head), Rows(sweep.s.of.q, sweep.steps.batch, sweep.head),
                sweep.of_values(), sweep.of_columns(sweep.s.out)) {}
    CLA_DEVICE Moved(const DeltaChunked &sweep, const Rows &k, const Rows &q, const Rows &value, const Rows &out)
        : k(sweep, k, sweep.s.of.k_dim), q(sweep, q, sweep.s.of.k_dim), value(sweep, value, value.data ? sweep.columns() : 0),
          out(sweep, out, sweep.columns()) {
      const int width = sweep.s.of.k_dim, columns = sweep.columns();
      auto whole = [](const Rows &x, int width) { return !x.data || x.in_pieces(width); };
      in_pieces = whole(value, columns) && whole(out, columns);
      if (!BY_CHANNEL) in_pieces = in_pieces && k.in_pieces(width) && q.in_pieces(width);
    }
  };

  static constexpr int64_t PREPARED_BYTES = Prepared::BYTES + L::DECAYED;
  CLA_DEVICE void copy_prepared(unsigned char *to, const unsigned char *from) const {
    this->template copy_triangles<Prepared::FACTORS>(to, from);
    this->template copy<Prepared::BYTES - Prepared::FACTORS>(to + Prepared::FACTORS, from + Prepared::FACTORS);
  }

  // A stage.
  CLA_DEVICE void fetch(Moved &of, int i) const {
    if (i < end) {
      unsigned char *to = stage(i);
      const int count = count_at(i);
      if (of.in_pieces) {
        if (!BY_CHANNEL) of.k.fetch(tile(to, L::K), count);
        if (!BY_CHANNEL && LEAVES != Leaves::WRITTEN) of.q.fetch(tile(to, L::Q), count);
        of.value.fetch(tile(to, L::VALUE), count);
      } else {
        fetch_apart(s, i);
      }
      copy_prepared(to + L::PREPARED, s.prepared + prepared_index(i) * PREPARED_BYTES);
    }
    copies_commit();
  }
  // Decayed keys that are read, q among them but in reverse, and those that are written.
  CLA_DEVICE void fetch_reads(int i) const {
    if (i < end) {
      const unsigned char *from = s.prepared + prepared_index(i) * PREPARED_BYTES + Prepared::BYTES;
      this->template copy<Keys::EACH>(shared + Keys::READS, from + Keys::READS);
      if (OUTPUT) this->template copy<Keys::EACH>(shared + Keys::QUERIES, from + Keys::QUERIES);
    }
    copies_commit();
  }
  CLA_DEVICE void fetch_writes(int i) const {
    const unsigned char *from = s.prepared + prepared_index(i) * PREPARED_BYTES + Prepared::BYTES;
    this->template copy<Keys::EACH>(shared + Keys::WRITES, from + Keys::WRITES);
    if (REVERSE) this->template copy<Keys::EACH>(shared + Keys::QUERIES, from + Keys::QUERIES);
    copies_commit();
  }
  // Rows that lie otherwise, out of the way of the loop over segments.
  CLA_COLD static void fetch_apart(const cla_delta_sweep &s, int i) {
    const DeltaChunked sweep(s);
    const SegmentSteps at(sweep.steps, sweep.segment(i));
    unsigned char *to = sweep.stage(i);
    const Rows k(s.of.k, sweep.steps.batch, sweep.head), q(s.of.q, sweep.steps.batch, sweep.head);
    if (!BY_CHANNEL) {
      TileRows<ROWS, MOVING>::fetch(tile(to, L::K), k, at, s.of.k_dim, sweep.tid);
      TileRows<ROWS, MOVING>::fetch(tile(to, L::Q), q, at, s.of.k_dim, sweep.tid);
    }
    Base::fetch_values_apart(s, tile(to, L::VALUE), i);
  }

  // ---- one segment ----

  // All threads meet before a segment, when what is read of it has come and the one before is done; where nothing is copied
  // ahead, once more when it has come; where keys are decayed, once more when what is read of the state has been read and what
  // is written to it has come; and at the end. Where they share columns, also to exchange.
  enum Meeting { FIRST, SECOND, LAST };
  struct Nothing {
    CLA_DEVICE Nothing(const DeltaChunked &) {}
  };
  // What solving threads have of what is moved.
  using Company = std::conditional_t<APART, Nothing, Moved>;

  template <int COUNT> CLA_DEVICE void add_by_rows(float (&acc)[8][4], const Operand<COUNT> &a, Tile b) const {
    Base::template add_by_rows<BY_CHANNEL>(acc, a, b);
  }
  CLA_DEVICE void add_to_state(const Operand<STEPS> &a, Tile b) { Base::template add_to_state<BY_CHANNEL>(a, b); }

  // What the warpgroups have read of their rows becomes what is read of all: the system's right side in both, and in the first
  // what the output has of it. A thread's numbers have the same places in either group.
  CLA_DEVICE float *exchanged(int which) const {
    return (float *)(shared + L::EXCHANGE + which * L::EXCHANGED) + 4 * (thread_index() % 128);
  }
  CLA_DEVICE void exchange(float (&acc)[8][4], float (&result)[8][4]) const {
    CLA_UNROLL
    for (int j = 0; j < 8; j++) {
      store4(exchanged(group) + 512 * j, acc[j]);
      if (OUTPUT && group == 1) store4(exchanged(2) + 512 * j, result[j]);
    }
    barrier();
    CLA_UNROLL
    for (int j = 0; j < 8; j++) {
      float other[4];
      load4(other, exchanged(1 - group) + 512 * j);
      CLA_UNROLL
      for (int e = 0; e < 4; e++) acc[j][e] += other[e];
      if (!OUTPUT || group == 1) continue;
      load4(other, exchanged(2) + 512 * j);
      CLA_UNROLL
      for (int e = 0; e < 4; e++) result[j][e] += other[e];
    }
  }

  CLA_DEVICE void solve(int i, Company &company) {
    unsigned char *of = stage(i);
    const Tile p = prepared(of, Prepared::P);
    const float *from_start = factors(of, Prepared::FROM_START), *to_end = factors(of, Prepared::TO_END);
    // The right side of the system, then m, then what is written; and what P says.
    float acc[8][4], result[8][4];
    zero(acc);
    zero(result);
    {
      Operand<R / 16> x;
      x.pack(state);
      products_fence<WGMMA>();
      if (REVERSE) {
        add_columns_by_rows<WGMMA>(result, own_values(of), p);
        add_columns_by_rows<WGMMA>(result, own_values(of), {p.base + SUBTILE});
      }
      add_by_rows(acc, x, reads(of));
      products_commit<WGMMA>();
      if (OUTPUT) add_by_rows(result, x, queries(of));
      products_commit<WGMMA>();
      products_wait<WGMMA, SHARED_COLUMNS ? 0 : 1>();
      if (SHARED_COLUMNS) exchange(acc, result);
      if (!BY_CHANNEL) scale(acc, from_start);
      if (!REVERSE) with_values(acc, own_values(of), [](float &x, float v) { x = v - x; });
      products_wait<WGMMA, 0>();
    }
    if (OUTPUT && !BY_CHANNEL) scale(result, from_start);
    if (REVERSE) {
      CLA_UNROLL
      for (int j = 0; j < 8; j++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) acc[j][e] += s.of.scale * result[j][e];
      }
    }
    Operand<STEPS> a;
    a.pack(acc);
    zero(acc);
    products_fence<WGMMA>();
    add_by_triangle(acc, a, prepared(of, Prepared::T));
    products_commit<WGMMA>();
    this->template fade_state<BY_CHANNEL>(factors(of, BY_CHANNEL ? Prepared::WHOLE_BY_CHANNEL : Prepared::WHOLE));
    products_wait<WGMMA, 0>();
    if (BY_CHANNEL) arrive<SECOND>(company, i);

    if (!OUTPUT && s.inner.data && leads()) store_inner(i, acc);
    scale(acc, factors(of, Prepared::BETA));
    if (REVERSE) {
      if (s.out.data && leads()) wait_with(out_tile(i), acc, 1.f);
      each_pair(acc, to_end, [](float &a, float &b, float x, float y) {
        a *= BY_CHANNEL ? -1.f : -x, b *= BY_CHANNEL ? -1.f : -y;
      });
      a.pack(acc);
      products_fence<WGMMA>();
      add_to_state(a, writes(of));
      products_commit<WGMMA>();
      // The gradients of outputs, with q: one of them has been faded to the end of the segment, and scaled.
      if (BY_CHANNEL) {
        add_columns_by_columns<WGMMA, R>(state, own_values(of), queries(of));
        add_columns_by_columns<WGMMA, R>(state, own_values(of), {queries(of).base + L::KEY});
      } else {
        with_values(result, own_values(of), [&](float &x, float v) { x = s.of.scale * v; });
        scale(result, to_end);
        Operand<STEPS> g;
        g.pack(result);
        products_fence<WGMMA>();
        add_to_state(g, queries(of));
      }
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
    } else {
      Operand<STEPS> c;
      if (OUTPUT || BY_CHANNEL) c.pack(acc);
      if (!BY_CHANNEL) {
        scale(acc, to_end);
        a.pack(acc);
      }
      products_fence<WGMMA>();
      add_to_state(BY_CHANNEL ? c : a, writes(of));
      products_commit<WGMMA>();
      // By both of those that share columns: only one's is used, but products must not stand in a branch.
      if (OUTPUT) add_by_triangle(result, c, p);
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
      if (OUTPUT && leads()) wait_with(out_tile(i), result, s.of.scale);
    }
  }

  // ---- the sweep ----

  CLA_DEVICE void flush(Moved &of, int i) const {
    if (of.in_pieces) of.out.store(out_tile(i), count_at(i));
    else Base::flush_apart(s, out_tile(i), i);
  }
  CLA_DEVICE void start(Moved &of) {
    for (int i = 0; i < (L::AHEAD ? 2 : 1); i++) this->template clear_unused<Prepared::FACTORS>(stage(i) + L::PREPARED);
    if (L::AHEAD) fetch(of, begin);
    if (BY_CHANNEL) fetch_reads(begin);
  }
  template <Meeting WHICH> CLA_DEVICE void meet_moving(Moved &of, int i) {
    copies_wait<WHICH == SECOND && L::AHEAD ? 1 : 0>();
    shared_fence();
    meet(WHICH);
    if (WHICH == SECOND) {
      if (BY_CHANNEL) fetch_reads(i + 1);
      return;
    }
    if (WHICH == FIRST) {
      if (BY_CHANNEL) fetch_writes(i);
      fetch(of, L::AHEAD ? i + 1 : i);
    }
    if (s.out.data && i > begin) flush(of, i - 1);
  }
  // As one that solves.
  template <Meeting WHICH> CLA_DEVICE void arrive(Company &of, int i) {
    if constexpr (APART) meet(WHICH);
    else meet_moving<WHICH>(of, i);
  }

  CLA_DEVICE void move() {
    Moved of(*this);
    start(of);
    CLA_NO_UNROLL
    for (int i = begin; i < end; i++) {
      meet_moving<FIRST>(of, i);
      if (BY_CHANNEL || !L::AHEAD) meet_moving<SECOND>(of, i);
    }
    meet_moving<LAST>(of, end);
  }
  CLA_DEVICE void solve() {
    Company of(*this);
    if constexpr (!APART) start(of);
    this->load_state();
    CLA_NO_UNROLL
    for (int i = begin; i < end; i++) {
      arrive<FIRST>(of, i);
      if (!L::AHEAD) arrive<SECOND>(of, i);
      if (!OUTPUT) this->keep(i);
      solve(i, of);
    }
    arrive<LAST>(of, end);
    this->store_last();
  }

  CLA_DEVICE void run() {
    if (APART && group == W) move();
    else solve();
  }
};

template <class L, Leaves LEAVES>
CLA_KERNEL((DeltaChunked<L, LEAVES>::THREADS), 1) void delta_chunked_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  DeltaChunked<L, LEAVES>(s).run();
}

template <class L, Leaves LEAVES> int32_t launch_delta_chunked(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaChunked<L, LEAVES>;
  return launch(delta_chunked_kernel<L, LEAVES>, Kernel::grid(s), Kernel::THREADS, L::SHARED, stream, s);
}
template <class L> int32_t launch_delta_chunked(L, const cla_delta_sweep &s, void *stream) {
  if (s.reverse) return launch_delta_chunked<L, Leaves::BOTH_IN_REVERSE>(s, stream);
  return s.out.data ? launch_delta_chunked<L, Leaves::OUTPUT>(s, stream) : launch_delta_chunked<L, Leaves::WRITTEN>(s, stream);
}

// Calls `f` with the layout that a sweep takes.
template <class F> auto with_layout(const cla_delta_sweep &s, F f) {
  auto by_gate = [&](auto rows, auto groups) {
    constexpr int R = decltype(rows)::value, W = decltype(groups)::value;
    if (s.of.gate_kind == CLA_GATE_ROWS) return f(DeltaChunkLayout<R, W, true, true>());
    using Ahead = DeltaChunkLayout<R, W, false, true>;
    if constexpr (W == 1) {
      if (Ahead::SHARED > s.shared_limit) return f(DeltaChunkLayout<R, W, false, false>());
    }
    return f(Ahead());
  };
  auto by_columns = [&](auto rows) {
    return s.columns <= 64 ? by_gate(rows, std::integral_constant<int, 1>()) : by_gate(rows, std::integral_constant<int, 2>());
  };
  auto by_family = [&](auto rows) { return s.of.low_rank ? f(LowRankLayout<decltype(rows)::value>()) : by_columns(rows); };
  if (s.of.k_dim > 128) return f(DeltaChunkLayout<128, 2, false, false, true>());
  return s.of.k_dim <= 64 ? by_family(std::integral_constant<int, 64>()) : by_family(std::integral_constant<int, 128>());
}

// The states before spans, one after another: a thread has one row and EACH columns of a state. What a span makes of them is a
// product in f32.
template <int ROWS_> struct SpanStarts {
  static constexpr int ROWS = ROWS_, EACH = 8, COLUMNS = 16, THREADS = ROWS * COLUMNS / EACH;
  static constexpr int AHEAD = 32;  // loads under way
};
template <class L> CLA_KERNEL(L::THREADS, 1) void delta_starts_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  const int row = thread_index() % L::ROWS, own = thread_index() / L::ROWS * L::EACH, column = block_y() * L::COLUMNS + own;
  const int head = block_x() % s.of.heads, k_dim = s.of.k_dim, v_dim = s.of.v_dim;
  const int64_t sequence = block_x() / s.of.heads;
  float(*state)[L::COLUMNS] = (float(*)[L::COLUMNS])shared_memory();  // [ROWS][COLUMNS]
  const bool used = row < k_dim;
  auto has = [&](int c) { return used && column + c < v_dim; };
  float x[L::EACH];
  CLA_UNROLL
  for (int c = 0; c < L::EACH; c++) {
    x[c] = 0.f;
    if (s.first.data && has(c)) {
      x[c] = s.first.data[sequence * s.first.sequence + head * s.first.head + row * s.first.row + (column + c) * s.first.col];
    }
  }
  CLA_NO_UNROLL
  for (int span = 0; span < s.spans.count; span++) {
    float *start = s.spans.starts + ((sequence * s.spans.count + span) * s.of.heads + head) * v_dim * k_dim;
    CLA_UNROLL
    for (int c = 0; c < L::EACH; c++) {
      if (has(c)) start[(column + c) * k_dim + row] = x[c];
    }
    if (span + 1 == s.spans.count) break;
    CLA_UNROLL
    for (int c = 0; c < L::EACH; c += 4) store4(&state[row][own + c], {x[c], x[c + 1], x[c + 2], x[c + 3]});
    barrier();
    const float *added = s.spans.changes + ((sequence * (s.spans.count - 1) + span) * s.of.heads + head) * (v_dim + k_dim) * k_dim;
    const float *factors = added + v_dim * k_dim + row;
    CLA_UNROLL
    for (int c = 0; c < L::EACH; c++) x[c] = has(c) ? added[(column + c) * k_dim + row] : 0.f;
    CLA_NO_UNROLL
    for (int first = 0; first < k_dim; first += L::AHEAD) {
      float factor[L::AHEAD];
      CLA_UNROLL
      for (int j = 0; j < L::AHEAD; j++) factor[j] = used && first + j < k_dim ? factors[(first + j) * k_dim] : 0.f;
      CLA_UNROLL
      for (int j = 0; j < L::AHEAD; j++) {
        CLA_UNROLL
        for (int c = 0; c < L::EACH; c += 4) {
          float of_state[4];
          load4(of_state, &state[first + j][own + c]);
          CLA_UNROLL
          for (int n = 0; n < 4; n++) x[c + n] += factor[j] * of_state[n];
        }
      }
    }
    barrier();
  }
}

}  // namespace cla

extern "C" int32_t cla_delta_chunked(const cla_delta_sweep *sweep, void *stream) {
  return cla::with_layout(*sweep, [&](auto layout) { return cla::launch_delta_chunked(layout, *sweep, stream); });
}

extern "C" int32_t cla_delta_changes(const cla_delta_sweep *sweep, void *stream) {
  cla_delta_sweep s = *sweep;
  s.inner.data = s.out.data = nullptr;
  s.first.data = s.last.data = s.anchors.data = s.spans.starts = nullptr;
  return cla_delta_chunked(&s, stream);
}

extern "C" int32_t cla_delta_starts(const cla_delta_sweep *sweep, void *stream) {
  using namespace cla;
  const cla_delta_problem &of = sweep->of;
  auto run = [&](auto layout) {
    using L = decltype(layout);
    const Dims grid = {(int64_t)of.sequences * of.heads, (of.v_dim + L::COLUMNS - 1) / L::COLUMNS};
    return launch(delta_starts_kernel<L>, grid, L::THREADS, L::ROWS * L::COLUMNS * sizeof(float), stream, *sweep);
  };
  return of.k_dim <= 128 ? run(SpanStarts<128>()) : run(SpanStarts<256>());
}

extern "C" int64_t cla_delta_shared_memory(const cla_delta_sweep *sweep) {
  using namespace cla;
  const cla_delta_sweep &s = *sweep;
  auto bf16 = [](const cla_tensor &x) { return !x.data || x.dtype == CLA_BF16; };
  const bool by_channel = s.of.low_rank || s.of.gate_kind == CLA_GATE_ROWS;
  if (s.of.k_dim > (by_channel ? 128 : 256) || (s.columns > 64 && (s.of.low_rank || s.of.k_dim > 128))) return -1;
  for (const cla_tensor &x : {s.of.q, s.of.k, s.of.a, s.of.b, s.value, s.out}) {
    if (!bf16(x)) return -1;
  }
  return with_layout(s, [](auto layout) -> int64_t { return decltype(layout)::SHARED; });
}
