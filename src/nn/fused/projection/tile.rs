//! The products of a few rows with a few outputs, sums in registers.

use super::stored::{Format, SPAN};
use pulp::{Simd, WithSimd};
use std::marker::PhantomData;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use std::mem::MaybeUninit;
use std::ops::Range;

/// Elements of a row whose products are summed up before they join the others; weights of a tile stay in L1 meanwhile.
const CHUNK: usize = 2048;
/// Rows of a tile.
const M: usize = 4;
/// Outputs of a tile at most.
const MAX_N: usize = 6;

/// A matrix of which several threads write columns of their own.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    data: *mut f32,
    len: usize,
    cols: usize,
    elements: PhantomData<&'a mut [f32]>,
}

// SAFETY: what writes asks of its callers that no two threads write one element.
unsafe impl Send for Columns<'_> {}
// SAFETY: the same.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    pub fn new(data: &'a mut [f32], cols: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), cols, elements: PhantomData }
    }

    /// Elements that hold nothing yet: they can be written, not added to.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub fn empty(data: &'a mut [MaybeUninit<f32>], cols: usize) -> Self {
        Self { data: data.as_mut_ptr().cast(), len: data.len(), cols, elements: PhantomData }
    }

    /// # Safety
    /// Nobody else reads or writes this element meanwhile, and it holds a number.
    #[inline(always)]
    unsafe fn add(self, row: usize, col: usize, value: f32) {
        let at = row * self.cols + col;
        assert!(at < self.len && col < self.cols);
        // SAFETY: within the elements, and nobody else's.
        unsafe { *self.data.add(at) += value };
    }

    /// Where some columns of a row are; whoever writes there sees to it that nobody else does.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub fn part(self, row: usize, cols: Range<usize>) -> *mut f32 {
        let at = row * self.cols + cols.start;
        assert!(cols.end <= self.cols && at + cols.len() <= self.len);
        // SAFETY: within the elements.
        unsafe { self.data.add(at) }
    }
}

/// Some of the outputs for some of the rows.
pub(super) struct Task<'a, F> {
    pub x: &'a [f32],
    pub rows: Range<usize>,
    /// From a row of `x` to the next, `k` rounded up to whole groups; what is between is 0.
    pub stride: usize,
    /// From a row of weights to the next.
    pub k: usize,
    pub weights: F,
    pub outputs: Range<usize>,
    pub y: Columns<'a>,
}

/// The same for each of up to eight indices, written out: the compiler keeps what is indexed in registers.
macro_rules! unrolled {
    ($count:expr, |$n:ident| $body:expr) => {
        unrolled!(@ $count, $n, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $count:expr, $n:ident, $body:expr, $($index:literal)*) => {
        $(if $index < $count {
            let $n = $index;
            $body;
        })*
    };
}

/// Room for vectors, which begin at the beginning of a cache line.
#[repr(align(64))]
struct Buffer<const LEN: usize>([f32; LEN]);

impl<F: Format> WithSimd for Task<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let many_registers = S::REGISTER_COUNT >= 32;
        match self.rows.len() {
            // As many running sums as it takes to keep the units busy, and registers to hold them.
            1 if F::STREAMS <= 4 => self.stream::<S, 1, 4>(simd),
            1 => self.stream::<S, 1, 8>(simd),
            2 if many_registers => self.stream::<S, 2, 8>(simd),
            3 if many_registers => self.stream::<S, 3, 8>(simd),
            2 => self.stream::<S, 2, 4>(simd),
            3 => self.stream::<S, 3, 4>(simd),
            _ if many_registers => self.many::<S, 6>(simd),
            _ => self.many::<S, 3>(simd),
        }
    }
}

