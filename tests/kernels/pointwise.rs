//! Gates, decays and other pointwise functions on the kernels, against their definition in f64.

use crate::compare::{close, inner, values};
use crate::convolutions::{DTYPES, Lies};
use crate::kernels::limits;
use crate::on_kernels;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_linear_attn::nn::{Activation, NormGate, gated, log_decay};
use rand::{Rng, SeedableRng, rngs::StdRng};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Two arguments of one shape.
    Gated(NormGate),
    /// With a bias for each column and a rate for as many columns as this says.
    Decay(usize),
    /// One argument.
    Sigmoid,
    LogSigmoid,
}

pub const KINDS: [Kind; 6] = [
    Kind::Gated(NormGate::Silu),
    Kind::Gated(NormGate::Sigmoid),
    Kind::Decay(1),
    Kind::Decay(4),
    Kind::Sigmoid,
    Kind::LogSigmoid,
];

#[derive(Debug, Clone)]
pub struct Pointwise {
    pub kind: Kind,
    pub dims: Vec<usize>,
    pub dtype: DType,
    pub weight_dtype: DType,
    pub scale: f64,
    pub lies: Lies,
}

impl Default for Pointwise {
    fn default() -> Self {
        Self {
            kind: Kind::Decay(1),
            dims: vec![2, 9, 3, 32],
            dtype: DType::F32,
            weight_dtype: DType::F32,
            scale: 2.,
            lies: Lies::Contiguous,
        }
    }
}

/// What goes in, on the CPU: x, the gate, bias, the logarithm of the rate, and the gradient of the result.
pub struct Numbers([Tensor; 5]);

const NAMES: [&str; 5] = ["y", "dx", "dgate", "dbias", "da_log"];

impl Pointwise {
    fn width(&self) -> usize {
        self.dims[self.dims.len() - 1]
    }

    fn per_rate(&self) -> usize {
        if let Kind::Decay(per_rate) = self.kind { per_rate } else { 1 }
    }

    /// Which of the results there are.
    fn there(&self) -> [bool; 5] {
        let (gated, decay) = (matches!(self.kind, Kind::Gated(_)), matches!(self.kind, Kind::Decay(_)));
        [true, true, gated, decay, decay]
    }

    fn result_dtype(&self) -> DType {
        if matches!(self.kind, Kind::Decay(_)) { DType::F32 } else { self.dtype }
    }

