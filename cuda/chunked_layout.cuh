// What a chunked kernel keeps in shared memory, and where.
#pragma once
#include "products.cuh"

namespace cla {

// ROWS: rows of the state, padded. W: warpgroups, each with 64 columns of it.
//
// COMPACT: values have one stage, outputs take the place of what was read for them if they are as wide, and those in f32 go out
// as they are: what a GPU with 99 KB a block has room for.
//
// IN: the dtype of all inputs, which are copied ahead of their turn, or ANY_DTYPE. Tensor cores take bf16 as it is. Others,
// operands that a decay has been multiplied into, the state and the scores of a chunk are the sum of two bf16, which is f32 to
// 2^-17. SMALL_OUT: outputs have the dtype of the inputs, in 16 bits; else they are f32, or anything if the inputs are.
constexpr int ANY_DTYPE = -1;
template <int ROWS, int W_, bool COMPACT_, int IN_, bool SMALL_OUT_, int GATE> struct ChunkLayout {
  static constexpr bool COMPACT = COMPACT_, COPIED = IN_ != ANY_DTYPE, BF16 = IN_ == CLA_BF16, SMALL_OUT = SMALL_OUT_;
  static constexpr int IN = IN_, SIZE = IN == CLA_F32 ? 4 : 2;
  static constexpr int R = ROWS, W = W_, THREADS = 128 * W, COLUMNS = 64 * W;
  static constexpr bool SCALAR = GATE == CLA_GATE_SCALAR, BY_ROW = GATE == CLA_GATE_ROWS, BY_COLUMN = GATE == CLA_GATE_COLS;
  static constexpr bool VECTOR = BY_ROW || BY_COLUMN;
  static constexpr int GATES = BY_ROW ? R : COLUMNS;

  static constexpr int KEY_PARTS = BF16 && !BY_ROW ? 1 : 2, VALUE_PARTS = BF16 && !BY_COLUMN ? 1 : 2;
  // Whether operands are made from a copy of the inputs in shared memory.
  static constexpr bool STAGED_KEYS = COPIED && KEY_PARTS == 2, STAGED_VALUES = COPIED && VALUE_PARTS == 2;
  static constexpr bool STAGED = STAGED_KEYS || STAGED_VALUES;
  // Whether the scores of the next chunk are computed beside the products of this one: then its keys are there already. A
  // machine that moves sub-tiles by itself moves the rows of such a sweep; others take the compact form instead.
  static constexpr bool FOR_AHEAD = BF16 && !VECTOR && !COMPACT && (R == 64 || (R == 128 && W == 2));
  static constexpr bool AHEAD = HAS_SUBTILE_COPIES && FOR_AHEAD;
  static_assert(R <= CLA_CHUNKED_ROWS && (!COMPACT || (BF16 && !VECTOR)), "what the kernels take");
  // What is not copied but computed into shared memory has no second stage.
  static constexpr int KEY_STAGES = AHEAD ? 3 : KEY_PARTS == 1 ? 2 : 1, VALUE_STAGES = VALUE_PARTS == 1 && !COMPACT ? 2 : 1;
  static constexpr int SCORE_SETS = AHEAD ? 2 : 1;
  // Sets of factors of a decay for the whole state: those of chunks to come are written while those of a chunk, and ahead of
  // their turn those of the next, are still read. There each warp writes one.
  static constexpr int FACTOR_SETS = AHEAD ? THREADS / 32 + 2 : 2;

  // A row of f32 numbers: 16 bytes more than there are, so that rows begin at different banks.
  static constexpr int PITCH = GATES + 4, OUT_PITCH = COLUMNS + 4;
  // Whether outputs wait in shared memory until whole rows of them go out, and in f32.
  static constexpr bool STAGED_OUT = COPIED && (SMALL_OUT || !COMPACT), WIDE_OUT = STAGED_OUT && !SMALL_OUT;
  // Whether they take the place of what was read for them.
  static constexpr bool OUT_OF_READ = COMPACT ? R == COLUMNS : WIDE_OUT && STAGED_KEYS && !BY_COLUMN && R >= COLUMNS;

  static constexpr int KEY = R * 128, VALUE = W * SUBTILE;
  static constexpr int VALUES = KEY_STAGES * KEY_PARTS * 2 * KEY;
  static constexpr int RAW = VALUES + VALUE_STAGES * VALUE_PARTS * VALUE;
  static constexpr int RAW_KEY = SIZE * CHUNK * R, RAW_VALUES = RAW + (STAGED_KEYS ? 2 * RAW_KEY : 0);
  static constexpr int RAW_GATES = RAW_VALUES + (STAGED_VALUES ? SIZE * CHUNK * COLUMNS : 0);
  static constexpr int AFTER_RAW = RAW_GATES + (STAGED && VECTOR ? 4 * CHUNK * GATES : 0);
  // The sums of log decays [CHUNK, PITCH]. Along rows they are done with before the scores are written, and where operands
  // have been staged they are only needed once those are not. Along columns the output needs them and then takes their place.
  static constexpr int DECAYS = BY_ROW && STAGED ? RAW : AFTER_RAW, DECAY_BYTES = VECTOR ? 4 * CHUNK * PITCH : 0;
  static constexpr int SCORES = BY_COLUMN ? DECAYS + DECAY_BYTES : AFTER_RAW;
  static constexpr int AFTER_SCORES = SCORES + 2 * SCORE_SETS * SUBTILE;
  static constexpr int AFTER_DECAYS = DECAYS + DECAY_BYTES;
  static constexpr int OUT = WIDE_OUT && OUT_OF_READ        ? 0
                             : WIDE_OUT && BY_COLUMN        ? DECAYS
                             : AFTER_SCORES > AFTER_DECAYS ? AFTER_SCORES
                                                            : AFTER_DECAYS;
  // Where outputs go out by themselves, those of the next chunk have their own place, if they are small.
  static constexpr int OUT_SETS = AHEAD && SMALL_OUT ? 2 : 1;
  // In f32 they lie in rows, or in sub-tiles of 32 columns where they go out as such or have no more room than those.
  static constexpr bool SUBTILES_OUT = AHEAD || OUT_OF_READ;
  static constexpr int OUT_BYTES = !STAGED_OUT || OUT_OF_READ ? 0
                                   : SMALL_OUT                ? OUT_SETS * VALUE
                                   : SUBTILES_OUT             ? 2 * VALUE
                                                              : 4 * CHUNK * OUT_PITCH;
  static constexpr int AFTER_OUT = OUT + OUT_BYTES > AFTER_SCORES ? OUT + OUT_BYTES : AFTER_SCORES;
  // Sums of a thread's steps.
  static constexpr int TOTALS = (AFTER_OUT + 15) / 16 * 16;
  static constexpr int FACTORS = TOTALS + (STAGED && VECTOR ? 16 * THREADS : 0);
  static constexpr int FACTOR_COUNT = SCALAR ? FACTOR_SETS * (4 * CHUNK + 4) : VECTOR ? (STAGED ? 5 : 4) * GATES + 4 : 0;
  // A count for each stage of the keys and of the values.
  static constexpr int COUNTS = FACTORS + 4 * FACTOR_COUNT;
  static constexpr int SHARED = COUNTS + (AHEAD ? 8 * (KEY_STAGES + VALUE_STAGES) : 0);
};

}  // namespace cla
