//! Running an operator on a case, and holding the outcome against the reference.

use crate::case::{ARGS, Args, BETA, Case, GATE, Inputs, Op, Vars};
use crate::compare::{Expected, Limits, close, close_for_size, loss};
use candle_core::{DType, Result, Tensor, Var, backprop::GradStore};
use candle_linear_attn::{Mode, Options, Output, State};
use candle_linear_attn::{delta_rule, gated_delta_rule, gla, kda, linear_attn, retention, rwkv7, simple_gla};

pub const MODES: [Mode; 4] = [Mode::Auto, Mode::Recurrent, Mode::Chunk, Mode::FusedChunk];

/// What is differentiated: which outputs the loss contains and which inputs are variables.
#[derive(Debug, Clone, Copy)]
pub struct Graph {
    /// o, final kv, final z.
    pub loss: [bool; 3],
    pub tracked: [bool; 9],
    /// Whether the operator sees the variables themselves or something computed from them.
    pub leaves: bool,
}

impl Graph {
    pub const ALL: Graph = Graph { loss: [true; 3], tracked: [true; 9], leaves: true };
    pub const NONE: Graph = Graph { loss: [false; 3], tracked: [false; 9], leaves: true };

    fn needs_state(&self) -> bool {
        self.loss[1] || self.loss[2]
    }
}

/// What a run gave: the outputs o, kv, z and the gradients of [`ARGS`].
#[derive(Debug, Clone)]
pub struct Outcome {
    pub outputs: [Option<Tensor>; 3],
    pub grads: Args,
}

impl Case {
    /// The options of this case, initial state included.
    pub fn options(&self, mode: Mode, args: &Args) -> Options {
        let mut opts =
            Options::default().with_mode(mode).with_scale(self.scale).with_normalize(self.normalize);
        if let Some(kv) = &args[4] {
            opts = opts.with_initial_state(&State { kv: kv.clone(), z: args[5].clone() });
        }
        if let Some(ends) = &self.cu_seqlens {
            opts = opts.with_cu_seqlens(ends);
        }
        opts
    }

    /// Runs the operator on `args` as they are.
    pub fn call(&self, args: &Args, opts: &Options) -> Result<Output> {
        let given = |i: usize| match &args[i] {
            Some(x) => Ok(x),
            None => candle_core::bail!("{:?} needs {}", self.op, ARGS[i]),
        };
        let (q, k, v) = (given(0)?, given(1)?, given(2)?);
        match self.op {
            Op::LinearAttn => linear_attn(q, k, v, opts),
            Op::Retention => retention(q, k, v, given(GATE)?, opts),
            Op::SimpleGla => simple_gla(q, k, v, given(GATE)?, opts),
            Op::Gla => gla(q, k, v, given(GATE)?, opts),
            Op::DeltaRule => delta_rule(q, k, v, given(BETA)?, opts),
            Op::GatedDeltaRule => gated_delta_rule(q, k, v, given(GATE)?, given(BETA)?, opts),
            Op::Kda => kda(q, k, v, given(GATE)?, given(BETA)?, opts),
            Op::Rwkv7 => rwkv7(q, k, v, given(BETA + 1)?, given(BETA + 2)?, given(GATE)?, opts),
        }
    }

    /// Forward, and backward if `graph` asks for it.
    pub fn run(&self, mode: Mode, inputs: &Inputs, graph: Graph) -> Result<Outcome> {
        let mut vars: Vars = Default::default();
        let mut args = inputs.args.clone();
        for (i, arg) in args.iter_mut().enumerate() {
            if let (true, Some(tensor)) = (graph.tracked[i], &arg) {
                let var = Var::from_tensor(tensor)?;
                let seen = match graph.leaves {
                    true => var.as_tensor().clone(),
                    false => var.affine(1.0, 0.0)?,
                };
                vars[i] = Some(var);
                *arg = Some(seen);
            }
        }
        let (outputs, store) = self.run_on(mode, &args, &inputs.cotangents, graph.loss)?;
        let grads = match store {
            Some(store) => vars.map(|var| var.and_then(|v| store.get(v.as_tensor()).cloned())),
            None => Default::default(),
        };
        Ok(Outcome { outputs, grads })
    }

