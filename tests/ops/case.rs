//! A problem in a few numbers, and the tensors it stands for.

use crate::compare::{Expected, values};
use crate::reference::{Decay, Outputs, Problem, Sizes, Update};
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

pub const SCALES: [Option<f64>; 6] = [None, Some(-1.0), Some(-0.37), Some(0.0), Some(1.0), Some(3.0)];
/// Lengths on both sides of the boundaries of chunks of 16, 32 and 64.
pub const LENGTHS: [usize; 14] = [0, 1, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 200];
/// Head sizes: powers of two, odd ones, one, the largest.
pub const HEAD_SIZES: [usize; 9] = [1, 3, 7, 16, 32, 33, 100, 129, 256];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    LinearAttn,
    Retention,
    SimpleGla,
    Gla,
    DeltaRule,
    GatedDeltaRule,
    Kda,
    Rwkv7,
}

impl Op {
    pub const ALL: [Op; 8] = [
        Op::LinearAttn,
        Op::Retention,
        Op::SimpleGla,
        Op::Gla,
        Op::DeltaRule,
        Op::GatedDeltaRule,
        Op::Kda,
        Op::Rwkv7,
    ];
    pub const GATED: [Op; 6] =
        [Op::Retention, Op::SimpleGla, Op::Gla, Op::GatedDeltaRule, Op::Kda, Op::Rwkv7];
    /// What a token writes does not depend on the state.
    pub const ADDITIVE: [Op; 4] = [Op::LinearAttn, Op::Retention, Op::SimpleGla, Op::Gla];

    pub fn is_additive(self) -> bool {
        Self::ADDITIVE.contains(&self)
    }
}

/// What the log decays look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gates {
    /// Up to about -0.5 a token.
    Mild,
    /// -80, -20 and mild ones, mixed: sums over a chunk reach thousands.
    Strong,
    /// -80 everywhere.
    AllStrong,
    /// Mild with -inf here and there.
    Forgets,
    /// Mild with the most negative finite number here and there: two of them add up to -inf.
    Huge,
    Zero,
    /// Small and positive: the state grows.
    Positive,
}

/// The tensors an operator can take, in the order of [`Inputs::args`].
pub const ARGS: [&str; 9] = ["q", "k", "v", "gate", "initial kv", "initial z", "beta", "a", "b"];
pub const GATE: usize = 3;
pub const BETA: usize = 6;

pub type Args = [Option<Tensor>; ARGS.len()];
pub type Vars = [Option<Var>; ARGS.len()];

#[derive(Debug, Clone)]
pub struct Case {
    pub op: Op,
    pub b: usize,
    pub t: usize,
    pub h: usize,
    /// Value heads for each key head.
    pub group: usize,
    pub k: usize,
    pub v: usize,
    pub scale: Option<f64>,
    pub gates: Gates,
    pub normalize: bool,
    pub initial_state: bool,
    pub cu_seqlens: Option<Vec<u32>>,
    pub dtype: DType,
    pub gate_dtype: DType,
    pub seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            op: Op::LinearAttn,
            b: 1,
            t: 65,
            h: 2,
            group: 1,
            k: 16,
            v: 16,
            scale: None,
            gates: Gates::Mild,
            normalize: false,
            initial_state: true,
            cu_seqlens: None,
            dtype: DType::F32,
            gate_dtype: DType::F32,
            seed: 0,
        }
    }
}

/// The tensors of one problem: arguments, and the cotangents of o, kv and z.
#[derive(Debug, Clone)]
pub struct Inputs {
    pub args: Args,
    pub cotangents: [Option<Tensor>; 3],
}

/// Candle cannot put an empty tensor on a GPU; a part of one that is not empty can be there.
fn to_device(x: &Tensor, device: &Device) -> Result<Tensor> {
    if x.elem_count() > 0 {
        return x.to_device(device);
    }
    let shape: Vec<usize> = x.dims().iter().map(|&n| n.max(1)).collect();
    let mut there = Tensor::ones(shape, x.dtype(), device)?;
    for (axis, &n) in x.dims().iter().enumerate() {
        there = there.narrow(axis, 0, n)?;
    }
    Ok(there)
}

impl Inputs {
    /// The same numbers on another device.
    pub fn on(&self, device: &Device) -> Result<Self> {
        let mut there = self.clone();
        for x in there.args.iter_mut().chain(&mut there.cotangents).flatten() {
            *x = to_device(x, device)?;
        }
        Ok(there)
    }
}

