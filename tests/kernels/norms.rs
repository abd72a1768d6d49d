//! Norms on the kernels, against their definition in f64.

use crate::compare::{close, inner, values};
use crate::convolutions::{DTYPES, Lies};
use crate::kernels::limits;
use crate::on_kernels;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_linear_attn::nn::{LayerNorm, NormGate, RmsNorm, l2_norm};
use candle_nn::{VarBuilder, VarMap};
use rand::{Rng, SeedableRng, rngs::StdRng};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    L2,
    Rms,
    Gated(NormGate),
    Layer,
}

pub const KINDS: [Kind; 5] =
    [Kind::L2, Kind::Rms, Kind::Gated(NormGate::Silu), Kind::Layer, Kind::Gated(NormGate::Sigmoid)];

#[derive(Debug, Clone)]
pub struct Norm {
    pub kind: Kind,
    /// The last is the norm's.
    pub dims: Vec<usize>,
    /// Whether the last two dimensions of the gate, and so of the result, are one.
    pub flat_gate: bool,
    pub dtype: DType,
    pub weight_dtype: DType,
    pub scale: f64,
    pub eps: f64,
    pub lies: Lies,
}

impl Default for Norm {
    fn default() -> Self {
        Self {
            kind: Kind::Rms,
            dims: vec![2, 9, 3, 32],
            flat_gate: false,
            dtype: DType::F32,
            weight_dtype: DType::F32,
            scale: 1.,
            eps: 1e-5,
            lies: Lies::Contiguous,
        }
    }
}

/// What goes in: x, weight, bias, gate and the gradient of the result, on the CPU.
pub struct Numbers {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    of_y: Tensor,
}

const NAMES: [&str; 5] = ["y", "dx", "dweight", "dgate", "dbias"];

impl Norm {
    fn width(&self) -> usize {
        self.dims[self.dims.len() - 1]
    }

    /// The gate's, and the result's.
    fn result_dims(&self) -> Vec<usize> {
        let mut dims = self.dims.clone();
        if self.flat_gate && matches!(self.kind, Kind::Gated(_)) && dims.len() > 1 {
            let width = dims.pop().unwrap_or(1);
            dims.iter_mut().last().into_iter().for_each(|x| *x *= width);
        }
        dims
    }

