//! Which kernels a sweep takes, or why none: plain functions of its sizes and the GPU's numbers.

use std::ops::Range;

use candle_core::{Result, bail};

use super::ffi::{CHUNK, CHUNKED_ROWS, RECURRENT_ROWS};
use crate::options::Mode;
use crate::problem::Update;

/// Steps up to which a chunk of 64 would be mostly padding.
const SHORT: usize = 16;
/// Chunks in a segment of [`Mode::Chunk`], and the fewest that a division over time is worth.
const SEGMENT_CHUNKS: usize = 4;
/// Columns of the state that a block of a chunked kernel has, where it has the most.
const BLOCK_COLUMNS: usize = 128;
/// Columns of the state that a block has that goes token by token.
const LEAST_COLUMNS: usize = 32;
/// The most blocks along the first dimension of a grid.
const MOST_BLOCKS: usize = i32::MAX as usize;

/// A GPU in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Card {
    pub multiprocessors: usize,
    /// The most bytes of shared memory that a block can ask for.
    pub shared_memory: usize,
    /// Compute capability, `major.minor`.
    pub major: usize,
    pub minor: usize,
}

/// What a sweep is, as far as the choice of kernels goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub sequences: usize,
    /// Steps in the longest sequence.
    pub longest: usize,
    pub heads: usize,
    pub cols: usize,
}

/// The kernels of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// Token by token.
    Recurrent,
    /// In chunks, from the first to the last.
    Chunked,
    /// In chunks, `segments` runs of `steps` steps at once: their starting states are computed first.
    Segments { steps: usize, segments: usize },
}

impl Route {
    /// The most rows that a block of threads holds. The rows of an additive sweep do not see each other, but for its outputs, which
    /// are sums over them: more are taken in parts.
    pub fn most_rows(self) -> usize {
        if self == Self::Recurrent { RECURRENT_ROWS } else { CHUNKED_ROWS }
    }
}

/// The rows of a state in as few parts of at most `most` as there can be, of nearly the same size. They begin where 16 bytes do.
pub(super) fn row_parts(rows: usize, most: usize) -> Vec<Range<usize>> {
    if rows <= most {
        return std::iter::once(0..rows).collect();
    }
    let each = rows.div_ceil(rows.div_ceil(most)).next_multiple_of(16);
    (0..rows).step_by(each).map(|from| from..rows.min(from + each)).collect()
}

/// Says what is wrong with a GPU or with sizes that no kernel takes. `[k, v]` are those of a head.
pub(super) fn check(
    name: &str,
    card: &Card,
    update: Update,
    [k, v]: [usize; 2],
    states: usize,
    steps: usize,
) -> Result<()> {
    if card.major < 8 {
        bail!(
            "{name}: the GPU has compute capability {}.{}, the kernels need at least 8.0",
            card.major,
            card.minor
        );
    }
    // What a token writes there needs all of what the state has for its key.
    if update != Update::Additive && k > RECURRENT_ROWS {
        bail!("{name}: K is {k}, on CUDA it goes up to {RECURRENT_ROWS}");
    }
    // Blocks and scratch memory are counted by segment; a division over time has no shorter ones than a chunk. Token by token
    // they are counted by columns, of which K or V are.
    let each = steps.div_ceil(CHUNK).max(k.max(v).div_ceil(LEAST_COLUMNS)).max(1);
    if states.saturating_mul(each) > MOST_BLOCKS {
        bail!(
            "{name}: {states} states of {k} x {v} and of sequences of {steps} tokens are more blocks than a launch takes, \
             {MOST_BLOCKS}"
        );
    }
    Ok(())
}

/// The kernels for a sweep; `fits` says whether a chunked kernel has enough shared memory.
pub(super) fn route(mode: Mode, size: &Size, card: &Card, fits: bool) -> Route {
    let steps = match mode {
        Mode::Recurrent => return Route::Recurrent,
        Mode::Auto if size.longest <= SHORT => return Route::Recurrent,
        _ if !fits => return Route::Recurrent,
        Mode::FusedChunk => return Route::Chunked,
        Mode::Chunk => SEGMENT_CHUNKS * CHUNK,
        Mode::Auto => balanced(size, card),
    };
    match size.longest.div_ceil(steps) {
        0 | 1 => Route::Chunked,
        segments => Route::Segments { steps, segments },
    }
}

