// What a chunked kernel keeps in shared memory, and where.
#pragma once
#include "products.cuh"

namespace cla {

// ROWS: rows of the state, padded. W: warpgroups, each with 64 columns of it.
//
// COMPACT: values have one stage, outputs take the place of what was read for them if they are as wide, and those in f32 go out
// as they are: what a GPU with 99 KB a block has room for.
//
// NARROW: the inputs are bf16, which tensor cores take as they are. Others, operands that a decay has been multiplied into,
// the state and the scores of a chunk are the sum of two bf16, which is f32 to 2^-17. BF16_OUT: so are the outputs.
template <int ROWS, int W_, bool COMPACT_, bool NARROW_, bool BF16_OUT_, int GATE> struct ChunkLayout {
  static constexpr bool COMPACT = COMPACT_, NARROW = NARROW_, BF16_OUT = BF16_OUT_;
  static constexpr int R = ROWS, W = W_, THREADS = 128 * W, COLUMNS = 64 * W;
  static constexpr bool SCALAR = GATE == CLA_GATE_SCALAR, BY_ROW = GATE == CLA_GATE_ROWS, BY_COLUMN = GATE == CLA_GATE_COLS;
  static constexpr bool VECTOR = BY_ROW || BY_COLUMN;
  static constexpr int GATES = BY_ROW ? R : COLUMNS;
  // Whether operands are decayed from a copy of theirs in shared memory.
  static constexpr bool STAGED_DECAY = NARROW && VECTOR;

  static constexpr int KEY_PARTS = NARROW && !BY_ROW ? 1 : 2, VALUE_PARTS = NARROW && !BY_COLUMN ? 1 : 2;
  // Whether the scores of the next chunk are computed beside the products of this one: then its keys are there already. A
  // machine that moves sub-tiles by itself moves the rows of such a sweep; others take the compact form instead.
  static constexpr bool FOR_AHEAD = NARROW && !VECTOR && !COMPACT && (R == 64 || (R == 128 && W == 2));
  static constexpr bool AHEAD = HAS_SUBTILE_COPIES && FOR_AHEAD;
  static_assert(R <= CLA_CHUNKED_ROWS && (!COMPACT || (NARROW && !VECTOR)), "what the kernels take");
  // What is not copied but computed into shared memory has no second stage.
  static constexpr int KEY_STAGES = AHEAD ? 3 : KEY_PARTS == 1 ? 2 : 1, VALUE_STAGES = VALUE_PARTS == 1 && !COMPACT ? 2 : 1;
  static constexpr int SCORE_SETS = AHEAD ? 2 : 1;
  // Sets of factors of a decay for the whole state: those of chunks to come are written while those of a chunk, and ahead of
  // their turn those of the next, are still read. There each warp writes one.
  static constexpr int FACTOR_SETS = AHEAD ? THREADS / 32 + 2 : 2;

  // A row of f32 numbers: 16 bytes more than there are, so that rows begin at different banks.
  static constexpr int PITCH = GATES + 4, OUT_PITCH = COLUMNS + 4;
  // Whether outputs wait in shared memory until whole rows of them go out, and in f32.
  static constexpr bool STAGED_OUT = NARROW && (BF16_OUT || !COMPACT), WIDE_OUT = STAGED_OUT && !BF16_OUT;

  static constexpr int KEY = R * 128, VALUE = W * SUBTILE;
  static constexpr int VALUES = KEY_STAGES * KEY_PARTS * 2 * KEY;
  static constexpr int RAW = VALUES + VALUE_STAGES * VALUE_PARTS * VALUE;
  static constexpr int RAW_GATES = RAW + (!STAGED_DECAY ? 0 : BY_ROW ? 2 * KEY : VALUE);
  static constexpr int AFTER_RAW = RAW_GATES + (STAGED_DECAY ? 4 * CHUNK * GATES : 0);
  // The sums of log decays [CHUNK, PITCH]. Along rows they are done with before the scores are written, and where operands
  // have been staged they are only needed once those are not. Along columns the output needs them and then takes their place.
  static constexpr int DECAYS = BY_ROW && NARROW ? RAW : AFTER_RAW, DECAY_BYTES = VECTOR ? 4 * CHUNK * PITCH : 0;
  static constexpr int SCORES = BY_COLUMN ? DECAYS + DECAY_BYTES : AFTER_RAW;
  static constexpr int AFTER_SCORES = SCORES + 2 * SCORE_SETS * SUBTILE;
  static constexpr int AFTER_DECAYS = DECAYS + DECAY_BYTES;
  static constexpr int OUT = WIDE_OUT && BY_COLUMN ? DECAYS : AFTER_SCORES > AFTER_DECAYS ? AFTER_SCORES : AFTER_DECAYS;
  static constexpr bool OUT_OF_READ = COMPACT && R == COLUMNS;
  // Where outputs go out by themselves, those of the next chunk have their own place, if they are small.
  static constexpr int OUT_SETS = AHEAD && BF16_OUT ? 2 : 1;
  static constexpr int OUT_BYTES = WIDE_OUT ? (AHEAD ? 2 * VALUE : 4 * CHUNK * OUT_PITCH)
                                   : STAGED_OUT && !OUT_OF_READ ? OUT_SETS * VALUE
                                                                : 0;
  static constexpr int AFTER_OUT = OUT + OUT_BYTES > AFTER_SCORES ? OUT + OUT_BYTES : AFTER_SCORES;
  // Sums of a thread's steps.
  static constexpr int TOTALS = (AFTER_OUT + 15) / 16 * 16;
  static constexpr int FACTORS = TOTALS + (STAGED_DECAY ? 16 * THREADS : 0);
  static constexpr int FACTOR_COUNT = SCALAR ? FACTOR_SETS * (4 * CHUNK + 4) : VECTOR ? (STAGED_DECAY ? 5 : 4) * GATES + 4 : 0;
  // A count for each stage of the keys and of the values.
  static constexpr int COUNTS = FACTORS + 4 * FACTOR_COUNT;
  static constexpr int SHARED = COUNTS + (AHEAD ? 8 * (KEY_STAGES + VALUE_STAGES) : 0);
};

}  // namespace cla
