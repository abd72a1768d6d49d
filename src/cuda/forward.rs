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
    pass.run(sweep(pass, x, Some(&mut out), last.as_mut()))?;
    Ok((out, last))
}

/// The final states.
pub(super) fn final_states(pass: &Pass, x: &Inputs<Tensor>) -> Result<Buffer> {
    let mut last = states(pass)?;
    pass.run(sweep(pass, x, None, Some(&mut last)))?;
    Ok(last)
}

/// Memory for a state of each sequence and head.
pub(super) fn states(pass: &Pass) -> Result<Buffer> {
    let p = pass.problem;
    Buffer::new(&pass.machine, DType::F32, (p.sequences.len(), p.v_heads, p.k_dim, p.v_dim))
}

fn sweep<'a>(
    pass: &Pass,
    x: &'a Inputs<Tensor>,
    out: Option<&'a mut Buffer>,
    last: Option<&'a mut Buffer>,
) -> Sweep<'a> {
    Sweep {
        rows: pass.problem.k_dim,
        cols: pass.problem.v_dim,
        transposed: false,
        read: Some(&x.q),
        write: Some(&x.k),
        value: Some(&x.v),
        gate: x.g.as_ref(),
        out,
        first: x.kv.as_ref(),
        last,
        reverse: false,
        inclusive: true,
        out_scale: pass.problem.scale,
        first_scale: 1.,
        last_scale: 1.,
    }
}
