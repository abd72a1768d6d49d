//! The forward pass of the additive operators: one sweep.

use candle_core::{DType, Result, Tensor};

use super::memory::Buffer;
use super::sweep::{Pass, Sweep};
use crate::problem::Inputs;

/// The output, in `dtype`, and the final states if they are asked for.
pub(super) fn forward(pass: &Pass, x: &Inputs<Tensor>, dtype: DType) -> Result<(Buffer, Option<Buffer>)> {
    let p = pass.problem;
    let mut out = Buffer::new(&pass.machine, dtype, (p.batch, p.tokens, p.v_heads, p.v_dim))?;
    let mut last = p.final_state.then(|| states(pass)).transpose()?;
    pass.run(Sweep {
        rows: p.k_dim,
        cols: p.v_dim,
        transposed: false,
        read: Some(&x.q),
        write: Some(&x.k),
        value: Some(&x.v),
        gate: x.g.as_ref(),
        out: Some(&mut out),
        first: x.kv.as_ref(),
        last: last.as_mut(),
        reverse: false,
        inclusive: true,
        out_scale: p.scale,
        first_scale: 1.,
        last_scale: 1.,
        ends: None,
    })?;
    Ok((out, last))
}

/// Memory for a state of each sequence and head.
pub(super) fn states(pass: &Pass) -> Result<Buffer> {
    let p = pass.problem;
    Buffer::new(&pass.machine, DType::F32, (p.sequences.len(), p.v_heads, p.k_dim, p.v_dim))
}