impl<F: Format> Task<'_, F> {
    /// So few rows that weights are widened where they are used.
    ///
    /// Outputs that are computed side by side lie apart, so that each of N reads goes on for several rows: those of a
    /// model's matrices are so short that the hardware would never see where they go on.
    #[inline(always)]
    fn stream<S: Simd, const R: usize, const N: usize>(&self, simd: S) {
        let each = self.outputs.len().div_ceil(N);
        for first in self.outputs.clone().take(each) {
            let outputs: [usize; N] = std::array::from_fn(|n| first + n * each);
            let rows = outputs.map(|output| self.row(output));
            for chunk in self.chunks() {
                let x = self.x::<S, R>(self.rows.start, chunk.clone());
                let mut sums = [[simd.splat_f32s(0.); N]; R];
                let (mut at, end) = (chunk.start, chunk.end.min(self.k));
                while at + SPAN <= end {
                    let spans = rows.map(|row| self.weights.span(row + at));
                    let x = x.map(|x| &x[(at - chunk.start) / S::F32_LANES..]);
                    add_products::<S, F, R, N>(simd, x, spans, SPAN / F::PART, &mut sums);
                    at += SPAN;
                }
                if at < end {
                    let rests = rows.map(|row| self.weights.rest(row + at, row + end));
                    let (x, parts) =
                        (x.map(|x| &x[(at - chunk.start) / S::F32_LANES..]), (end - at).div_ceil(F::PART));
                    add_products::<S, F, R, N>(simd, x, rests.each_ref(), parts, &mut sums);
                }
                self.store(simd, self.rows.start, outputs, sums);
            }
        }
    }

    /// Weights are widened once for many rows.
    #[inline(always)]
    fn many<S: Simd, const N: usize>(&self, simd: S) {
        let mut buffer = Buffer([0.; MAX_N * CHUNK]);
        for chunk in self.chunks() {
            for output in self.outputs.clone().step_by(N) {
                let w = self.widened::<S, N>(simd, output, chunk.clone(), &mut buffer.0);
                self.sweep(simd, output, chunk.clone(), w);
            }
        }
    }

    #[inline(always)]
    fn widened<'b, S: Simd, const N: usize>(
        &self,
        simd: S,
        output: usize,
        chunk: Range<usize>,
        buffer: &'b mut [f32],
    ) -> [&'b [S::f32s]; N] {
        let len = chunk.len();
        for (n, row) in buffer.chunks_exact_mut(len).take(N).enumerate() {
            let from = self.row(output + n);
            let spans = chunk.clone().step_by(SPAN);
            for (at, to) in spans.zip(S::as_mut_simd_f32s(row).0.chunks_mut(SPAN / S::F32_LANES)) {
                match at + SPAN <= self.k {
                    true => widen::<S, F>(simd, self.weights.span(from + at), to),
                    false => widen::<S, F>(simd, &self.weights.rest(from + at, from + self.k), to),
                }
            }
        }
        let buffer = &*buffer;
        std::array::from_fn(|n| S::as_simd_f32s(&buffer[n * len..][..len]).0)
    }

    #[inline(always)]
    fn sweep<S: Simd, const N: usize>(
        &self,
        simd: S,
        output: usize,
        chunk: Range<usize>,
        w: [&[S::f32s]; N],
    ) {
        for row in self.rows.clone().step_by(M) {
            match self.rows.end - row {
                1 => self.tile::<S, 1, N>(simd, row, output, chunk.clone(), w),
                2 => self.tile::<S, 2, N>(simd, row, output, chunk.clone(), w),
                3 => self.tile::<S, 3, N>(simd, row, output, chunk.clone(), w),
                _ => self.tile::<S, M, N>(simd, row, output, chunk.clone(), w),
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const N: usize>(
        &self,
        simd: S,
        row: usize,
        output: usize,
        chunk: Range<usize>,
        w: [&[S::f32s]; N],
    ) {
        let len = w[0].len();
        let (x, w) = (self.x::<S, R>(row, chunk).map(|x| &x[..len]), w.map(|w| &w[..len]));
        let mut sums = [[simd.splat_f32s(0.); N]; R];
        for i in 0..len {
            let w: [S::f32s; N] = std::array::from_fn(|n| w[n][i]);
            for (x, sums) in x.iter().zip(&mut sums) {
                for (w, sum) in w.iter().zip(sums) {
                    *sum = simd.mul_add_e_f32s(x[i], *w, *sum);
                }
            }
        }
        self.store(simd, row, std::array::from_fn(|n| output + n), sums);
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<F> {
        let stride = self.stride;
        (0..stride).step_by(CHUNK).map(move |from| from..stride.min(from + CHUNK))
    }

    #[inline(always)]
    fn x<S: Simd, const R: usize>(&self, row: usize, cols: Range<usize>) -> [&[S::f32s]; R] {
        std::array::from_fn(|i| S::as_simd_f32s(&self.x[(row + i) * self.stride..][cols.clone()]).0)
    }

    /// Where the weights of an output begin. Behind the last, the last again, for sums that nobody asks for.
    #[inline(always)]
    fn row(&self, output: usize) -> usize {
        output.min(self.outputs.end - 1) * self.k
    }

    #[inline(always)]
    fn store<S: Simd, const R: usize, const N: usize>(
        &self,
        simd: S,
        row: usize,
        outputs: [usize; N],
        sums: [[S::f32s; N]; R],
    ) {
        for (i, sums) in sums.into_iter().enumerate() {
            for (output, sum) in outputs.into_iter().zip(sums) {
                if output < self.outputs.end {
                    // SAFETY: the outputs of a task are its own.
                    unsafe { self.y.add(row + i, output, simd.reduce_sum_f32s(sum)) };
                }
            }
        }
    }
}

/// Adds the products of some rows of inputs with a span of weights of some outputs.
#[inline(always)]
fn add_products<S: Simd, F: Format, const R: usize, const N: usize>(
    simd: S,
    x: [&[S::f32s]; R],
    spans: [&F::Span; N],
    parts: usize,
    sums: &mut [[S::f32s; N]; R],
) {
    let vectors = F::PART / S::F32_LANES;
    let mut scales = [F::Scales::default(); N];
    for n in 0..N {
        scales[n] = F::scales(simd, spans[n]);
    }
    let mut own = *sums;
    for part in 0..parts {
        let x = x.map(
            #[inline(always)]
            |x| &x[part * vectors..][..vectors],
        );
        unrolled!(N, |n| F::part(
            simd,
            spans[n],
            part,
            &scales[n],
            #[inline(always)]
            |i, w| {
                for r in 0..R {
                    own[r][n] = simd.mul_add_e_f32s(x[r][i], w, own[r][n]);
                }
            },
        ));
    }
    *sums = own;
}

#[inline(always)]
fn widen<S: Simd, F: Format>(simd: S, span: &F::Span, to: &mut [S::f32s]) {
    let vectors = F::PART / S::F32_LANES;
    let scales = F::scales(simd, span);
    for (part, to) in to.chunks_exact_mut(vectors).enumerate() {
        F::part(
            simd,
            span,
            part,
            &scales,
            #[inline(always)]
            |i, w| to[i] = w,
        );
    }
}
