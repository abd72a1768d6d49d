//! The backward pass of the additive operators: three sweeps, as in [`crate::cpu`], whose equations are there.
//!
//! A sweep does not scale what it writes. The sweeps for dk and dv write `scale * q_t do_t^T`: they have the state divided
//! by the scale, and their first state, their outputs and their last state make up for it.

use candle_core::{D, DType, Result, Tensor};

use super::forward::states;
use super::memory::Buffer;
use super::sweep::{After, GateGradients, Pass, Sweep};
use crate::problem::{Decay, Inputs, Problem, Role};

/// The gradients of the results, where there are any.
pub(super) struct Grads {
    pub out: Option<Tensor>,
    pub kv: Option<Tensor>,
}

/// The gradients of the inputs that are wanted, those of q, k and v in `dtype`.
pub(super) fn backward(
    pass: &Pass,
    x: &Inputs<Tensor>,
    grads: &Grads,
    wants: &dyn Fn(Role) -> bool,
    dtype: DType,
) -> Result<Vec<(Role, Tensor)>> {
    let p = pass.problem;
    let gate = x.g.as_ref().filter(|_| wants(Role::G));
    let groups = p.v_heads / p.k_heads;
    let key_dtype = if gate.is_some() || groups > 1 { DType::F32 } else { dtype };
    let buffer = |wanted: bool, dtype, dim| {
        let new = || Buffer::new(&pass.machine, dtype, (p.batch, p.tokens, p.v_heads, dim));
        wanted.then(new).transpose()
    };
    let mut dq = buffer(wants(Role::Q) || gate.is_some(), key_dtype, p.k_dim)?;
    let mut dk = buffer(wants(Role::K) || gate.is_some(), key_dtype, p.k_dim)?;
    let mut dv = buffer(wants(Role::V), dtype, p.v_dim)?;
    let mut dkv = wants(Role::Kv).then(|| states(pass)).transpose()?;

    // What the gate's gradient begins with behind the last token, or in f32 behind the last of each chunk: errors add up
    // from there on, while most of the sums cancel.
    let anchored = gate.is_some() && p.dtype == DType::F32 && pass.states() > 0;
    let with_after = gate.is_some() && grads.kv.is_some() && !anchored;
    let mut before_last = with_after.then(|| states(pass)).transpose()?;
    let ends = || anchored.then(|| pass.ends()).transpose();
    let (mut read_ends, mut write_ends) = (ends()?, ends()?);

    let sweeps = Sweeps { problem: p, x, grads, with_own: gate.is_none() };
    if dq.is_some() {
        pass.run(Sweep { ends: read_ends.as_mut(), ..sweeps.query(dq.as_mut(), before_last.as_mut()) })?;
    }
    if dk.is_some() {
        pass.run(Sweep { ends: write_ends.as_mut(), ..sweeps.key(dk.as_mut()) })?;
    }
    if dv.is_some() || dkv.is_some() {
        pass.run(sweeps.value(dv.as_mut(), dkv.as_mut()))?;
    }

    let mut found = Vec::new();
    if let (Some(gate), Some(of_q), Some(of_k)) = (gate, &mut dq, &mut dk) {
        let after = match (before_last, &grads.kv, read_ends, write_ends) {
            (Some(states), Some(grad), ..) if pass.states() > 0 => {
                After::Sequences(sum_states(p, (states.into_tensor() * grad)?, D::Minus1)?)
            }
            (_, _, Some(read), Some(write)) => {
                After::Chunks(sum_states(p, (read.into_tensor() * write.into_tensor())?, D::Minus2)?)
            }
            _ => After::Nothing,
        };
        let narrow = groups == 1 && dtype != DType::F32;
        let mut out = [buffer(narrow, dtype, p.k_dim)?, buffer(narrow, dtype, p.k_dim)?];
        found.push((Role::G, gate_gradient(pass, x, grads, gate, [of_q, of_k], &mut out, &after)?));
        if let [Some(q), Some(k)] = out {
            (dq, dk) = (Some(q), Some(k));
        }
    }
    for (role, grad) in [(Role::Q, dq), (Role::K, dk)] {
        if let Some(grad) = grad {
            found.push((role, pass.sum_groups(grad.into_tensor(), dtype)?));
        }
    }
    found.extend(dv.map(|dv| (Role::V, dv.into_tensor())));
    found.extend(dkv.map(|dkv| (Role::Kv, dkv.into_tensor())));
    Ok(found)
}

struct Sweeps<'a> {
    problem: &'a Problem,
    x: &'a Inputs<Tensor>,
    grads: &'a Grads,
    /// Whether dq and dk have a token's term with itself.
    with_own: bool,
}