/// Normally distributed numbers.
pub fn normal(rng: &mut StdRng, n: usize) -> Vec<f32> {
    let one = |rng: &mut StdRng| {
        let (u, w): (f64, f64) = (rng.random(), rng.random());
        ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * w).cos()) as f32
    };
    (0..n).map(|_| one(rng)).collect()
}

/// Gives each row of `width` numbers a norm.
fn set_norms(x: &mut [f32], width: usize, mut norm: impl FnMut() -> f32) {
    for row in x.chunks_exact_mut(width.max(1)) {
        let by = norm() / row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-6);
        row.iter_mut().for_each(|x| *x *= by);
    }
}

fn gate_value(rng: &mut StdRng, kind: Gates) -> f32 {
    let mild = -0.5 * rng.random::<f32>().powi(2);
    let pick: f32 = rng.random();
    match kind {
        Gates::Mild => mild,
        Gates::Strong if pick < 0.2 => -80.0,
        Gates::Strong if pick < 0.4 => -20.0 * pick,
        Gates::Strong => mild,
        Gates::AllStrong => -80.0,
        Gates::Forgets if pick < 0.06 => f32::NEG_INFINITY,
        Gates::Huge if pick < 0.06 => f32::MIN,
        Gates::Forgets | Gates::Huge => mild,
        Gates::Zero => 0.0,
        Gates::Positive => 0.01 * pick,
    }
}

impl Case {
    /// Normalised, a first token's o does not depend on q and k, and with K = 1 no token's on q: their gradients are zero
    /// but for rounding. Such a case gets an initial state and more channels.
    pub fn with_gradients_above_rounding(mut self) -> Self {
        self.initial_state |= self.normalize && self.t < 4;
        self.k += 2 * usize::from(self.normalize && self.k == 1);
        self
    }

    pub fn hv(&self) -> usize {
        self.h * self.group
    }

    pub fn n_states(&self) -> usize {
        match &self.cu_seqlens {
            Some(ends) => ends.len() - 1,
            None => self.b,
        }
    }

    /// Products of a key with a value, the measure of what a run costs.
    pub fn work(&self) -> usize {
        self.b * self.t * self.hv() * self.k * self.v
    }

    fn gate_shape(&self) -> Option<Vec<usize>> {
        match self.op {
            Op::LinearAttn | Op::DeltaRule => None,
            Op::Retention => Some(vec![self.hv()]),
            Op::SimpleGla | Op::GatedDeltaRule => Some(vec![self.b, self.t, self.hv()]),
            Op::Gla | Op::Kda => Some(vec![self.b, self.t, self.hv(), self.k]),
            Op::Rwkv7 => Some(vec![self.b, self.t, self.h, self.k]),
        }
    }

