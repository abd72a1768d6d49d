//! A problem in a few numbers, and the tensors it stands for.

use crate::compare::{Expected, values};
use crate::reference::{Decay, Outputs, Problem, Sizes};
use candle_core::{DType, Device, Result, Tensor};
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
}

impl Op {
    pub const ALL: [Op; 4] = [Op::LinearAttn, Op::Retention, Op::SimpleGla, Op::Gla];
    pub const GATED: [Op; 3] = [Op::Retention, Op::SimpleGla, Op::Gla];
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
pub const ARGS: [&str; 6] = ["q", "k", "v", "gate", "initial kv", "initial z"];
pub const GATE: usize = 3;

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
    pub args: [Option<Tensor>; 6],
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
            Op::LinearAttn => None,
            Op::Retention => Some(vec![self.hv()]),
            Op::SimpleGla => Some(vec![self.b, self.t, self.hv()]),
            Op::Gla => Some(vec![self.b, self.t, self.hv(), self.k]),
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
        let keys = tensor(positive(normal(rng, b * t * h * k)), &[b, t, h, k], self.dtype)?;
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
        Ok(Inputs {
            args: [Some(q), Some(keys), Some(value), gate, initial_kv, initial_z],
            cotangents: [Some(d_out), Some(d_kv), d_z],
        })
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
                Op::LinearAttn => Decay::None,
                Op::Retention => Decay::PerHead(required(GATE)?),
                Op::SimpleGla => Decay::PerToken(required(GATE)?),
                Op::Gla => Decay::PerChannel(required(GATE)?),
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