    pub fn numbers(&self) -> Result<Numbers> {
        let mut rng = StdRng::seed_from_u64(self.dims.iter().fold(7, |seed, x| seed * 31 + *x as u64));
        let mut random = |dims: &[usize], scale: f64, dtype: DType| {
            let values: Vec<f64> =
                (0..dims.iter().product()).map(|_| rng.random_range(-2.0..2.) * scale).collect();
            Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)
        };
        Ok(Numbers([
            random(&self.dims, self.scale, self.dtype)?,
            random(&self.dims, self.scale, self.dtype)?,
            random(&[self.width()], 1., self.weight_dtype)?,
            random(&[self.width() / self.per_rate()], 1., self.weight_dtype)?,
            random(&self.dims, 1., self.result_dtype())?,
        ]))
    }

    pub fn run(&self, Numbers(n): &Numbers, device: &Device) -> Result<Vec<Option<Tensor>>> {
        let var = |x: &Tensor| Var::from_tensor(&x.to_device(device)?);
        let (x, gate) = (var(&self.lies.base(&n[0])?)?, var(&self.lies.base(&n[1])?)?);
        let (bias, a_log) = (var(&n[2])?, var(&n[3])?);
        let view = |x: &Tensor| self.lies.view(x, self.width());
        let y = match self.kind {
            Kind::Gated(kind) => gated(&view(&x)?, &view(&gate)?, kind)?,
            Kind::Decay(_) => log_decay(&view(&x)?, &bias, &a_log)?,
            Kind::Sigmoid => Activation::Sigmoid.forward(&view(&x)?)?,
            Kind::LogSigmoid => Activation::LogSigmoid.forward(&view(&x)?)?,
        };
        let of_y = view(&self.lies.base(&n[4].to_device(device)?)?)?;
        // Through a layout of its own, as what comes next in a layer may have.
        let grads = match self.lies {
            Lies::Contiguous => inner(&y, &of_y)?,
            _ => inner(&y.transpose(0, 1)?, &of_y.transpose(0, 1)?)?,
        }
        .backward()?;
        let grad = |var: &Var| grads.get(var).map(|x| x.to_device(&Device::Cpu)).transpose();
        let viewed = |var: &Var| grad(var)?.map(|x| view(&x)).transpose();
        let y = y.to_device(&Device::Cpu)?;
        Ok(vec![Some(y), viewed(&x)?, viewed(&gate)?, grad(&bias)?, grad(&a_log)?])
    }

    /// By the definition.
    fn expected(&self, Numbers(n): &Numbers) -> Result<[Vec<f64>; 5]> {
        let [x, gate, bias, a_log, of_y] = n;
        let (x, gate, of_y) = (values(x)?, values(gate)?, values(of_y)?);
        let (bias, a_log) = (values(bias)?, values(a_log)?);
        let zeros = || vec![0f64; x.len()];
        let (mut y, mut dx, mut dgate) = (zeros(), zeros(), zeros());
        let (mut dbias, mut da_log) = (vec![0.; bias.len()], vec![0.; a_log.len()]);
        let softplus = |x: f64| x.max(0.) + (-x.abs()).exp().ln_1p();
        let sigmoid = |x: f64| 1. / (1. + (-x).exp());
        for i in 0..x.len() {
            match self.kind {
                Kind::Gated(kind) => {
                    let s = sigmoid(gate[i]);
                    let (value, slope) = match kind {
                        NormGate::Silu => (gate[i] * s, s * (1. + gate[i] * (1. - s))),
                        NormGate::Sigmoid => (s, s * (1. - s)),
                    };
                    y[i] = x[i] * value;
                    dx[i] = of_y[i] * value;
                    dgate[i] = of_y[i] * x[i] * slope;
                }
                Kind::Decay(per_rate) => {
                    let (c, h) = (i % bias.len(), i % bias.len() / per_rate);
                    let (z, rate) = (x[i] + bias[c], -a_log[h].exp());
                    y[i] = rate * softplus(z);
                    dx[i] = of_y[i] * rate * sigmoid(z);
                    dbias[c] += dx[i];
                    da_log[h] += of_y[i] * y[i];
                }
                Kind::Sigmoid => {
                    y[i] = sigmoid(x[i]);
                    dx[i] = of_y[i] * y[i] * sigmoid(-x[i]);
                }
                Kind::LogSigmoid => {
                    y[i] = -softplus(-x[i]);
                    dx[i] = of_y[i] * sigmoid(-x[i]);
                }
            }
        }
        Ok([y, dx, dgate, dbias, da_log])
    }

    pub fn check(&self) {
        let numbers = self.numbers().unwrap();
        on_kernels(|device| self.run(&numbers, device))
            .and_then(|results| self.compare(&numbers, &results))
            .unwrap_or_else(|e| panic!("{self:?}: {e}"));
    }

    /// Fails unless the results are those of the definition.
    pub fn compare(&self, numbers: &Numbers, results: &[Option<Tensor>]) -> Result<()> {
        for (i, (result, want)) in results.iter().zip(self.expected(numbers)?).enumerate() {
            let dtype =
                [self.result_dtype(), self.dtype, self.dtype, self.weight_dtype, self.weight_dtype][i];
            match result {
                Some(x) if self.there()[i] => close(x, &want, dtype, limits(dtype).grad, NAMES[i])?,
                None if !self.there()[i] => {}
                Some(_) => candle_core::bail!("{} is a gradient of nothing", NAMES[i]),
                None => candle_core::bail!("there is no {}", NAMES[i]),
            }
        }
        Ok(())
    }
}

/// Of one number, of fewer and of more than a vector, of a part of a warp, of a warp and of several blocks.
#[test]
fn widths_in_every_dtype() {
    for kind in KINDS {
        for width in [1, 2, 3, 4, 8, 20, 64, 100, 128, 132, 256, 300, 1100] {
            for dtype in DTYPES {
                if let Kind::Decay(per_rate) = kind
                    && width % per_rate != 0
                {
                    continue;
                }
                Pointwise { kind, dims: vec![3, 7, width], dtype, ..Default::default() }.check();
            }
        }
    }
}