impl<'a> Sweeps<'a> {
    /// For the gate, `last` gets the states without the last token's write.
    fn query(&self, out: Option<&'a mut Buffer>, last: Option<&'a mut Buffer>) -> Sweep<'a> {
        Sweep {
            rows: self.problem.v_dim,
            cols: self.problem.k_dim,
            transposed: true,
            read: self.grads.out.as_ref(),
            write: Some(&self.x.v),
            value: Some(&self.x.k),
            gate: self.x.g.as_ref(),
            out,
            first: self.x.kv.as_ref(),
            last,
            reverse: false,
            inclusive: self.with_own,
            out_scale: self.problem.scale,
            first_scale: 1.,
            last_scale: 1.,
            ends: None,
        }
    }

    fn key(&self, out: Option<&'a mut Buffer>) -> Sweep<'a> {
        Sweep {
            rows: self.problem.v_dim,
            cols: self.problem.k_dim,
            transposed: true,
            read: Some(&self.x.v),
            value: Some(&self.x.q),
            inclusive: self.with_own,
            ..self.towards_the_front(self.grads.out.as_ref(), out, None)
        }
    }

    fn value(&self, out: Option<&'a mut Buffer>, last: Option<&'a mut Buffer>) -> Sweep<'a> {
        Sweep {
            rows: self.problem.k_dim,
            cols: self.problem.v_dim,
            transposed: false,
            read: Some(&self.x.k),
            value: self.grads.out.as_ref(),
            inclusive: true,
            ..self.towards_the_front(Some(&self.x.q), out, last)
        }
    }

    /// What the sweeps from the last token to the first have in common.
    fn towards_the_front(
        &self,
        write: Option<&'a Tensor>,
        out: Option<&'a mut Buffer>,
        last: Option<&'a mut Buffer>,
    ) -> Sweep<'a> {
        let first = self.grads.kv.as_ref();
        let write = write.filter(|_| self.grads.out.is_some());
        let scale = write_scale(self.problem.scale, first.is_some()).filter(|_| write.is_some());
        let s = scale.unwrap_or(1.);
        Sweep {
            rows: 0,
            cols: 0,
            transposed: false,
            read: None,
            write: write.filter(|_| scale.is_some()),
            value: None,
            gate: self.x.g.as_ref(),
            out,
            first,
            last,
            reverse: true,
            inclusive: true,
            out_scale: s,
            // Of a scale that is next to nothing the reciprocal is infinite, and times 0 not a number.
            first_scale: if first.is_some() { s.recip() } else { 1. },
            last_scale: s,
            ends: None,
        }
    }
}

/// The factor that can be moved from the writes of a sweep to its ends; `None` if what is written comes to nothing.
fn write_scale(scale: f32, with_first: bool) -> Option<f32> {
    // The first state is divided by it, which must not pass the end of f32.
    let least = if with_first { 1e-30 } else { 0. };
    (scale.abs() > least).then_some(scale)
}

/// The gradient of the log decay. `dq` and `dk` come without each token's term with itself and leave with it.
fn gate_gradient(
    pass: &Pass,
    x: &Inputs<Tensor>,
    grads: &Grads,
    gate: &Tensor,
    [dq, dk]: [&mut Buffer; 2],
    keys_out: &mut [Option<Buffer>; 2],
    after: &After,
) -> Result<Tensor> {
    let p = pass.problem;
    let channels = if p.decay == Decay::Channel { p.k_dim } else { 1 };
    let new = |dtype| Buffer::new(&pass.machine, dtype, (p.batch, p.tokens, p.v_heads, channels));
    let mut terms = new(DType::F32)?;
    // The gradients of a decay that tokens share are summed up in f32.
    let narrow = p.decay != Decay::Head && gate.dtype() != DType::F32;
    let mut dg = narrow.then(|| new(gate.dtype())).transpose()?;
    pass.run_gate_gradients(GateGradients {
        q: &x.q,
        k: &x.k,
        v: &x.v,
        grad_out: grads.out.as_ref(),
        gate,
        dq,
        dk,
        keys_out: keys_out.each_mut().map(Option::as_mut),
        after,
        terms: &mut terms,
        dg: dg.as_mut(),
    })?;
    let dg = dg.unwrap_or(terms).into_tensor();
    match p.decay {
        Decay::Head if dg.elem_count() == 0 => Tensor::zeros(p.v_heads, gate.dtype(), dg.device()),
        Decay::Head => dg.sum((0, 1, 3))?.to_dtype(gate.dtype()),
        Decay::Scalar => dg.squeeze(3),
        _ => Ok(dg),
    }
}

/// Products of states with their gradients, added up over V, the dimension `values`, or for a gate without channels over all.
fn sum_states(p: &Problem, products: Tensor, values: D) -> Result<Tensor> {
    let over_values = products.sum(values)?;
    if p.decay == Decay::Channel { Ok(over_values) } else { over_values.sum(D::Minus1) }
}

#[cfg(test)]
mod tests {
    use super::write_scale;

    #[test]
    fn a_scale_that_cannot_be_divided_by_drops_the_writes() {
        assert_eq!(write_scale(-1., true), Some(-1.));
        assert_eq!(write_scale(0., true), None);
        assert_eq!(write_scale(0., false), None);
        assert_eq!(write_scale(-1e-31, true), None);
        assert_eq!(write_scale(-1e-31, false), Some(-1e-31));
        assert!(write_scale(1e-29, true).unwrap().recip().is_finite());
    }
}