    pub fn numbers(&self) -> Result<Numbers> {
        let mut rng = StdRng::seed_from_u64(self.dims.iter().fold(7, |seed, x| seed * 31 + *x as u64));
        let mut random = |dims: &[usize], scale: f64, dtype: DType| {
            let values: Vec<f64> =
                (0..dims.iter().product()).map(|_| rng.random_range(-2.0..2.) * scale).collect();
            Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)
        };
        Ok(Numbers {
            x: random(&self.dims, self.scale, self.dtype)?,
            weight: random(&[self.width()], 1., self.weight_dtype)?,
            bias: random(&[self.width()], 1., self.weight_dtype)?,
            gate: random(&self.result_dims(), 2., self.dtype)?,
            of_y: random(&self.result_dims(), 1., self.dtype)?,
        })
    }

    pub fn run(&self, n: &Numbers, device: &Device) -> Result<Vec<Option<Tensor>>> {
        let on = |x: &Tensor| x.to_device(device);
        let result_width = self.result_dims().last().copied().unwrap_or(1);
        let x = Var::from_tensor(&self.lies.base(&on(&n.x)?)?)?;
        let gate = Var::from_tensor(&self.lies.base(&on(&n.gate)?)?)?;
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, self.weight_dtype, device);
        let norm = RmsNorm::new(self.width(), self.eps, true, vb.clone())?;
        let layer_norm = LayerNorm::new(self.width(), self.eps, true, vb)?;
        let parameter = |name: &str, value: &Tensor| {
            let parameter = varmap.data().lock().unwrap()[name].clone();
            parameter.set(&on(value)?)?;
            Ok::<_, candle_core::Error>(parameter)
        };
        let (weight, bias) = (parameter("weight", &n.weight)?, parameter("bias", &n.bias)?);
        let xs = self.lies.view(&x, self.width())?;
        let y = match self.kind {
            Kind::L2 => l2_norm(&xs, self.eps)?,
            Kind::Rms => norm.forward(&xs)?,
            Kind::Layer => layer_norm.forward(&xs)?,
            Kind::Gated(kind) => norm.forward_gated(&xs, &self.lies.view(&gate, result_width)?, kind)?,
        };
        let of_y = self.lies.view(&self.lies.base(&on(&n.of_y)?)?, result_width)?;
        let grads = inner(&y, &of_y)?.backward()?;
        let grad = |var: &Var| grads.get(var).map(|x| x.to_device(&Device::Cpu)).transpose();
        let viewed = |var: &Var, width: usize| grad(var)?.map(|x| self.lies.view(&x, width)).transpose();
        let y = y.to_device(&Device::Cpu)?;
        let (dx, dgate) = (viewed(&x, self.width())?, viewed(&gate, result_width)?);
        Ok(vec![Some(y), dx, grad(&weight)?, dgate, grad(&bias)?])
    }

    /// By the definition.
    fn expected(&self, n: &Numbers) -> Result<[Vec<f64>; 5]> {
        let [x, weight, bias, gate, of_y] = [&n.x, &n.weight, &n.bias, &n.gate, &n.of_y].map(values);
        let (mut x, weight, bias, gate, of_y) = (x?, weight?, bias?, gate?, of_y?);
        let (width, centred) = (self.width(), self.kind == Kind::Layer);
        for row in x.chunks_mut(width).filter(|_| centred) {
            let mean = row.iter().sum::<f64>() / width as f64;
            row.iter_mut().for_each(|x| *x -= mean);
        }
        let factor = if self.kind == Kind::L2 { 1. } else { 1. / width as f64 };
        let weight = |i: usize| if self.kind == Kind::L2 { 1. } else { weight[i] };
        // The gate's function and its derivative.
        let gated = |g: f64| {
            let s = 1. / (1. + (-g).exp());
            match self.kind {
                Kind::Gated(NormGate::Silu) => (g * s, s * (1. + g * (1. - s))),
                Kind::Gated(NormGate::Sigmoid) => (s, s * (1. - s)),
                _ => (1., 0.),
            }
        };
        let zeros = || vec![0f64; x.len()];
        let (mut y, mut dx, mut dgate, mut dweight) = (zeros(), zeros(), zeros(), vec![0.; width]);
        let mut dbias = vec![0.; width];
        for row in (0..x.len()).step_by(width) {
            let squares: f64 = x[row..row + width].iter().map(|x| x * x).sum();
            let inverse = 1. / (squares * factor + self.eps).sqrt();
            let (mut along, mut level) = (0., 0.);
            for i in 0..width {
                let (at, (value, slope)) = (row + i, gated(gate[row + i]));
                let normed = x[at] * inverse;
                y[at] = normed * weight(i) * value + if centred { bias[i] } else { 0. };
                dbias[i] += of_y[at];
                dgate[at] = of_y[at] * normed * weight(i) * slope;
                dweight[i] += of_y[at] * value * normed;
                along += of_y[at] * value * weight(i) * normed;
                level += if centred { of_y[at] * weight(i) / width as f64 } else { 0. };
            }
            for i in 0..width {
                let at = row + i;
                let grad = of_y[at] * gated(gate[at]).0 * weight(i);
                dx[at] = inverse * (grad - level - x[at] * inverse * along * factor);
            }
        }
        Ok([y, dx, dweight, dgate, dbias])
    }

    pub fn check(&self) {
        let numbers = self.numbers().unwrap();
        on_kernels(|device| self.run(&numbers, device))
            .and_then(|results| self.compare(&numbers, &results))
            .unwrap_or_else(|e| panic!("{self:?}: {e}"));
    }

    /// Fails unless the results are those of the definition.
    pub fn compare(&self, numbers: &Numbers, results: &[Option<Tensor>]) -> Result<()> {
        let limits = limits(self.dtype);
        let of_weight = crate::kernels::limits(self.weight_dtype).grad.max(limits.f32_grad.min(1e-4));
        for (i, (result, want)) in results.iter().zip(self.expected(numbers)?).enumerate() {
            let (gated, centred) = (matches!(self.kind, Kind::Gated(_)), self.kind == Kind::Layer);
            let there = [true, true, self.kind != Kind::L2, gated, centred][i];
            let dtype = if [2, 4].contains(&i) { self.weight_dtype } else { self.dtype };
            let limit = [limits.out, limits.grad, of_weight, limits.grad, of_weight][i];
            match result {
                Some(x) if there => close(x, &want, dtype, limit, NAMES[i])?,
                None if !there => {}
                Some(_) => candle_core::bail!("{} is a gradient of nothing", NAMES[i]),
                None => candle_core::bail!("there is no {}", NAMES[i]),
            }
        }
        Ok(())
    }
}

