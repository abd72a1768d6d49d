use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Options, Output};
use crate::problem::{Decay, Problem, Role, Update};

/// The delta rule on a state that fades at a rate of its own for each token and head.
///
/// ```text
/// S~_t = exp(g_{t,h}) S_{t-1}
/// u_t  = beta_t (v_t - S~_t^T k_t)
/// S_t  = S~_t + k_t u_t^T
/// o_t  = scale * S_t^T q_t
/// ```
///
/// From "Gated Delta Networks" (Yang et al., 2024, <https://arxiv.org/abs/2412.06464>).
///
/// # Arguments
///
/// * `q`, `k`, `v`, `beta`, `opts`: as for [`delta_rule`](crate::delta_rule).
/// * `g`: `[B, T, HV]`, natural logarithm of the decay, f32 or the dtype of q. Usually below 0; `-inf` forgets everything
///   before the token.
///
/// Gradients reach `g` and `beta` as well.
///
/// # Errors
///
/// As for [`linear_attn`](crate::linear_attn); `normalize` is refused.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_linear_attn::{Options, gated_delta_rule};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::randn(0f32, 1., (1, 100, 4, 32), &Device::Cpu)?;
/// let k = x.broadcast_div(&x.sqr()?.sum_keepdim(3)?.sqrt()?)?;
/// let g = Tensor::full(-0.1f32, (1, 100, 4), &Device::Cpu)?;
/// let beta = Tensor::full(0.5f32, (1, 100, 4), &Device::Cpu)?;
/// let out = gated_delta_rule(&x, &k, &x, &g, &beta, &Options::default())?.out;
/// assert_eq!(out.dims(), [1, 100, 4, 32]);
/// # Ok(())
/// # }
/// ```
pub fn gated_delta_rule(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    opts: &Options,
) -> Result<Output> {
    let extra = [(Role::G, "g", g), (Role::Beta, "beta", beta)];
    let (problem, inputs) =
        Problem::new("gated_delta_rule", [q, k, v], (Decay::Scalar, Update::Delta), &extra, opts)?;
    backend::solve(problem, inputs)
}
