//! The delta families: forward one *delta sweep* (see `cuda/delta.h`). Backward two of them, one in either direction, after
//! which what every token wrote is known, and its gradient: the rest is done for all segments of all sequences at once.
//!
//! Backward takes memory for two numbers in f32 for each element of v, and for two states each [`ffi::SEGMENT`] tokens.

mod ffi;
mod route;
mod sweep;

use candle_core::{DType, Result, Tensor};

use super::backward::Grads;
use super::forward::states;
use super::memory::Buffer;
use super::sweep::Pass;
use crate::problem::{Decay, Inputs, Role, Update};
use sweep::{Given, Gradients, Segments, Sweep, gradient_parts, run, run_gradients};

/// The output, in the problem's dtype, and the final states if they are asked for.
pub(super) fn forward(pass: &Pass, x: &Inputs<Tensor>) -> Result<(Buffer, Option<Buffer>)> {
    let p = pass.problem;
    let mut out = Buffer::new(&pass.machine, p.dtype, (p.batch, p.tokens, p.v_heads, p.v_dim))?;
    let mut last = p.final_state.then(|| states(pass)).transpose()?;
    run(
        pass,
        x,
        Sweep {
            value: Some(&x.v),
            out: Some(&mut out),
            first: x.kv.as_ref(),
            last: last.as_mut(),
            ..Sweep::default()
        },
    )?;
    Ok((out, last))
}

/// The gradients of the inputs that are wanted.
pub(super) fn backward(
    pass: &Pass,
    x: &Inputs<Tensor>,
    grads: &Grads,
    wants: &dyn Fn(Role) -> bool,
) -> Result<Vec<(Role, Tensor)>> {
    let p = pass.problem;
    let of_keys = [Role::Q, Role::K, Role::G, Role::Beta, Role::A, Role::B].into_iter().any(wants);
    let segments = Segments::new(pass)?;
    let values = |dtype| Buffer::new(&pass.machine, dtype, (p.batch, p.tokens, p.v_heads, p.v_dim));
    let mut dv = wants(Role::V).then(|| values(p.dtype)).transpose()?;
    let mut dkv = wants(Role::Kv).then(|| states(pass)).transpose()?;
    // What the sweep of a direction leaves for the gradients of keys: m, and the states around segments.
    let left = || Ok::<_, candle_core::Error>((values(DType::F32)?, segments.states(pass)?));
    let mut forward = of_keys.then(left).transpose()?;
    if let Some((written, starts)) = &mut forward {
        run(
            pass,
            x,
            Sweep {
                value: Some(&x.v),
                inner: Some(written),
                first: x.kv.as_ref(),
                anchors: Some(starts),
                segments: Some(&segments),
                ..Sweep::default()
            },
        )?;
    }
    let mut reverse = of_keys.then(left).transpose()?;
    let (inner, anchors) = reverse.as_mut().map(|(m, ends)| (m, ends)).unzip();
    run(
        pass,
        x,
        Sweep {
            value: grads.out.as_ref(),
            reverse: true,
            inner,
            out: dv.as_mut(),
            first: grads.kv.as_ref(),
            last: dkv.as_mut(),
            anchors,
            segments: Some(&segments),
        },
    )?;
    let mut found = Vec::new();
    found.extend(dv.map(|dv| (Role::V, dv.into_tensor())));
    found.extend(dkv.map(|dkv| (Role::Kv, dkv.into_tensor())));
    if let (Some(forward), Some(reverse)) = (forward, reverse) {
        found.extend(key_gradients(pass, x, grads.out.as_ref(), wants, &segments, [forward, reverse])?);
    }
    Ok(found)
}

/// The gradients of all inputs that have a number for each channel of a key, of gates and of beta.
fn key_gradients(
    pass: &Pass,
    x: &Inputs<Tensor>,
    grad_out: Option<&Tensor>,
    wants: &dyn Fn(Role) -> bool,
    segments: &Segments,
    left: [(Buffer, Buffer); 2],
) -> Result<Vec<(Role, Tensor)>> {
    let p = pass.problem;
    let groups = p.v_heads / p.k_heads;
    let gate = x.g.as_ref().filter(|_| wants(Role::G));
    let beta = x.beta.as_ref().filter(|_| wants(Role::Beta));
    let [(written, starts), (of_written, ends)] =
        left.map(|(m, states)| (m.into_tensor(), states.into_tensor()));
    let given = Given {
        grad_out,
        written: &written,
        of_written: &of_written,
        segments,
        starts: &starts,
        ends: &ends,
    };
    let (parts, rows) = gradient_parts(pass, x, &given)?;
    // In f32 as long as they are to be added up.
    let one = |dtype| if parts.len() == 1 { dtype } else { DType::F32 };
    let buffer = |dtype, dim| Buffer::new(&pass.machine, one(dtype), (p.batch, p.tokens, p.v_heads, dim));
    // Of a key head that several value heads read, each of these has its part.
    let of_key = |role, x: Option<&Tensor>| {
        let x = x.filter(|_| wants(role))?;
        Some(buffer(if groups > 1 { DType::F32 } else { x.dtype() }, p.k_dim))
    };
    let of_gate = || match gate {
        Some(_) if p.decay != Decay::Channel => Some(buffer(DType::F32, p.k_dim.div_ceil(ffi::COLUMNS))),
        Some(g) if p.update == Update::Delta => Some(buffer(g.dtype(), p.k_dim)),
        gate => of_key(Role::G, gate),
    };
    let mut sums: [Option<Tensor>; 6] = Default::default();
    for columns in parts.clone() {
        let mut part = Gradients {
            dq: of_key(Role::Q, Some(&x.q)).transpose()?,
            dk: of_key(Role::K, Some(&x.k)).transpose()?,
            da: of_key(Role::A, x.a.as_ref()).transpose()?,
            db: of_key(Role::B, x.b.as_ref()).transpose()?,
            dg: of_gate().transpose()?,
            dbeta: beta.map(|beta| buffer(beta.dtype(), 1)).transpose()?,
        };
        run_gradients(pass, x, &given, columns, rows, &mut part)?;
        let Gradients { dq, dk, da, db, dg, dbeta } = part;
        for (sum, part) in sums.iter_mut().zip([dq, dk, da, db, dg, dbeta]) {
            let part = part.map(Buffer::into_tensor);
            *sum = match (sum.take(), part) {
                (Some(sum), Some(part)) => Some((sum + part)?),
                (None, part) => part,
                (sum, None) => sum,
            };
        }
    }
    let [dq, dk, da, db, dg, dbeta] = sums;
    let mut found = Vec::new();
    let of_keys = [
        (Role::Q, dq, Some(&x.q)),
        (Role::K, dk, Some(&x.k)),
        (Role::A, da, x.a.as_ref()),
        (Role::B, db, x.b.as_ref()),
    ];
    for (role, grad, x) in of_keys {
        if let (Some(grad), Some(x)) = (grad, x) {
            found.push((role, pass.sum_groups(grad, x.dtype())?));
        }
    }
    if let (Some(dbeta), Some(beta)) = (dbeta, beta) {
        found.push((Role::Beta, dbeta.squeeze(3)?.to_dtype(beta.dtype())?));
    }
    if let (Some(dg), Some(gate)) = (dg, gate) {
        let dg = match p.decay {
            Decay::Channel if p.update == Update::LowRank => pass.sum_groups(dg, gate.dtype())?,
            Decay::Channel => dg.to_dtype(gate.dtype())?,
            _ => pass.sum_columns(dg, gate.dtype())?,
        };
        found.push((Role::G, dg));
    }
    Ok(found)
}