    /// Runs the operator on `args` and, if the loss is part of a graph, its backward.
    pub fn run_on(
        &self,
        mode: Mode,
        args: &Args,
        cotangents: &[Option<Tensor>; 3],
        wanted: [bool; 3],
    ) -> Result<([Option<Tensor>; 3], Option<GradStore>)> {
        let opts = self.options(mode, args).with_final_state(wanted[1] || wanted[2]);
        let Output { out, state } = self.call(args, &opts)?;
        let (kv, z) = match state {
            Some(State { kv, z }) => (Some(kv), z),
            None => (None, None),
        };
        let outputs = [Some(out), kv, z];
        let store = match loss(&outputs, cotangents, wanted)? {
            Some(loss) if loss.track_op() => Some(loss.backward()?),
            _ => None,
        };
        Ok((outputs, store))
    }

    /// Holds an outcome against the reference: values, gradients, dtypes, and that what was asked for is there.
    pub fn check(&self, got: &Outcome, want: &Expected, graph: Graph, label: &str) -> Result<()> {
        self.check_within(Limits::of(self.dtype), got, want, graph, label)
    }

    /// As [`Case::check`], within `limits`.
    pub fn check_within(
        &self,
        limits: Limits,
        got: &Outcome,
        want: &Expected,
        graph: Graph,
        label: &str,
    ) -> Result<()> {
        for (i, name) in ["o", "final kv", "final z"].into_iter().enumerate() {
            let wanted = match i {
                0 => true,
                1 => graph.needs_state(),
                _ => graph.needs_state() && self.normalize,
            };
            let dtype = if i == 0 { self.dtype } else { DType::F32 };
            match &got.outputs[i] {
                Some(x) if wanted => {
                    let limit = if i == 0 { limits.out } else { limits.state };
                    close(x, &want.outputs[i], dtype, limit, &format!("{label}: {name}"))?;
                }
                None if !wanted => {}
                other => {
                    candle_core::bail!("{label}: {name} should be there: {wanted}, is: {}", other.is_some())
                }
            }
        }
        if !graph.loss.contains(&true) {
            return Ok(());
        }
        for (i, name) in ARGS.into_iter().enumerate() {
            if !graph.tracked[i] || want.grads[i].is_empty() {
                continue;
            }
            let dtype = match i {
                0..GATE => self.dtype,
                GATE | BETA => self.gate_dtype,
                GATE..BETA => DType::F32,
                _ => self.rank_dtype(),
            };
            let limit = if dtype == DType::F32 { limits.f32_grad } else { limits.grad };
            let label = format!("{label}: gradient of {name}");
            match &got.grads[i] {
                Some(x) => {
                    let size = if i == GATE { want.gate_terms } else { 0.0 };
                    close_for_size(x, &want.grads[i], size, dtype, limit, &label)?
                }
                // An input that the loss does not reach may have no gradient at all.
                None if want.grads[i].iter().all(|&g| g == 0.0) => {}
                None => candle_core::bail!("{label} is missing"),
            }
        }
        Ok(())
    }

    /// Runs every mode on this case and checks all of it.
    pub fn check_modes(&self, graph: Graph) -> Result<()> {
        let inputs = self.inputs()?;
        let mut want = self.expected(&inputs, graph.loss)?;
        if !self.initial_state {
            want.grads[4].clear();
        }
        if !(self.initial_state && self.normalize) {
            want.grads[5].clear();
        }
        for mode in MODES {
            let label = format!("{mode:?} of {self:?} with {graph:?}");
            let got = self
                .run(mode, &inputs, graph)
                .map_err(|e| candle_core::Error::msg(format!("{label}: {e}")))?;
            self.check(&got, &want, graph, &label)?;
        }
        Ok(())
    }
}
