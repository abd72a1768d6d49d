//! The matrix products of gradients, in f32 on a CPU, with as many threads as each is worth.
//!
//! Candle's own ask the operating system how many cores there are at every call, which on Linux means to read a file:
//! three times as long as a token's products take in a small model.

use candle_core::{Result, bail};
use gemm::{Parallelism, gemm};

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

    /// Elements that lie at these distances from row to row and from column to column.
    pub fn strided(data: &'a [f32], [rows, cols]: [usize; 2], strides: [usize; 2]) -> Result<Self> {
        let last = |size: usize, stride: usize| size.saturating_sub(1).checked_mul(stride);
        let end = match (last(rows, strides[0]), last(cols, strides[1])) {
            (Some(row), Some(col)) => row.checked_add(col),
            _ => None,
        };
        if rows * cols > 0 && end.is_none_or(|end| end >= data.len()) {
            bail!(
                "a matrix of {rows} x {cols} in steps of {strides:?} does not have {} elements",
                data.len()
            );
        }
        Ok(Self { data, rows, cols, strides })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn transposed(self) -> Self {
        let Self { data, rows, cols, strides: [row, col] } = self;
        Self { data, rows: cols, cols: rows, strides: [col, row] }
    }
}

/// `a b`, row-major.
pub(super) fn product(a: Matrix, b: Matrix) -> Vec<f32> {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "matrices that do not fit");
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

    #[test]
    fn a_matrix_has_its_elements() {
        for (rows, cols) in [(2, 3), (5, 1), (1 << 40, 1 << 40)] {
            assert!(Matrix::new(&[0.; 4], rows, cols).is_err());
        }
    }
}
