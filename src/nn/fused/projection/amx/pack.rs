//! `x` as tiles want it: two numbers in bf16 for each element, columns of pairs.

use super::tiles::{DEPTH, PIECES, SIDE};
use std::arch::x86_64::*;

/// Tiles of up to 16 rows of `x` of `k` elements, for each [`DEPTH`] of them one tile a piece. A tile has a line for each
/// pair of elements, and in it the pairs of all rows; the lines are `width` pairs long.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn pack(x: &[f32], k: usize, width: usize, tiles: &mut [u32]) {
    let steps = tiles.chunks_exact_mut(PIECES * SIDE * width);
    for (step, tiles) in steps.enumerate() {
        let mut pairs = [[_mm512_setzero_si512(); SIDE]; PIECES];
        for (row, x) in x.chunks_exact(k).enumerate() {
            let pieces = pieces(halves(&x[step * DEPTH..]));
            for (pairs, piece) in pairs.iter_mut().zip(pieces) {
                pairs[row] = piece;
            }
        }
        for (pairs, tile) in pairs.into_iter().zip(tiles.chunks_exact_mut(SIDE * width)) {
            for (line, to) in transposed(pairs).into_iter().zip(tile.chunks_exact_mut(width)) {
                // SAFETY: only the lanes of `to` are written.
                unsafe { _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), first_lanes(width), line) };
            }
        }
    }
}

/// The first [`DEPTH`] elements, zeros where there are fewer.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(x: &[f32]) -> [__m512; 2] {
    let load = |from: usize| {
        let x = &x[from.min(x.len())..];
        // SAFETY: only lanes within `x` are read.
        unsafe { _mm512_maskz_loadu_ps(first_lanes(x.len()), x.as_ptr()) }
    };
    [load(0), load(SIDE)]
}

/// The nearest numbers in bf16, and those nearest to what is left then: together 16 bits of an element, or more.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pieces([a, b]: [__m512; 2]) -> [__m512i; PIECES] {
    let narrow = |a, b| {
        let narrow = _mm512_cvtne2ps_pbh(b, a);
        // SAFETY: both are 512 bits.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(narrow) }
    };
    let wide = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)));
    let first = narrow(a, b);
    let a = _mm512_sub_ps(a, wide(_mm512_castsi512_si256(first)));
    let b = _mm512_sub_ps(b, wide(_mm512_extracti64x4_epi64::<1>(first)));
    [first, narrow(a, b)]
}

/// Rows for columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(mut rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    let lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let upper = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    // Four times the rows of both halves are interleaved, as cards are shuffled: the bits of an element's number, row
    // before column, go around by one each time.
    for _ in 0..4 {
        let mut shuffled = rows;
        for i in 0..SIDE / 2 {
            shuffled[2 * i] = _mm512_permutex2var_epi32(rows[i], lower, rows[i + SIDE / 2]);
            shuffled[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], upper, rows[i + SIDE / 2]);
        }
        rows = shuffled;
    }
    rows
}

/// A mask of the first lanes, all of them if that many there are not.
pub(super) fn first_lanes(count: usize) -> __mmask16 {
    if count < SIDE { (1 << count) - 1 } else { __mmask16::MAX }
}