/// Steps in a segment, with as many segments as there are multiprocessors for.
fn balanced(size: &Size, card: &Card) -> usize {
    let chunks = size.longest.div_ceil(CHUNK);
    let blocks = size.sequences * size.heads * size.cols.div_ceil(BLOCK_COLUMNS);
    let segments = card.multiprocessors / blocks.max(1);
    chunks.div_ceil(segments.max(1)).max(SEGMENT_CHUNKS) * CHUNK
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Card = Card { multiprocessors: 132, shared_memory: 227 * 1024, major: 9, minor: 0 };

    fn size(sequences: usize, longest: usize, heads: usize, head_size: usize) -> Size {
        Size { sequences, longest, heads, cols: head_size }
    }

    #[test]
    fn every_mode_is_an_algorithm_of_its_own() {
        let long = size(4, 4096, 64, 128);
        assert_eq!(route(Mode::Recurrent, &long, &H200, true), Route::Recurrent);
        assert_eq!(route(Mode::FusedChunk, &long, &H200, true), Route::Chunked);
        let segments = Route::Segments { steps: 256, segments: 16 };
        assert_eq!(route(Mode::Chunk, &long, &H200, true), segments);
    }

    #[test]
    fn auto_decodes_token_by_token() {
        for (longest, wanted) in
            [(0, Route::Recurrent), (1, Route::Recurrent), (16, Route::Recurrent), (17, Route::Chunked)]
        {
            assert_eq!(route(Mode::Auto, &size(64, longest, 32, 128), &H200, true), wanted, "{longest}");
        }
    }

    #[test]
    fn auto_divides_time_only_among_idle_multiprocessors() {
        assert_eq!(route(Mode::Auto, &size(4, 4096, 64, 128), &H200, true), Route::Chunked);
        assert_eq!(route(Mode::Auto, &size(1, 8192, 96, 128), &H200, true), Route::Chunked);
        let few = route(Mode::Auto, &size(1, 32768, 16, 128), &H200, true);
        assert_eq!(few, Route::Segments { steps: 4096, segments: 8 });
        // Twice as many blocks, half as many segments.
        let wide = Size { cols: 256, ..size(1, 32768, 16, 128) };
        assert_eq!(route(Mode::Auto, &wide, &H200, true), Route::Segments { steps: 8192, segments: 4 });
    }

    #[test]
    fn auto_keeps_segments_long() {
        assert_eq!(route(Mode::Auto, &size(1, 256, 1, 64), &H200, true), Route::Chunked);
        let two = Route::Segments { steps: 256, segments: 2 };
        assert_eq!(route(Mode::Auto, &size(1, 257, 1, 64), &H200, true), two);
    }

    #[test]
    fn segments_cover_the_longest_sequence_in_whole_chunks() {
        for mode in [Mode::Auto, Mode::Chunk] {
            for longest in [65, 255, 256, 257, 1000, 4096, 5000, 100_000] {
                for heads in [1, 7, 16, 65, 200] {
                    let Route::Segments { steps, segments } =
                        route(mode, &size(1, longest, heads, 64), &H200, true)
                    else {
                        continue;
                    };
                    assert_eq!(steps % CHUNK, 0);
                    assert!((segments - 1) * steps < longest && longest <= segments * steps);
                }
            }
        }
    }

    #[test]
    fn parts_cover_the_rows() {
        for most in [128, 256] {
            for rows in [0, 1, 127, 128, 129, 255, 256, 257, 320, 512, 640, 1000] {
                let parts = row_parts(rows, most);
                assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, rows));
                assert!(
                    parts.windows(2).all(|p| p[0].end == p[1].start && p[1].start % 16 == 0),
                    "{parts:?}"
                );
                assert!(parts.iter().all(|p| p.len() <= most) && parts.len() == rows.div_ceil(most).max(1));
            }
        }
    }

    #[test]
    fn what_does_not_fit_goes_token_by_token() {
        for mode in [Mode::Auto, Mode::Chunk, Mode::FusedChunk] {
            assert_eq!(route(mode, &size(1, 4096, 4, 256), &H200, false), Route::Recurrent);
        }
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let check = |card: &Card, k, v, states, steps| {
            super::check("kda", card, Update::Delta, [k, v], states, steps).map_err(|e| e.to_string())
        };
        assert!(check(&H200, 256, 1000, 64, 4096).is_ok());
        assert!(check(&H200, 1, 1, 0, 0).is_ok());
        let k = check(&H200, 257, 64, 1, 1).unwrap_err();
        assert!(k.contains("kda: K is 257") && k.contains("256"), "{k}");
        assert!(super::check("gla", &H200, Update::Additive, [1000, 1000], 1, 1).is_ok());
        let old = check(&Card { major: 7, minor: 5, ..H200 }, 64, 64, 1, 1).unwrap_err();
        assert!(old.contains("7.5") && old.contains("8.0"), "{old}");
        for (states, v, steps) in [(1 << 26, 64, 64 << 10), (1 << 26, 1 << 12, 1)] {
            let many = check(&H200, 64, v, states, steps).unwrap_err();
            assert!(many.contains("blocks"), "{many}");
        }
        assert!(check(&H200, 64, 64, usize::MAX, usize::MAX).is_err());
    }
}
