//! What blocks leave of a sum over tokens, added up.

use candle_core::{DType, Result, Tensor, bail};

use super::ffi;
use crate::cuda::ffi::Dtype;
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held};

/// Some columns of a contiguous matrix in f32.
pub(super) struct Columns<'a> {
    pub of: &'a Tensor,
    pub from: usize,
    pub columns: usize,
}

impl Columns<'_> {
    /// Their sums, as a vector or, column by column, as a matrix.
    pub fn sums(&self, name: &str, machine: &Machine, dtype: DType, shape: &[usize]) -> Result<Buffer> {
        let mut out = Buffer::new(machine, dtype, shape)?;
        let (rows, all) = self.of.dims2()?;
        let (inner, outer) = match *shape {
            [inner] => (inner, 1),
            [inner, outer] => (inner, outer),
            _ => bail!("{name}: sums of shape {shape:?} are neither a vector nor a matrix"),
        };
        if inner * outer != self.columns || self.from + self.columns > all {
            bail!("{name}: {} sums from {} of {all} do not fill {shape:?}", self.columns, self.from);
        }
        let held = Held::new(self.of);
        {
            let mut at = Addresses::new(machine);
            let data: *const f32 = at.numbers(Some(&held))?;
            let call = ffi::Sums {
                data: data.wrapping_add(self.from),
                rows: rows as i64,
                stride: all as i64,
                columns: self.columns as i64,
                out: at.out_numbers(Some(&mut out))?.cast(),
                dtype: Dtype::try_from(dtype)?,
                inner: inner.max(1) as i64,
                outer_stride: 1,
                inner_stride: outer as i64,
            };
            // SAFETY: the matrix and the result are live and as large as checked above, and are held until the kernel is
            // queued; the stream orders whatever comes after.
            let code = unsafe { ffi::cla_column_sums(&call, machine.stream()) };
            if code != 0 {
                bail!(
                    "{name}: cla_column_sums could not be launched, CUDA error {code} ({rows} rows of {all}, {} sums)",
                    self.columns
                );
            }
        }
        Ok(out)
    }
}