#[test]
fn shapes() {
    for kind in KINDS {
        for dims in [vec![64], vec![1, 64], vec![2, 3, 5, 16], vec![2, 2, 2, 2, 24], vec![700, 4]] {
            Pointwise { kind, dims, dtype: DType::BF16, ..Default::default() }.check();
        }
    }
}

#[test]
fn layouts() {
    for kind in KINDS {
        for lies in [Lies::Window(5), Lies::Window(8), Lies::Swapped] {
            for dtype in DTYPES {
                Pointwise { kind, lies, dtype, ..Default::default() }.check();
            }
        }
    }
}

#[test]
fn scales_and_dtypes_of_the_weights() {
    for kind in KINDS {
        for scale in [0.1, 6., 40.] {
            for dtype in DTYPES {
                Pointwise { kind, scale, dtype, ..Default::default() }.check();
            }
        }
    }
    for weight_dtype in DTYPES {
        for dtype in DTYPES {
            for kind in [Kind::Decay(1), Kind::Decay(8)] {
                Pointwise { kind, weight_dtype, dtype, ..Default::default() }.check();
            }
        }
    }
}

/// Every number alone: what is far below the largest would not show in the norm of a difference.
#[test]
fn each_number_of_a_decay_has_its_digits() -> Result<()> {
    let x: Vec<f32> = (-800..=800).map(|x| x as f32 / 10.).collect();
    let found = on_kernels(|device| {
        let x = Tensor::from_vec(x.clone(), (x.len(), 1), device)?;
        let zero = Tensor::zeros(1, DType::F32, device)?;
        log_decay(&x, &zero, &zero)?.flatten_all()?.to_vec1::<f32>()
    })?;
    for (x, found) in x.into_iter().zip(found) {
        let want = -(f64::from(x).max(0.) + (-f64::from(x).abs()).exp().ln_1p());
        assert!((f64::from(found) / want - 1.).abs() < 1e-6, "{x}: {found}, should be {want}");
    }
    Ok(())
}

#[test]
fn no_rows() -> Result<()> {
    for dims in [(2, 0, 8), (0, 3, 8)] {
        on_kernels(|device| {
            let x = Tensor::zeros(dims, DType::BF16, device)?;
            let (bias, a_log) =
                (Tensor::zeros(8, DType::F32, device)?, Tensor::zeros(2, DType::F32, device)?);
            assert_eq!(gated(&x, &x, NormGate::Silu)?.shape(), x.shape());
            assert_eq!(log_decay(&x, &bias, &a_log)?.shape(), x.shape());
            // In f32, where no conversion follows: Candle's cannot take what is empty on a GPU.
            let x = Tensor::zeros(dims, DType::F32, device)?;
            assert_eq!(Activation::LogSigmoid.forward(&x)?.shape(), x.shape());
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn sizes_that_do_not_fit_are_refused() -> Result<()> {
    on_kernels(|device| {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, device);
        let x = zeros(&[3, 8])?;
        for (bias, a_log) in [(7, 1), (8, 3), (8, 0), (1, 1)] {
            let a_log = zeros(&[a_log.max(1)])?.narrow(0, 0, a_log)?;
            assert!(log_decay(&x, &zeros(&[bias])?, &a_log).is_err(), "{bias} {a_log:?}");
        }
        assert!(gated(&x, &zeros(&[8, 3])?, NormGate::Silu).is_err());
        Ok(())
    })
}

/// Parameters that are not trained, and an input that is not: what nobody asked for is not there.
#[test]
fn each_input_alone() -> Result<()> {
    for only in 0..3 {
        let found = on_kernels(|device| {
            let var = |dims: &[usize]| Var::from_tensor(&Tensor::randn(0f32, 1., dims, device)?);
            let vars = [var(&[5, 16])?, var(&[16])?, var(&[4])?];
            let given = |i: usize| if i == only { vars[i].as_tensor().clone() } else { vars[i].detach() };
            let grads = log_decay(&given(0), &given(1), &given(2))?.sum_all()?.backward()?;
            Ok::<_, candle_core::Error>([0, 1, 2].map(|i| grads.get(&vars[i]).is_some()))
        })?;
        assert_eq!(found, [0, 1, 2].map(|i| i == only));
    }
    Ok(())
}
