//! Matrix products of f32 on a CPU, with as many threads as each is worth.
//!
//! Candle's own ask the operating system how many cores there are at every call, which on Linux means to read a file:
//! three times as long as a token's products take in a small model.

use std::ops::Range;

use candle_core::{Result, bail};
use gemm::{Parallelism, gemm};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Tokens of a sequence up to which a product takes the time that its weights take to be read.
const FEW: usize = 8;
/// Rows that weights are read for at once; all of them stay in the cache meanwhile.
const GROUP: usize = 64;
/// Weights from which on other threads are worth the time it takes to wake them.
const LEAST_PARALLEL: usize = 1 << 20;
/// Outputs that a thread takes at a time.
const BLOCK: usize = 64;

/// A matrix: its elements, rows, columns, and the distances from row to row and from column to column.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Row-major elements.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        if rows.checked_mul(cols) != Some(data.len()) {
            bail!("a matrix of {rows} x {cols} does not have {} elements", data.len());
        }
        Ok(Self { data, rows, cols, strides: [cols, 1] })
    }

    pub fn transposed(self) -> Self {
        let Self { data, rows, cols, strides: [row, col] } = self;
        Self { data, rows: cols, cols: rows, strides: [col, row] }
    }
}

/// `a b`, row-major.
pub(super) fn product(a: Matrix, b: Matrix) -> Vec<f32> {
    product_of(a.rows, a, b)
}

/// The same for the rows of sequences of so many tokens each. That alone decides the order of the sums, so that sequences
/// decoded together get what each would get alone.
pub(super) fn product_of(tokens: usize, a: Matrix, b: Matrix) -> Vec<f32> {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "matrices that do not fit");
    // A product with columns of weights that lie as they are read, as a projection's do.
    if a.strides[1] == 1 && b.strides[0] == 1 {
        if tokens <= FEW {
            return groups(a, b);
        }
        if is_narrow(k, n) {
            return narrow(a, b);
        }
    }
    let mut c = vec![0.; m * n];
    let threads = rayon::current_num_threads();
    let [a_row, a_col] = a.strides.map(|stride| stride as isize);
    let [b_row, b_col] = b.strides.map(|stride| stride as isize);
    // SAFETY: `new` saw to it that sizes and strides stay within the elements, and `c` has m x n of its own.
    unsafe {
        gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.data.as_ptr(),
            a_col,
            a_row,
            b.data.as_ptr(),
            b_col,
            b_row,
            0.,
            1.,
            false,
            false,
            false,
            // It keeps small products on this thread by itself.
            if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None },
        );
    }
    c
}

/// Whether `gemm` would choose the order of a sum by the number of rows, so that a sequence would get another result in
/// another company: it has a kernel of its own for results of up to 256 elements, and cuts long sums elsewhere if neither
/// rows nor columns are more than 64.
fn is_narrow(k: usize, n: usize) -> bool {
    n <= 256 / FEW || (n <= 64 && k > 512)
}

/// A few rows after the other, each as if it were alone.
fn narrow(a: Matrix, b: Matrix) -> Vec<f32> {
    let (n, stride) = (b.cols, a.strides[0]);
    let mut c = vec![0.; a.rows * n];
    c.par_chunks_mut((FEW * n).max(1)).enumerate().for_each(|(block, c)| {
        let rows = c.len() / n;
        let some = Matrix { data: &a.data[block * FEW * stride..], rows, ..a };
        let mut columns = vec![0.; n * rows];
        Arch::new().dispatch(Dots { a: some, b, outputs: 0..n, y: &mut columns });
        for (i, row) in c.chunks_exact_mut(n).enumerate() {
            row.iter_mut().zip(columns[i..].iter().step_by(rows)).for_each(|(y, x)| *y = *x);
        }
    });
    c
}

fn groups(a: Matrix, b: Matrix) -> Vec<f32> {
    if a.rows <= GROUP {
        return few_rows(a, b);
    }
    let group = |from| Matrix { data: &a.data[from * a.strides[0]..], rows: GROUP.min(a.rows - from), ..a };
    (0..a.rows).step_by(GROUP).flat_map(|from| few_rows(group(from), b)).collect()
}

/// Every element is a sum in the same order however many rows and threads there are: sequences that are decoded together
/// get what each would get alone.
fn few_rows(a: Matrix, b: Matrix) -> Vec<f32> {
    let (m, n) = (a.rows, b.cols);
    let dots = |outputs: Range<usize>, y: &mut [f32]| {
        Arch::new().dispatch(Dots { a, b, outputs, y });
    };
    // Column by column: the outputs of a thread lie together.
    let mut columns = vec![0.; n * m];
    if b.data.len() < LEAST_PARALLEL || rayon::current_num_threads() == 1 {
        dots(0..n, &mut columns);
    } else {
        columns.par_chunks_mut(BLOCK * m).enumerate().for_each(|(block, y)| {
            dots(block * BLOCK..n.min((block + 1) * BLOCK), y);
        });
    }
    if m <= 1 {
        return columns;
    }
    let mut rows = vec![0.; n * m];
    for (i, row) in rows.chunks_exact_mut(n.max(1)).enumerate() {
        row.iter_mut().zip(columns[i..].iter().step_by(m)).for_each(|(y, x)| *y = *x);
    }
    rows
}

struct Dots<'a, 'y> {
    a: Matrix<'a>,
    b: Matrix<'a>,
    outputs: Range<usize>,
    y: &'y mut [f32],
}

