// The chunked delta sweep of the delta rules: see delta_chunk.cuh for the equations. The three products of a segment that wait for
// one another are X^T K^T, the right side times T^T and the state's update; outputs are computed beside them.
#pragma once
#include "delta_chunk_sweep.cuh"

namespace cla {

// AHEAD: what is read of a segment is copied while the one before it is solved, and so there twice. SHARED_COLUMNS: each of two
// warpgroups has R of the rows, and they exchange what both read of the state. DTYPE: bf16 or f16.
template <int R_, int W_, bool BY_CHANNEL_, bool AHEAD_, bool SHARED_COLUMNS_ = false, int DTYPE_ = CLA_BF16> struct DeltaChunkLayout {
  static constexpr int R = R_, W = W_, DTYPE = DTYPE_;
  static constexpr bool BY_CHANNEL = BY_CHANNEL_, AHEAD = AHEAD_, SHARED_COLUMNS = SHARED_COLUMNS_, BF16 = DTYPE == CLA_BF16;
  static constexpr int COLUMNS = SHARED_COLUMNS ? 64 : 64 * W, ROWS = SHARED_COLUMNS ? W * R : R;
  // Keys in two parts are prepared: they have a decay by channel in them, or are f16.
  static constexpr bool IN_PARTS = BY_CHANNEL || !BF16;
  static_assert(AHEAD || !IN_PARTS, "as it is written");
  static_assert(!SHARED_COLUMNS || (W == 2 && !AHEAD), "as it is written");
  static constexpr int KEY = ROWS * 128, VALUES = COLUMNS * 128;
  // They are too many for a second stage. With a decay in them what is read of the state, k and q, and what is written to it are
  // each loaded when those of the segment before have been used; else k is the same for both, and has two places in turn.
  static constexpr int PARTS = 2 * R * 128, READS = 0, QUERIES = PARTS, WRITES = 2 * PARTS;
  // A stage has all else that is read of one segment.
  static constexpr int K = 0, Q = KEY, VALUE = IN_PARTS ? 0 : 2 * KEY, PREPARED = VALUE + VALUES;
  static constexpr int STAGES = IN_PARTS ? 3 * PARTS : 0, STAGE = PREPARED + Prepared::BYTES;
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
                                L::SHARED_COLUMNS, L::DTYPE>;

template <class L, Leaves LEAVES> struct DeltaChunked : SweepOf<L, LEAVES> {
  static constexpr int R = L::R, W = L::W, ROWS = L::ROWS;
  static constexpr bool BY_CHANNEL = L::BY_CHANNEL, SHARED_COLUMNS = L::SHARED_COLUMNS, IN_PARTS = L::IN_PARTS, BF16 = L::BF16;
  using Base = SweepOf<L, LEAVES>;
  using Base::s, Base::shared, Base::tid, Base::group, Base::head, Base::begin, Base::end, Base::steps, Base::state, Base::columns;
  using Base::segment, Base::count_at, Base::of_columns, Base::prepared_index, Base::zero, Base::each_pair;
  using Base::scale, Base::with_values, Base::add_by_triangle, Base::store_inner, Base::wait_with;
  using Base::COLUMNS, Base::STEPS, Base::WGMMA;
  template <int N> using Operand = typename Base::template Operand<N>;
  template <int WIDTH> using Pieces = typename Base::template Pieces<WIDTH>;
  static constexpr bool REVERSE = LEAVES == Leaves::BOTH_IN_REVERSE, OUTPUT = LEAVES == Leaves::OUTPUT;
  static constexpr bool APART = moves_apart(W, LEAVES);
  // Whether there are keys in parts with one place, for which all threads meet a second time.
  static constexpr bool ONE_PLACE = BY_CHANNEL || (IN_PARTS && LEAVES != Leaves::WRITTEN);
  static constexpr int MOVING = APART ? 128 : 128 * W, THREADS = 128 * W + (APART ? MOVING : 0);

  CLA_DEVICE DeltaChunked(const cla_delta_sweep &s) : Base(s) {}

  CLA_DEVICE unsigned char *stage(int i) const { return shared + L::STAGES + (L::AHEAD ? i & 1 : 0) * L::STAGE; }
  CLA_DEVICE static Tile tile(unsigned char *stage, int at) { return {stage + at}; }
  CLA_DEVICE static Tile prepared(unsigned char *stage, int which) { return {stage + L::PREPARED + which}; }
  // What is read of the state, written to it, and which of these q is.
  CLA_DEVICE Tile reads(int i) const { return own_key(BY_CHANNEL ? shared + L::READS : key_of(i)); }
  CLA_DEVICE Tile writes(int i) const { return own_key(BY_CHANNEL ? shared + L::WRITES : key_of(i)); }
  CLA_DEVICE Tile queries(int i) const { return own_key(IN_PARTS ? shared + L::QUERIES : stage(i) + L::Q); }
  CLA_DEVICE unsigned char *key_of(int i) const {
    return IN_PARTS ? shared + (i & 1 ? L::WRITES : L::READS) : stage(i) + L::K;
  }
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
      if (!IN_PARTS) in_pieces = in_pieces && k.in_pieces(width) && q.in_pieces(width);
    }
  };

