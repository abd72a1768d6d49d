use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Options, Output};
use crate::problem::{Decay, Problem, Role, Update};

/// The recurrence of RWKV-7: the state goes through a matrix that is diagonal plus low rank (DPLR).
///
/// ```text
/// S_t = (diag(exp(g_{t,h,:})) + b_t a_t^T) S_{t-1} + k_t v_t^T
/// o_t = scale * S_t^T q_t
/// ```
///
/// From "RWKV-7 Goose with Expressive Dynamic State Evolution" (Peng et al., 2025, <https://arxiv.org/abs/2503.14456>),
/// where q is called r, `g` is log w, `a` is minus the normalised removal key and `b` is that key times the in-context
/// learning rate. RWKV-7's scale is 1.
///
/// # Arguments
///
/// * `q`, `k`, `v`, `opts`: as for [`linear_attn`](crate::linear_attn). Unset, the scale is `1 / sqrt(K)` here too.
/// * `a`, `b`: `[B, T, H, K]`, f32 or the dtype of q; what `a` reads from the state, before it fades, `b` writes.
/// * `g`: `[B, T, H, K]`, natural logarithm of the decay, f32 or the dtype of q. Usually below 0; `-inf` forgets
///   everything before the token, but for what `a` reads.
///
/// Where v has more heads than q, a value head has `a`, `b` and `g` of its key head. Gradients reach `a`, `b` and `g` as
/// well.
///
/// # Errors
///
/// As for [`linear_attn`](crate::linear_attn); `normalize` is refused.
pub fn rwkv7(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    a: &Tensor,
    b: &Tensor,
    g: &Tensor,
    opts: &Options,
) -> Result<Output> {
    let extra = [(Role::G, "g", g), (Role::A, "a", a), (Role::B, "b", b)];
    let (problem, inputs) =
        Problem::new("rwkv7", [q, k, v], (Decay::Channel, Update::LowRank), &extra, opts)?;
    backend::solve(problem, inputs)
}
