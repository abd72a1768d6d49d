//! AdamW with moments that can be saved, and the learning rate over a run.

use crate::workers::each;
use candle_core::{D, DType, Result, Tensor, Var, backprop::GradStore, bail};
use std::{collections::BTreeMap, f64::consts::PI};

/// Linear warm-up to `peak`, then a cosine down to `last` at the end of the run.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    pub peak: f64,
    pub last: f64,
    pub warmup: usize,
    pub steps: usize,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let rest = self.steps.saturating_sub(self.warmup + 1).max(1);
        let progress = ((step - self.warmup) as f64 / rest as f64).min(1.0);
        self.last + 0.5 * (self.peak - self.last) * (1.0 + (PI * progress).cos())
    }
}

/// What does not change during a run.
#[derive(Debug, Clone, Copy)]
pub struct Hyperparameters {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub clip: f64,
}

struct Slot {
    name: String,
    var: Var,
    /// First and second moment of the gradient.
    m: Tensor,
    v: Tensor,
    decays: bool,
}

/// AdamW (Loshchilov and Hutter, 2019): bias correction, decoupled weight decay, and a limit on the global gradient norm.
///
/// candle-nn has an AdamW, but keeps its moments to itself, so that a run could not be resumed.
pub struct AdamW {
    slots: Vec<Slot>,
    hyper: Hyperparameters,
}

impl AdamW {
    pub fn new(vars: BTreeMap<String, Var>, hyper: Hyperparameters) -> Result<Self> {
        let slots = vars
            .into_iter()
            .map(|(name, var)| {
                Ok(Slot {
                    m: var.as_tensor().zeros_like()?.detach(),
                    v: var.as_tensor().zeros_like()?.detach(),
                    // Norms and biases have one axis. An embedding row is touched only when its token occurs, and would
                    // decay meanwhile.
                    decays: var.rank() >= 2 && !name.contains("embed"),
                    name,
                    var,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { slots, hyper })
    }

    /// The gradients of all parameters, in their order. A parameter that the loss does not reach is an error: it would
    /// never be trained, and nobody would notice.
    pub fn collect(&self, grads: &mut GradStore) -> Result<Vec<Tensor>> {
        let of = |slot: &Slot| match grads.remove(slot.var.as_tensor()) {
            // A gradient may hold on to the graph it came from.
            Some(grad) => Ok(grad.detach()),
            None => bail!("parameter {}: the loss has no gradient for it", slot.name),
        };
        self.slots.iter().map(of).collect()
    }

    /// The norm of all gradients together, a scalar on their device: reading one number for each parameter would stall a
    /// GPU at each. Rows come first: a GPU has one block of threads for each sum.
    pub fn norm(grads: &[Tensor]) -> Result<Tensor> {
        let Some(first) = grads.first() else { bail!("there is no parameter to train") };
        let squares = each(first.device(), grads.iter().collect(), |grad: &Tensor| {
            grad.sqr()?.sum(D::Minus1)?.sum_all()
        })?;
        Tensor::stack(&squares, 0)?.sum_all()?.sqrt()
    }

    /// Step number `step`, counted from 0, along `grads` of norm `norm`.
    pub fn step(&mut self, step: usize, lr: f64, grads: &[Tensor], norm: f64) -> Result<()> {
        let Hyperparameters { beta1, beta2, eps, weight_decay, clip } = self.hyper;
        let scale = (clip / norm).min(1.0);
        let t = (step + 1) as f64;
        let (correct1, correct2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));
        let Some(first) = grads.first() else { return Ok(()) };
        let pairs = self.slots.iter_mut().zip(grads).collect();
        each(first.device(), pairs, |(slot, grad): (&mut Slot, &Tensor)| {
            // Scalars are multiplied with each other first: each operation is a pass over memory.
            slot.m = ((&slot.m * beta1)? + (grad * (scale * (1.0 - beta1)))?)?;
            slot.v = ((&slot.v * beta2)? + (grad.sqr()? * (scale * scale * (1.0 - beta2)))?)?;
            let deviation = slot.v.sqrt()?.affine(1.0 / correct2.sqrt(), eps)?;
            let change = ((&slot.m / deviation)? * (lr / correct1))?;
            let param = slot.var.as_detached_tensor();
            let kept = if slot.decays { (param * (1.0 - lr * weight_decay))? } else { param };
            slot.var.set(&(kept - change)?)
        })?;
        Ok(())
    }

    /// Parameters and moments, all that a resumed run needs besides its step.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::with_capacity(3 * self.slots.len());
        for slot in &self.slots {
            state.push((format!("param.{}", slot.name), slot.var.as_detached_tensor()));
            state.push((format!("m.{}", slot.name), slot.m.clone()));
            state.push((format!("v.{}", slot.name), slot.v.clone()));
        }
        state
    }

    /// The inverse of [`state`](Self::state).
    pub fn restore(&mut self, mut take: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
        for slot in &mut self.slots {
            let mut moment = |kind: &str| {
                let name = format!("{kind}.{}", slot.name);
                let tensor = take(&name)?;
                if tensor.shape() != slot.var.shape() || tensor.dtype() != DType::F32 {
                    bail!(
                        "{name}: {:?} {:?}, must be {:?} F32",
                        tensor.shape(),
                        tensor.dtype(),
                        slot.var.shape()
                    );
                }
                tensor.to_device(slot.var.device())
            };
            slot.var.set(&moment("param")?)?;
            (slot.m, slot.v) = (moment("m")?, moment("v")?);
        }
        Ok(())
    }
}