    pub fn inputs(&self) -> Result<Inputs> {
        let rng = &mut StdRng::seed_from_u64(self.seed);
        let (b, t, h, hv, k, v) = (self.b, self.t, self.h, self.hv(), self.k, self.v);
        let n = self.n_states();
        let tensor = |data: Vec<f32>, shape: &[usize], dtype| {
            Tensor::from_vec(data, shape, &Device::Cpu)?.to_dtype(dtype)
        };
        // A sum of keys that passes through zero would make the normalised problem ill-conditioned by itself.
        let positive = |mut data: Vec<f32>| {
            if self.normalize {
                data.iter_mut().for_each(|x| *x = x.abs() + 0.1);
            }
            data
        };
        let q = tensor(positive(normal(rng, b * t * h * k)), &[b, t, h, k], self.dtype)?;
        let mut keys = positive(normal(rng, b * t * h * k));
        if !self.op.is_additive() {
            // Longer ones times a beta of 2 would make the state grow without bound.
            let rows = &mut StdRng::seed_from_u64(!self.seed);
            set_norms(&mut keys, k, || rows.random_range(0.4..1.0));
        }
        let keys = tensor(keys, &[b, t, h, k], self.dtype)?;
        let value = tensor(normal(rng, b * t * hv * v), &[b, t, hv, v], self.dtype)?;
        let gate = match self.gate_shape() {
            Some(shape) => {
                let data = (0..shape.iter().product()).map(|_| gate_value(rng, self.gates)).collect();
                Some(tensor(data, &shape, self.gate_dtype)?)
            }
            None => None,
        };
        let kv_of = |data: Vec<f32>| tensor(data, &[n, hv, k, v], DType::F32);
        let z_of = |data: Vec<f32>| tensor(data, &[n, hv, k], DType::F32);
        let (mut initial_kv, mut initial_z, mut d_z) = (None, None, None);
        if self.initial_state {
            initial_kv = Some(kv_of(normal(rng, n * hv * k * v))?);
        }
        if self.initial_state && self.normalize {
            initial_z = Some(z_of(positive(normal(rng, n * hv * k)))?);
        }
        if self.normalize {
            d_z = Some(z_of(normal(rng, n * hv * k))?);
        }
        let d_out = tensor(normal(rng, b * t * hv * v), &[b, t, hv, v], self.dtype)?;
        let d_kv = kv_of(normal(rng, n * hv * k * v))?;
        let (mut beta, mut low, mut rank) = (None, None, None);
        match self.op {
            Op::DeltaRule | Op::GatedDeltaRule | Op::Kda => {
                let data = (0..b * t * hv).map(|_| 2.0 * rng.random::<f32>()).collect();
                beta = Some(tensor(data, &[b, t, hv], self.gate_dtype)?);
            }
            Op::Rwkv7 => {
                let [mut a, mut other] = [(); 2].map(|()| normal(rng, b * t * h * k));
                set_norms(&mut a, k, || 1.0);
                set_norms(&mut other, k, || 0.1);
                let of_a = a.iter().map(|a| -a * rng.random::<f32>());
                let data = of_a.zip(other).map(|(x, y)| x + y).collect();
                low = Some(tensor(a.clone(), &[b, t, h, k], self.rank_dtype())?);
                rank = Some(tensor(data, &[b, t, h, k], self.rank_dtype())?);
            }
            _ => {}
        }
        Ok(Inputs {
            args: [Some(q), Some(keys), Some(value), gate, initial_kv, initial_z, beta, low, rank],
            cotangents: [Some(d_out), Some(d_kv), d_z],
        })
    }

    /// Of a and b: kernels need not be the same where all keys have one dtype and where not.
    pub fn rank_dtype(&self) -> DType {
        if self.seed.is_multiple_of(2) { self.dtype } else { self.gate_dtype }
    }

    pub fn scale(&self) -> f64 {
        self.scale.unwrap_or(1.0 / (self.k as f64).sqrt())
    }

    /// The same problem for the reference, with exactly the numbers the operator sees.
    pub fn problem(&self, inputs: &Inputs) -> Result<Problem> {
        let flat = |i: usize| inputs.args[i].as_ref().map(values).transpose();
        let required = |i: usize| Ok::<_, candle_core::Error>(flat(i)?.unwrap_or_default());
        Ok(Problem {
            sizes: Sizes { b: self.b, t: self.t, h: self.h, hv: self.hv(), k: self.k, v: self.v },
            cu_seqlens: self.cu_seqlens.as_ref().map(|ends| ends.iter().map(|&e| e as usize).collect()),
            scale: self.scale(),
            normalize: self.normalize,
            q: required(0)?,
            k: required(1)?,
            v: required(2)?,
            decay: match self.op {
                Op::LinearAttn | Op::DeltaRule => Decay::None,
                Op::Retention => Decay::PerHead(required(GATE)?),
                Op::SimpleGla | Op::GatedDeltaRule => Decay::PerToken(required(GATE)?),
                Op::Gla | Op::Kda | Op::Rwkv7 => Decay::PerChannel(required(GATE)?),
            },
            update: match self.op {
                Op::DeltaRule | Op::GatedDeltaRule | Op::Kda => Update::Delta { beta: required(BETA)? },
                Op::Rwkv7 => Update::LowRank { a: required(BETA + 1)?, b: required(BETA + 2)? },
                _ => Update::Additive,
            },
            kv: flat(4)?,
            z: flat(5)?,
        })
    }

    /// What the outcome should be.
    pub fn expected(&self, inputs: &Inputs, loss: [bool; 3]) -> Result<Expected> {
        let problem = self.problem(inputs)?;
        let outputs = problem.forward();
        let cotangent = |i: usize, like: &[f64]| match &inputs.cotangents[i] {
            Some(d) if loss[i] => values(d),
            _ => Ok(vec![0.0; like.len()]),
        };
        let grads = problem.backward(&Outputs {
            out: cotangent(0, &outputs.out)?,
            kv: cotangent(1, &outputs.kv)?,
            z: cotangent(2, &outputs.z)?,
        });
        Ok(Expected::new(outputs, grads))
    }
}