  // Keys in parts follow what is prepared in any case.
  using Decayed = PreparedKeys<R>;
  using AsTheyAre = PreparedPlainKeys<R>;
  static constexpr int QUERIES_FROM = BY_CHANNEL ? Decayed::QUERIES : AsTheyAre::Q;
  static constexpr int KEYS = !IN_PARTS ? 0 : BY_CHANNEL ? Decayed::BYTES : AsTheyAre::BYTES;
  CLA_DEVICE const unsigned char *prepared_of(int i) const { return s.prepared + prepared_index(i) * (Prepared::BYTES + KEYS); }
  CLA_DEVICE void copy_prepared(unsigned char *to, const unsigned char *from) const {
    this->template copy_triangles<Prepared::FACTORS>(to, from);
    this->template copy<Prepared::BYTES - Prepared::FACTORS>(to + Prepared::FACTORS, from + Prepared::FACTORS);
  }
  CLA_DEVICE void copy_key(unsigned char *to, int i, int from) const {
    this->template copy<L::PARTS>(to, prepared_of(i) + Prepared::BYTES + from);
  }

  // A stage.
  CLA_DEVICE void fetch(Moved &of, int i) const {
    if (i < end) {
      unsigned char *to = stage(i);
      const int count = count_at(i);
      if (of.in_pieces) {
        if (!IN_PARTS) of.k.fetch(tile(to, L::K), count);
        if (!IN_PARTS && LEAVES != Leaves::WRITTEN) of.q.fetch(tile(to, L::Q), count);
        of.value.fetch(tile(to, L::VALUE), count);
      } else {
        fetch_apart(s, i);
      }
      copy_prepared(to + L::PREPARED, prepared_of(i));
      if (IN_PARTS && !BY_CHANNEL) copy_key(key_of(i), i, AsTheyAre::K);
    }
    copies_commit();
  }
  // Keys in parts that have one place: those that are read, q among them but in reverse, and those that are written.
  CLA_DEVICE void fetch_reads(int i) const {
    if (i < end) {
      if (BY_CHANNEL) copy_key(shared + L::READS, i, Decayed::READS);
      if (OUTPUT) copy_key(shared + L::QUERIES, i, QUERIES_FROM);
    }
    copies_commit();
  }
  CLA_DEVICE void fetch_writes(int i) const {
    if (BY_CHANNEL) copy_key(shared + L::WRITES, i, Decayed::WRITES);
    if (REVERSE) copy_key(shared + L::QUERIES, i, QUERIES_FROM);
    copies_commit();
  }
  // Rows that lie otherwise, out of the way of the loop over segments.
  CLA_COLD static void fetch_apart(const cla_delta_sweep &s, int i) {
    const DeltaChunked sweep(s);
    const SegmentSteps at(sweep.steps, sweep.segment(i));
    unsigned char *to = sweep.stage(i);
    const Rows k(s.of.k, sweep.steps.batch, sweep.head), q(s.of.q, sweep.steps.batch, sweep.head);
    if (!IN_PARTS) {
      TileRows<ROWS, MOVING>::fetch(tile(to, L::K), k, at, s.of.k_dim, sweep.tid);
      TileRows<ROWS, MOVING>::fetch(tile(to, L::Q), q, at, s.of.k_dim, sweep.tid);
    }
    Base::fetch_values_apart(s, tile(to, L::VALUE), i);
  }

