//! Buffers that begin with a cache line, and moving short rows.

use std::ops::{Deref, DerefMut, Range};

use pulp::Simd;

/// Floats from a cache line's beginning on: a vector that lies in two lines takes two loads.
pub(super) struct Lines {
    data: Vec<f32>,
    range: Range<usize>,
}

impl Lines {
    const FLOATS: usize = 64 / size_of::<f32>();

    pub fn zeros(len: usize) -> Self {
        let data = vec![0.; len + Self::FLOATS];
        // Where no address can be told, any will do.
        let start = data.as_ptr().align_offset(64).min(Self::FLOATS);
        Self { data, range: start..start + len }
    }
}

impl Deref for Lines {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        &self.data[self.range.clone()]
    }
}

impl DerefMut for Lines {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.range.clone()]
    }
}

/// `x` times `factors`, where one factor stands for all and none for 1.
#[inline(always)]
pub(super) fn scaled<'x>(x: &'x [f32], factors: &[f32], scratch: &'x mut [f32]) -> &'x [f32] {
    let y = &mut scratch[..x.len()];
    match factors {
        [] => return x,
        [f] => y.iter_mut().zip(x).for_each(|(y, x)| *y = x * f),
        _ => y.iter_mut().zip(x).zip(factors).for_each(|((y, x), f)| *y = x * f),
    }
    y
}

/// Copies a whole tile's columns, or what there is of them, without a call of `memcpy`, which would cost more than it
/// moves.
#[inline(always)]
pub(super) fn copy<S: Simd>(from: &[f32], to: &mut [f32]) {
    if let ([a, b], [x, y]) = (S::as_simd_f32s(from).0, S::as_mut_simd_f32s(&mut *to).0) {
        (*x, *y) = (*a, *b);
    } else {
        to.iter_mut().zip(from).for_each(|(y, x)| *y = *x);
    }
}
