//! RWKV-7.

use super::delta::l2_norm;
use super::*;
use crate::scalar::fla_activation;

pub fn blocks(config: &Value, params: &Params, ids: &[u32]) -> Sequence {
    let norm = |name: &str, xs: &Sequence| {
        let width = xs[0].len();
        layer_norm(params, name, xs, width, number(config, "norm_eps", 1e-5))
    };
    let mut xs: Sequence = ids.iter().map(|id| row(params, "model.embeddings", *id as usize)).collect();
    let mut first_values = None;
    for layer in 0..number(config, "num_hidden_layers", 24.) as usize {
        let prefix = format!("model.layers.{layer}");
        if layer == 0 && flag(config, "norm_first", true) {
            xs = norm(&format!("{prefix}.pre_norm"), &xs);
        }
        let ys = norm(&format!("{prefix}.attn_norm"), &xs);
        let (ys, values) =
            rwkv7_attention(config, params, &format!("{prefix}.attn"), &ys, first_values.as_ref());
        first_values.get_or_insert(values);
        xs = add(&xs, &ys);
        let ys = norm(&format!("{prefix}.ffn_norm"), &xs);
        xs = add(&xs, &rwkv7_feed_forward(config, params, &format!("{prefix}.ffn"), &ys));
    }
    norm("model.norm", &xs)
}

fn layer_norm(params: &Params, name: &str, xs: &Sequence, width: usize, eps: f64) -> Sequence {
    let weight = vector(params, &format!("{name}.weight"));
    let bias = params.get(&format!("{name}.bias")).map(|(_, bias)| bias);
    let standard = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        x.iter().map(|x| (x - mean) / (variance + eps).sqrt()).collect()
    };
    let affine = |(c, x): (usize, f64)| x * weight[c] + bias.map_or(0., |bias| bias[c]);
    xs.iter().map(|x| x.chunks(width).flat_map(standard).enumerate().map(affine).collect()).collect()
}

/// The input mixed with the token before.
fn mixed(params: &Params, name: &str, xs: &Sequence) -> Sequence {
    let share = vector(params, name);
    let at = |t: usize, c: usize| {
        let before = if t == 0 { 0. } else { xs[t - 1][c] };
        xs[t][c] + share[c] * (before - xs[t][c])
    };
    (0..xs.len()).map(|t| (0..xs[t].len()).map(|c| at(t, c)).collect()).collect()
}

fn map(xs: &Sequence, f: impl Fn(f64) -> f64) -> Sequence {
    xs.iter().map(|x| x.iter().map(|x| f(*x)).collect()).collect()
}

/// The output of a layer and its values.
pub fn rwkv7_attention(
    config: &Value,
    params: &Params,
    prefix: &str,
    xs: &Sequence,
    first_values: Option<&Sequence>,
) -> (Sequence, Sequence) {
    let name = |name: &str| format!("{prefix}.{name}");
    let mix = |part: &str| mixed(params, &name(&format!("x_{part}")), xs);
    let low_rank = |part: &str, xs: &Sequence, act: fn(f64) -> f64| {
        let inner = map(&linear(params, &name(&format!("{part}_lora.lora.0")), xs), act);
        linear(params, &name(&format!("{part}_lora.lora.2")), &inner)
    };
    let r = linear(params, &name("r_proj"), &mix("r"));
    let decay = map(&low_rank("w", &mix("w"), f64::tanh), |w| (-(-0.5f64).exp() * sigmoid(w)).exp());
    let key = linear(params, &name("k_proj"), &mix("k"));
    let own = linear(params, &name("v_proj"), &mix("v"));
    let mut v = own.clone();
    if let Some(first) = first_values {
        let share = map(&low_rank("v", &mix("v"), |x| x), sigmoid);
        for ((v, first), share) in
            v.iter_mut().flatten().zip(first.iter().flatten()).zip(share.iter().flatten())
        {
            *v += share * (first - *v);
        }
    }
    let a = map(&low_rank("a", &mix("a"), |x| x), sigmoid);
    let gate = low_rank("g", &mix("g"), sigmoid);
    let (k_k, k_a, r_k) =
        (vector(params, &name("k_k")), vector(params, &name("k_a")), vector(params, &name("r_k")));
    let (hidden, width) = (xs[0].len(), params[&name("r_k")].0[1]);
    let value_width = v[0].len() / (hidden / width);
    let eps = if flag(config, "fuse_norm", true) { 1e-6 } else { 0. };
    let mut out = vec![vec![0.; v[0].len()]; xs.len()];
    let mut bonus = out.clone();
    for h in 0..hidden / width {
        let mut state = vec![vec![0.; value_width]; width];
        for t in 0..xs.len() {
            let at = |i: usize| h * width + i;
            let removed: Vec<f64> = (0..width).map(|i| key[t][at(i)] * k_k[at(i)]).collect();
            let removed = l2_norm(&removed, eps);
            let k = |i: usize| key[t][at(i)] * (1. + (a[t][at(i)] - 1.) * k_a[at(i)]);
            let weight: f64 = (0..width).map(|i| r[t][at(i)] * k(i) * r_k[at(i)]).sum();
            for j in 0..value_width {
                let found: f64 = (0..width).map(|i| removed[i] * state[i][j]).sum();
                let value = v[t][h * value_width + j];
                for i in 0..width {
                    let taken = removed[i] * a[t][at(i)] * found;
                    state[i][j] = decay[t][at(i)] * state[i][j] - taken + k(i) * value;
                    out[t][h * value_width + j] += r[t][at(i)] * state[i][j];
                }
                bonus[t][h * value_width + j] = weight * value;
            }
        }
    }
    let eps = width as f64 * number(config, "norm_eps", 1e-5);
    let mut ys = add(&layer_norm(params, &name("g_norm"), &out, value_width, eps), &bonus);
    ys.iter_mut().flatten().zip(gate.iter().flatten()).for_each(|(y, gate)| *y *= gate);
    (linear(params, &name("o_proj"), &ys), own)
}

pub fn rwkv7_feed_forward(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let inner = linear(params, &format!("{prefix}.key"), &mixed(params, &format!("{prefix}.x_k"), xs));
    let act = config["hidden_act"].as_str().unwrap_or("sqrelu");
    linear(params, &format!("{prefix}.value"), &map(&inner, |x| fla_activation(act, x)))
}