  // ---- one segment ----

  // All threads meet before a segment, when what is read of it has come and the one before is done; where nothing is copied
  // ahead, once more when it has come; where keys have one place, once more when what is read of the state has been read and what
  // is written to it has come; and at the end. Where they share columns, also to exchange.
  enum Meeting { FIRST, SECOND, LAST };
  struct Nothing {
    CLA_DEVICE Nothing(const DeltaChunked &) {}
  };
  // What solving threads have of what is moved.
  using Company = std::conditional_t<APART, Nothing, Moved>;

  template <int COUNT> CLA_DEVICE void add_by_rows(float (&acc)[8][4], const Operand<COUNT> &a, Tile b) const {
    Base::template add_by_rows<IN_PARTS>(acc, a, b);
  }
  CLA_DEVICE void add_to_state(const Operand<STEPS> &a, Tile b) { Base::template add_to_state<IN_PARTS>(a, b); }

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
    if constexpr (REVERSE && !BF16) {
      Operand<STEPS> g;
      this->load_values(g, own_values(of));
      products_fence<WGMMA>();
      add_by_triangle(result, g, p);
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
    }
    {
      Operand<R / 16> x;
      x.pack(state);
      products_fence<WGMMA>();
      if constexpr (REVERSE && BF16) {
        add_columns_by_rows<WGMMA>(result, own_values(of), p);
        add_columns_by_rows<WGMMA>(result, own_values(of), {p.base + SUBTILE});
      }
      add_by_rows(acc, x, reads(i));
      products_commit<WGMMA>();
      if (OUTPUT) add_by_rows(result, x, queries(i));
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
    if (ONE_PLACE) arrive<SECOND>(company, i);

    if (!OUTPUT && s.inner.data && leads()) store_inner(i, acc);
    scale(acc, factors(of, Prepared::BETA));
    if (REVERSE) {
      if (s.out.data && leads()) wait_with(out_tile(i), acc, 1.f);
      each_pair(acc, to_end, [](float &a, float &b, float x, float y) {
        a *= BY_CHANNEL ? -1.f : -x, b *= BY_CHANNEL ? -1.f : -y;
      });
      a.pack(acc);
      products_fence<WGMMA>();
      add_to_state(a, writes(i));
      products_commit<WGMMA>();
      // The gradients of outputs, with q: one of them has been faded to the end of the segment, and scaled.
      if constexpr (BY_CHANNEL && BF16) {
        add_columns_by_columns<WGMMA, R>(state, own_values(of), queries(i));
        add_columns_by_columns<WGMMA, R>(state, own_values(of), {queries(i).base + L::KEY});
      } else {
        Operand<STEPS> g;
        if constexpr (BY_CHANNEL) {
          this->load_values(g, own_values(of));
        } else {
          with_values(result, own_values(of), [&](float &x, float v) { x = s.of.scale * v; });
          scale(result, to_end);
          g.pack(result);
        }
        products_fence<WGMMA>();
        add_to_state(g, queries(i));
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
      add_to_state(BY_CHANNEL ? c : a, writes(i));
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
    if (ONE_PLACE) fetch_reads(begin);
  }
  template <Meeting WHICH> CLA_DEVICE void meet_moving(Moved &of, int i) {
    copies_wait<WHICH == SECOND && L::AHEAD ? 1 : 0>();
    shared_fence();
    meet(WHICH);
    if (WHICH == SECOND) {
      if (ONE_PLACE) fetch_reads(i + 1);
      return;
    }
    if (WHICH == FIRST) {
      if (ONE_PLACE) fetch_writes(i);
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
      if (ONE_PLACE || !L::AHEAD) meet_moving<SECOND>(of, i);
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

}  // namespace cla
