use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Options, Output};
use crate::problem::{Decay, Problem, Role, Update};

/// Retention: linear attention that fades at a constant rate, one for each head.
///
/// ```text
/// S_t = exp(log_decay_h) S_{t-1} + k_t v_t^T
/// o_t = scale * S_t^T q_t
/// ```
///
/// From "Retentive Network" (Sun et al., 2023, <https://arxiv.org/abs/2307.08621>). Lightning attention is this with a decay
/// of its own.
///
/// # Arguments
///
/// * `q`, `k`, `v`, `opts`: as for [`linear_attn`](crate::linear_attn).
/// * `log_decay`: `[HV]`, natural logarithm, f32 or the dtype of q. Usually below 0; `-inf` forgets everything.
///
/// Gradients reach `log_decay` as well.
///
/// # Errors
///
/// As for [`linear_attn`](crate::linear_attn); `normalize` is refused.
pub fn retention(q: &Tensor, k: &Tensor, v: &Tensor, log_decay: &Tensor, opts: &Options) -> Result<Output> {
    let (problem, inputs) = Problem::new(
        "retention",
        [q, k, v],
        (Decay::Head, Update::Additive),
        &[(Role::G, "log_decay", log_decay)],
        opts,
    )?;
    backend::solve(problem, inputs)
}
