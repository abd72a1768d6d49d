//! Decays learned in the form that state space models have them.

use crate::nn::fused;
use candle_core::{DType, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// The parameters of `g = -exp(A_log) * softplus(dt + dt_bias)`, a logarithm of a decay.
#[derive(Debug, Clone)]
pub(crate) struct Decay {
    a_log: Tensor,
    dt_bias: Tensor,
}

/// Where fresh parameters lie: A and the time step `softplus(dt_bias)` are spread evenly over these ranges, on a
/// logarithmic scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DecayRange {
    pub a: [f64; 2],
    pub dt: [f64; 2],
}

impl Default for DecayRange {
    fn default() -> Self {
        Self { a: [1., 16.], dt: [1e-3, 0.1] }
    }
}

impl Decay {
    /// Reads `A_log` of shape `[heads]` and `dt_bias` of shape `[biases]`.
    pub fn new(heads: usize, biases: usize, range: DecayRange, vb: &VarBuilder) -> Result<Self> {
        Self::shaped(heads.into(), biases, range, vb)
    }

    /// The same with an `A_log` of another shape.
    pub fn shaped(heads: Shape, biases: usize, range: DecayRange, vb: &VarBuilder) -> Result<Self> {
        let uniform = |[lo, up]: [f64; 2]| if lo < up { Init::Uniform { lo, up } } else { Init::Const(lo) };
        // softplus(x) = dt where x = ln(exp(dt) - 1).
        let (a, dt) = (range.a.map(f64::ln), range.dt.map(|dt| dt.exp_m1().ln()));
        Ok(Self {
            a_log: vb.get_with_hints(heads, "A_log", uniform(a))?,
            dt_bias: vb.get_with_hints(biases, "dt_bias", uniform(dt))?,
        })
    }

    /// `exp(A_log)`, `[heads]`, f32.
    pub fn rate(&self) -> Result<Tensor> {
        self.a_log.to_dtype(DType::F32)?.flatten_all()?.exp()
    }

    /// `g` for `dt: [.., biases]`, where each head's A is that of as many biases as it has, and beta, `factor` times the sigmoid of
    /// `b`; both f32.
    pub fn log_decay_and_beta(&self, dt: &Tensor, (factor, b): (f64, &Tensor)) -> Result<(Tensor, Tensor)> {
        fused::decay_and_sigmoid((dt, &self.dt_bias, &self.a_log), (factor, b))
    }

    /// `softplus(dt + dt_bias)` for `dt: [.., biases]`, f32.
    pub fn time_step(&self, dt: &Tensor) -> Result<Tensor> {
        fused::decay(dt, &self.dt_bias, None)
    }

    /// `dt + dt_bias` for `dt: [.., biases]`, f32.
    pub fn biased(&self, dt: &Tensor) -> Result<Tensor> {
        dt.to_dtype(DType::F32)?.broadcast_add(&self.dt_bias.to_dtype(DType::F32)?)
    }
}

/// `g = -exp(a_log) * softplus(dt + dt_bias)`, the logarithm of the decay in Gated DeltaNet, Kimi delta attention and Mamba-2,
/// computed in f32. `dt` is `[.., n]` in f32, f16 or bf16, `dt_bias` `[n]`, and `a_log` has one number for each of n columns, or
/// for n / heads neighbours as many as there are heads. One operation with a gradient; to the shape of `dt` in f32.
pub fn log_decay(dt: &Tensor, dt_bias: &Tensor, a_log: &Tensor) -> Result<Tensor> {
    fused::decay(dt, dt_bias, Some(a_log))
}

/// A range of two finite numbers, the first above 0 and not above the second.
pub(crate) fn check_range(name: &str, [lo, up]: [f64; 2]) -> Result<()> {
    if !(lo > 0. && lo <= up && up.is_finite()) {
        bail!("{name} is [{lo}, {up}], it must be two numbers above 0, the second not below the first");
    }
    Ok(())
}
