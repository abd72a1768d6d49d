//! Which kernels a delta sweep takes: a plain function of its sizes and the GPU's numbers.

use super::ffi;
use crate::cuda::route::Card;
use crate::options::Mode;

/// Steps up to which a chunk of 64 would be mostly padding.
const SHORT: usize = 16;
/// Columns of the state that a block of the chunked kernel can have, and about how long a segment takes with them, in
/// microseconds. More share what they read, fewer make more blocks. With more rows the fewer take as long as the more.
const COLUMNS: [(usize, usize); 2] = [(128, 4), (64, 2)];
const MANY_ROWS: usize = 128;
/// Segments in a span of [`Mode::Chunk`].
const SPAN: usize = 4;
/// What it takes, in the same unit, to launch what a division of time needs besides, and to find where a span starts.
const LAUNCHES: usize = 10;
const START: usize = 3;

/// What a sweep is, as far as the choice goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// Sequences times heads.
    pub states: usize,
    /// Steps in the longest sequence.
    pub longest: usize,
    /// K and V.
    pub rows: usize,
    pub cols: usize,
}

/// The kernels of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// Token by token.
    Recurrent,
    /// In chunks, so many columns of the state a block.
    Chunked { columns: usize, spans: Option<Spans> },
}

/// A division of time: `count` spans of `length` segments at once, from states that are found by blocks of so many columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spans {
    pub length: usize,
    pub count: usize,
    pub columns: usize,
}

/// The kernels for a sweep; `needs` is the shared memory of the chunked kernel with so many columns, if it takes the sweep.
pub(super) fn route(mode: Mode, size: &Size, card: &Card, needs: impl Fn(usize) -> Option<usize>) -> Route {
    let short = mode == Mode::Auto && size.longest <= SHORT;
    if mode == Mode::Recurrent || short {
        return Route::Recurrent;
    }
    let fitting =
        COLUMNS.into_iter().filter(|(columns, _)| needs(*columns).is_some_and(|b| b <= card.shared_memory));
    // The columns of the blocks that go over `states` of such widths the soonest, and how long a segment takes them all. A
    // block has a multiprocessor to itself.
    let soonest = |states: usize, widths: &[usize]| {
        let rounds = |columns| {
            let tiles: usize = widths.iter().map(|width: &usize| width.div_ceil(columns)).sum();
            (states * tiles).div_ceil(card.multiprocessors)
        };
        let halves = if size.rows > MANY_ROWS { 2 } else { 1 };
        fitting
            .clone()
            .map(|(columns, time)| (columns, halves * time * rounds(columns)))
            .min_by_key(|(_, time)| *time)
    };
    let segments = size.longest.div_ceil(ffi::SEGMENT).max(1);
    // How long a division into spans of so many segments takes, and what it is.
    let divided = |length: usize| {
        let count = segments.div_ceil(length);
        let (columns, time) = soonest(size.states * count, &[size.cols])?;
        if count == 1 {
            return Some((length * time, Route::Chunked { columns, spans: None }));
        }
        let (of_changes, more) = soonest(size.states * (count - 1), &[size.cols, size.rows])?;
        let spans = Some(Spans { length, count, columns: of_changes });
        Some((length * (time + more) + START * count + LAUNCHES, Route::Chunked { columns, spans }))
    };
    let chosen = match mode {
        Mode::Chunk => divided(SPAN.min(segments)),
        Mode::Auto => (1..=card.multiprocessors.min(segments))
            .filter_map(|count| divided(segments.div_ceil(count)))
            .min_by_key(|(time, _)| *time),
        _ => divided(segments),
    };
    chosen.map_or(Route::Recurrent, |(_, route)| route)
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Card = Card { multiprocessors: 132, shared_memory: 227 * 1024, major: 9, minor: 0 };
    const LONG: Size = Size { states: 16, longest: 32768, rows: 128, cols: 128 };
    const NARROW: Route = Route::Chunked { columns: 64, spans: None };

    fn needs(columns: usize) -> Option<usize> {
        Some(1024 * columns)
    }

    #[test]
    fn auto_decodes_token_by_token() {
        for (longest, wanted) in
            [(0, Route::Recurrent), (1, Route::Recurrent), (16, Route::Recurrent), (17, NARROW)]
        {
            assert_eq!(route(Mode::Auto, &Size { longest, ..LONG }, &H200, needs), wanted, "{longest}");
        }
    }

    #[test]
    fn modes_are_algorithms() {
        assert_eq!(route(Mode::Recurrent, &LONG, &H200, needs), Route::Recurrent);
        let short = Size { longest: 1, ..LONG };
        for mode in [Mode::Chunk, Mode::FusedChunk] {
            assert_eq!(route(mode, &short, &H200, needs), NARROW);
        }
        assert_eq!(route(Mode::FusedChunk, &LONG, &H200, needs), NARROW);
        let longer = Size { longest: 257, ..LONG };
        let spans = Some(Spans { length: 4, count: 2, columns: 64 });
        assert_eq!(route(Mode::Chunk, &longer, &H200, needs), Route::Chunked { columns: 64, spans });
    }

    #[test]
    fn blocks_have_all_columns_where_halves_would_take_turns() {
        for (states, columns) in [(16, 64), (66, 64), (67, 128), (132, 128), (256, 128)] {
            let size = Size { states, ..LONG };
            let spans = None;
            let wanted = Route::Chunked { columns, spans };
            assert_eq!(route(Mode::FusedChunk, &size, &H200, needs), wanted, "{states}");
        }
        let few = Size { cols: 64, states: 256, ..LONG };
        assert_eq!(route(Mode::Auto, &few, &H200, needs), NARROW);
        let small = Card { shared_memory: 99 * 1024, ..H200 };
        let many = Size { states: 256, ..LONG };
        assert_eq!(route(Mode::Auto, &many, &small, needs), NARROW);
    }

    #[test]
    fn auto_divides_time_where_multiprocessors_are_idle() {
        let spans = |size: &Size| match route(Mode::Auto, size, &H200, needs) {
            Route::Chunked { spans, .. } => spans,
            Route::Recurrent => panic!("{size:?}"),
        };
        assert_eq!(spans(&LONG), Some(Spans { length: 171, count: 3, columns: 64 }));
        for states in [33, 66, 132, 256] {
            assert_eq!(spans(&Size { states, ..LONG }), None, "{states}");
        }
        // As a test on the host has it, for an odd number of segments.
        let few = Size { states: 1, longest: 1590, rows: 16, cols: 40 };
        assert_eq!(spans(&few), Some(Spans { length: 5, count: 5, columns: 64 }));
        // The shorter, the less there is to gain.
        assert_eq!(spans(&Size { longest: 512, ..LONG }), None);
        let one = spans(&Size { states: 1, ..LONG }).unwrap();
        assert!(
            one.count > 8 && one.count * one.length >= 512 && (one.count - 1) * one.length < 512,
            "{one:?}"
        );
    }

    #[test]
    fn what_does_not_fit_goes_token_by_token() {
        assert_eq!(route(Mode::FusedChunk, &LONG, &H200, |_| None), Route::Recurrent);
        let tiny = Card { shared_memory: 48 * 1024, ..H200 };
        assert_eq!(route(Mode::FusedChunk, &LONG, &tiny, needs), Route::Recurrent);
    }
}