/// Of one number, of fewer and of more than a vector, of a part of a warp, of several warps, of a block and of more.
#[test]
fn widths_in_every_dtype() {
    for (i, width) in [1, 2, 3, 8, 20, 64, 96, 128, 200, 256].into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let kind = KINDS[(i + j) % KINDS.len()];
            // With a small one the gradient of few channels is all rounding: most of it cancels.
            let eps = if width < 8 { 1. } else { 1e-5 };
            Norm { kind, dims: vec![3, 50, width], dtype, eps, ..Default::default() }.check();
        }
    }
}

#[test]
fn wide_rows() {
    for (i, width) in [257, 512, 1000, 1024, 1100, 2048, 4096, 5000, 8192, 8200].into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let kind = KINDS[(i + j) % KINDS.len()];
            Norm { kind, dims: vec![7, width], dtype, ..Default::default() }.check();
        }
    }
    // More rows than a GPU has room for blocks of their own.
    for (kind, dtype) in KINDS.into_iter().zip(DTYPES.into_iter().cycle()) {
        Norm { kind, dims: vec![300, 1000], dtype, ..Default::default() }.check();
    }
}

#[test]
fn shapes() {
    for kind in KINDS {
        for dims in [vec![64], vec![1, 64], vec![2, 3, 5, 16], vec![2, 2, 2, 2, 24], vec![700, 4]] {
            for flat_gate in [false, true] {
                Norm { kind, flat_gate, dims: dims.clone(), ..Default::default() }.check();
            }
        }
    }
}

#[test]
fn layouts() {
    for kind in KINDS {
        for lies in [Lies::Window(5), Lies::Window(8), Lies::Swapped] {
            for (i, flat_gate) in [false, true].into_iter().enumerate() {
                let dtype = DTYPES[i];
                Norm { kind, lies, flat_gate, dtype, ..Default::default() }.check();
            }
        }
    }
}

#[test]
fn scales_and_dtypes_of_the_weight() {
    for kind in KINDS {
        for scale in [1e-3, 30., 1e3] {
            for dtype in DTYPES {
                Norm { kind, scale, dtype, ..Default::default() }.check();
            }
        }
        for weight_dtype in [DType::BF16, DType::F16] {
            for dtype in [weight_dtype, DType::F32] {
                Norm { kind, weight_dtype, dtype, ..Default::default() }.check();
            }
        }
    }
}

#[test]
fn no_rows() {
    for kind in KINDS {
        let empty = on_kernels(|device| {
            let x = Tensor::zeros((2, 0, 8), DType::F32, device)?;
            let vb = VarBuilder::zeros(DType::F32, device);
            let norm = RmsNorm::new(8, 1e-5, true, vb.clone())?;
            match kind {
                Kind::Layer => LayerNorm::new(8, 1e-5, true, vb)?.forward(&x),
                Kind::L2 => l2_norm(&x, 1e-5),
                Kind::Rms => norm.forward(&x),
                Kind::Gated(gate) => norm.forward_gated(&x, &x, gate),
            }
        });
        assert_eq!(empty.unwrap().dims(), [2, 0, 8], "{kind:?}");
    }
}

/// A weight that is not trained, and an input that is not: what nobody asked for is not there.
#[test]
fn each_input_alone() {
    for only in 0..3 {
        let found = on_kernels(|device| {
            let ones = |dims: &[usize]| Tensor::randn(0f32, 1., dims, device);
            let vars = [ones(&[4, 16])?, ones(&[16])?, ones(&[4, 16])?].map(|x| Var::from_tensor(&x));
            let [x, weight, gate] = vars;
            let (x, weight, gate) = (x?, weight?, gate?);
            let given = |i: usize, var: &Var| if i == only { var.as_tensor().clone() } else { var.detach() };
            let named = [("weight".to_string(), given(1, &weight))].into();
            let norm = RmsNorm::new(16, 1e-5, true, VarBuilder::from_tensors(named, DType::F32, device))?;
            let y = norm.forward_gated(&given(0, &x), &given(2, &gate), NormGate::Silu)?;
            let grads = y.sum_all()?.backward()?;
            Ok::<_, candle_core::Error>([&x, &weight, &gate].map(|var| grads.get(var).is_some()))
        });
        let found = found.unwrap();
        assert!((0..3).all(|i| !found[i] || i == only), "{only}: {found:?}");
        assert!(found[only] || only == 1, "{only}: {found:?}");
    }
}
