//! What the results are compared with and how closely they must agree.

use crate::reference::{Gradients, Outputs};
use candle_core::{DType, Device, Result, Tensor};

/// `<o, do> + <kv, dkv> + <z, dz>`, as far as they are there and wanted.
pub fn loss(
    outputs: &[Option<Tensor>; 3],
    cotangents: &[Option<Tensor>; 3],
    wanted: [bool; 3],
) -> Result<Option<Tensor>> {
    let mut total: Option<Tensor> = None;
    for i in 0..3 {
        if let (true, Some(x), Some(d)) = (wanted[i], &outputs[i], &cotangents[i]) {
            let term = inner(x, d)?;
            total = Some(match total {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
    }
    Ok(total)
}

/// `<x, d>` in f32; the gradient that reaches `x` is exactly `d`.
pub fn inner(x: &Tensor, d: &Tensor) -> Result<Tensor> {
    (x.to_dtype(DType::F32)? * d.to_dtype(DType::F32)?)?.sum_all()
}

/// Every number of a tensor. From a GPU as it is: Candle cannot convert an empty tensor there.
pub fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// What the reference says: o, kv, z, and the gradients of [`ARGS`] (empty where there is no such input).
#[derive(Debug, Clone)]
pub struct Expected {
    pub outputs: [Vec<f64>; 3],
    pub grads: [Vec<f64>; 9],
    /// The norm of the terms of the gate's gradient: a decay that tokens share adds up many that cancel.
    pub gate_terms: f64,
}

impl Expected {
    pub fn new(o: Outputs, g: Gradients) -> Self {
        Self {
            outputs: [o.out, o.kv, o.z],
            grads: [g.q, g.k, g.v, g.log_decay, g.kv, g.z, g.beta, g.a, g.b],
            gate_terms: g.log_decay_terms,
        }
    }
}

/// The largest relative RMS errors allowed.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub out: f64,
    pub state: f64,
    pub grad: f64,
    /// Gradients that are f32 whatever q is, those of the states and of f32 gates: free of output rounding, though not of
    /// that of an o which was saved in 16 bits.
    pub f32_grad: f64,
}

impl Limits {
    pub fn of(dtype: DType) -> Self {
        let (out, grad, f32_grad) = match dtype {
            DType::BF16 => (2.5e-3, 5e-3, 1e-3),
            DType::F16 => (5e-4, 1e-3, 1e-4),
            _ => (1e-5, 2e-5, 2e-5),
        };
        Self { out, state: 1e-5, grad, f32_grad }
    }
}

/// `||x||`
pub fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// `||x - want|| / ||want||`; where `want` is zero, infinite unless `x` is zero to 1e-6. A NaN makes it infinite.
pub fn relative_error(x: &[f64], want: &[f64]) -> f64 {
    let difference: Vec<f64> = x.iter().zip(want).map(|(x, w)| x - w).collect();
    let error = norm(&difference);
    match norm(want) {
        _ if x.len() != want.len() || error.is_nan() => f64::INFINITY,
        0.0 if x.iter().all(|x| x.abs() <= 1e-6) => 0.0,
        0.0 => f64::INFINITY,
        // Below 1.2e-38 an f32 has ever fewer digits.
        size => error / size.max(1e-36),
    }
}

/// Fails unless `x` has the dtype and, within `limit`, the values wanted.
pub fn close(x: &Tensor, want: &[f64], dtype: DType, limit: f64, label: &str) -> Result<()> {
    close_for_size(x, want, 0.0, dtype, limit, label)
}

/// As [`close`], but relative to `size` if that is larger than `||want||`.
pub fn close_for_size(
    x: &Tensor,
    want: &[f64],
    size: f64,
    dtype: DType,
    limit: f64,
    label: &str,
) -> Result<()> {
    if x.dtype() != dtype {
        candle_core::bail!("{label}: dtype {:?}, should be {dtype:?}", x.dtype());
    }
    let x = values(x)?;
    let own = norm(want);
    let error = match relative_error(&x, want) {
        error if size > own && own > 0.0 => error * own / size,
        error => error,
    };
    // Not `error > limit`: that would let a NaN through.
    if error <= limit {
        return Ok(());
    }
    let worst = (0..x.len().min(want.len()))
        .map(|i| (i, x[i], want[i]))
        .max_by(|a, b| (a.1 - a.2).abs().total_cmp(&(b.1 - b.2).abs()));
    candle_core::bail!(
        "{label}: relative error {error:.3e} > {limit:.1e} ({} numbers, {} wanted; worst (index, is, should be) {worst:?})",
        x.len(),
        want.len()
    )
}