impl WithSimd for Dots<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a, b, outputs, y } = self;
        let (k, stride) = (a.cols, b.strides[1]);
        // One row of weights after the other, so that they stream in from memory in their order.
        for (output, y) in outputs.zip(y.chunks_exact_mut(a.rows.max(1))) {
            let weights = &b.data[output * stride..][..k];
            for (i, y) in y.iter_mut().enumerate() {
                *y = dot(simd, &a.data[i * a.strides[0]..][..k], weights);
            }
        }
    }
}

/// In four running sums: one alone would wait for every addition.
#[inline(always)]
fn dot<S: Simd>(simd: S, x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_tail), (y, y_tail)) = (S::as_simd_f32s(x), S::as_simd_f32s(y));
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<4>(), y.as_chunks::<4>());
    let mut sums = [simd.splat_f32s(0.); 4];
    for (x, y) in x.iter().zip(y) {
        for i in 0..4 {
            sums[i] = simd.mul_add_e_f32s(x[i], y[i], sums[i]);
        }
    }
    for ((x, y), sum) in x_rest.iter().zip(y_rest).zip(&mut sums) {
        *sum = simd.mul_add_e_f32s(*x, *y, *sum);
    }
    let [a, b, c, d] = sums;
    let tail: f32 = x_tail.iter().zip(y_tail).map(|(x, y)| x * y).sum();
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d))) + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    fn random(len: usize, rng: &mut StdRng) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1f32..1.)).collect()
    }

    fn at(x: &Matrix, row: usize, col: usize) -> f64 {
        x.data[row * x.strides[0] + col * x.strides[1]].into()
    }

    fn assert_is_product(c: &[f32], a: Matrix, b: Matrix) {
        assert_eq!(c.len(), a.rows * b.cols);
        for (i, c) in c.iter().enumerate() {
            let (row, col) = (i / b.cols, i % b.cols);
            let exact: f64 = (0..a.cols).map(|k| at(&a, row, k) * at(&b, k, col)).sum();
            assert!((f64::from(*c) - exact).abs() <= 1e-6 * (a.cols as f64), "{row}, {col}: {c} for {exact}");
        }
    }

    #[test]
    fn is_the_sum_of_products_for_any_sizes_and_strides() {
        let rng = &mut StdRng::seed_from_u64(1);
        for m in [0, 1, 2, 7, 8, 9, 33] {
            for k in [0, 1, 3, 16, 31, 64, 100] {
                for n in [0, 1, 3, 4, 5, 70] {
                    let (a, b) = (random(m * k, rng), random(k * n, rng));
                    for a in [Matrix::new(&a, m, k).unwrap(), Matrix::new(&a, k, m).unwrap().transposed()] {
                        for b in [Matrix::new(&b, k, n).unwrap(), Matrix::new(&b, n, k).unwrap().transposed()]
                        {
                            assert_is_product(&product(a, b), a, b);
                        }
                    }
                }
            }
        }
    }

    /// Large enough for several threads.
    #[test]
    fn rows_together_are_rows_alone_to_the_bit() {
        let rng = &mut StdRng::seed_from_u64(2);
        let (k, n) = (1000, 1101);
        let (x, w) = (random(FEW * k, rng), random(n * k, rng));
        let w = Matrix::new(&w, n, k).unwrap().transposed();
        assert!(n * k > LEAST_PARALLEL);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let of = |rows: Range<usize>| {
                let x = Matrix::new(&x[rows.start * k..rows.end * k], rows.len(), k).unwrap();
                pool.install(|| product(x, w))
            };
            let together = of(0..FEW);
            assert_is_product(&together, Matrix::new(&x, FEW, k).unwrap(), w);
            for (i, row) in together.chunks_exact(n).enumerate() {
                assert!(row == of(i..i + 1), "{threads} threads, row {i}");
            }
            // As many sequences of one token each.
            let many = random(150 * k, rng);
            let all = pool.install(|| product_of(1, Matrix::new(&many, 150, k).unwrap(), w));
            for (i, row) in all.chunks_exact(n).enumerate() {
                let one = Matrix::new(&many[i * k..(i + 1) * k], 1, k).unwrap();
                assert!(row == pool.install(|| product(one, w)), "{threads} threads, row {i} of many");
            }
        }
    }

    /// On both sides of every size at which `gemm` changes its ways.
    #[test]
    fn many_rows_are_fewer_rows_to_the_bit() {
        let rng = &mut StdRng::seed_from_u64(3);
        for k in [3, 64, 700, 1500] {
            for n in [1, 16, 28, 29, 32, 33, 64, 65, 200] {
                let (x, w) = (random(150 * k, rng), random(n * k, rng));
                let w = Matrix::new(&w, n, k).unwrap().transposed();
                let of = |rows: Range<usize>| {
                    product(Matrix::new(&x[rows.start * k..rows.end * k], rows.len(), k).unwrap(), w)
                };
                let all = of(0..150);
                for rows in [0..9, 9..20, 20..53, 53..118, 118..150, 3..140] {
                    assert!(all[rows.start * n..rows.end * n] == of(rows.clone()), "{rows:?}, {k}, {n}");
                }
            }
        }
    }

    #[test]
    fn a_matrix_has_its_elements() {
        for (rows, cols) in [(2, 3), (5, 1), (1 << 40, 1 << 40)] {
            assert!(Matrix::new(&[0.; 4], rows, cols).is_err());
        }
    }
}
