//! Which kernels a delta sweep takes: a plain function of its sizes and the GPU's numbers.

use candle_core::DType;

use super::ffi;
use crate::cuda::route::Card;
use crate::options::Mode;

/// Steps up to which a chunk of 64 would be mostly padding.
const SHORT: usize = 16;
/// Columns of the state that a block of the chunked kernel can have, and about how long it takes with them. More share what
/// they read, fewer make more blocks.
const COLUMNS: [(usize, usize); 2] = [(128, 3), (64, 2)];

/// What a sweep is, as far as the choice goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// Sequences times heads.
    pub states: usize,
    /// Steps in the longest sequence.
    pub longest: usize,
    pub cols: usize,
}

/// The kernels of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// Token by token.
    Recurrent,
    /// In chunks, so many columns of the state a block.
    Chunked { columns: usize },
}

/// The kernels for a sweep; `needs` is the shared memory of the chunked kernel with so many columns, if it takes the sweep.
pub(super) fn route(mode: Mode, size: &Size, card: &Card, needs: impl Fn(usize) -> Option<usize>) -> Route {
    let short = mode == Mode::Auto && size.longest <= SHORT;
    if mode == Mode::Recurrent || short {
        return Route::Recurrent;
    }
    // A block has a multiprocessor to itself.
    let rounds = |columns: usize| (size.states * size.cols.div_ceil(columns)).div_ceil(card.multiprocessors);
    COLUMNS
        .into_iter()
        .filter(|(columns, _)| needs(*columns).is_some_and(|bytes| bytes <= card.shared_memory))
        .min_by_key(|(columns, time)| time * rounds(*columns))
        .map_or(Route::Recurrent, |(columns, _)| Route::Chunked { columns })
}

/// Whether a sweep token by token waits so much for memory, or has so many blocks, that it is better off with room for twice
/// as many on a multiprocessor: these make addresses anew all the time, by which inputs in f32 would lose more than they gain.
pub(super) fn is_crowded(size: &Size, dtype: DType, card: &Card) -> bool {
    /// Blocks that a multiprocessor has room for otherwise.
    const BLOCKS: usize = 4;
    let blocks = size.states * size.cols.div_ceil(ffi::COLUMNS);
    size.longest <= SHORT || (dtype != DType::F32 && blocks > BLOCKS * card.multiprocessors)
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Card = Card { multiprocessors: 132, shared_memory: 227 * 1024, major: 9, minor: 0 };
    const LONG: Size = Size { states: 16, longest: 32768, cols: 128 };

    fn needs(columns: usize) -> Option<usize> {
        Some(1024 * columns)
    }

    #[test]
    fn auto_decodes_token_by_token() {
        for (longest, wanted) in [
            (0, Route::Recurrent),
            (1, Route::Recurrent),
            (16, Route::Recurrent),
            (17, Route::Chunked { columns: 64 }),
        ] {
            assert_eq!(route(Mode::Auto, &Size { longest, ..LONG }, &H200, needs), wanted, "{longest}");
        }
    }

    #[test]
    fn modes_are_algorithms() {
        assert_eq!(route(Mode::Recurrent, &LONG, &H200, needs), Route::Recurrent);
        let short = Size { longest: 1, ..LONG };
        for mode in [Mode::Chunk, Mode::FusedChunk] {
            assert_eq!(route(mode, &short, &H200, needs), Route::Chunked { columns: 64 });
        }
    }

    #[test]
    fn blocks_have_all_columns_where_halves_would_take_turns() {
        for (states, columns) in [(16, 64), (66, 64), (67, 128), (132, 128), (256, 128)] {
            let size = Size { states, ..LONG };
            assert_eq!(route(Mode::Auto, &size, &H200, needs), Route::Chunked { columns }, "{states}");
        }
        let few = Size { cols: 64, states: 256, ..LONG };
        assert_eq!(route(Mode::Auto, &few, &H200, needs), Route::Chunked { columns: 64 });
        let small = Card { shared_memory: 99 * 1024, ..H200 };
        let many = Size { states: 256, ..LONG };
        assert_eq!(route(Mode::Auto, &many, &small, needs), Route::Chunked { columns: 64 });
    }

    #[test]
    fn what_does_not_fit_goes_token_by_token() {
        assert_eq!(route(Mode::FusedChunk, &LONG, &H200, |_| None), Route::Recurrent);
        let tiny = Card { shared_memory: 48 * 1024, ..H200 };
        assert_eq!(route(Mode::FusedChunk, &LONG, &tiny, needs), Route::Recurrent);
    }

    #[test]
    fn decoding_and_many_blocks_make_a_crowd() {
        assert!(is_crowded(&Size { longest: 1, ..LONG }, DType::F32, &H200));
        assert!(!is_crowded(&LONG, DType::BF16, &H200));
        let (fits, too_many) = (Size { states: 132, ..LONG }, Size { states: 133, ..LONG });
        assert!(!is_crowded(&fits, DType::BF16, &H200));
        assert!(is_crowded(&too_many, DType::BF16, &H200));
        assert!(!is_crowded(&too_many, DType::F32, &H200));
    }
}
