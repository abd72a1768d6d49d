//! The layers that only add to their state.

use super::*;
use crate::scalar::{fla_activation, transformers_activation};

pub fn linear_attention(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let sizes = Sizes::new(config, [1., 1.]);
    let [q, k, v] = projections(config, params, prefix, xs);
    let map = |xs: &Sequence, name: &str, norm: bool| -> Sequence {
        let tied = flag(config, "tie_feature_map_qk", false);
        let name = format!("{prefix}.feature_map_{}", if tied { "q" } else { name });
        let kind = config["feature_map"].as_str().unwrap();
        let mapped = |x: &[f64]| {
            let ys = feature_map(params, kind, &name, x);
            let sum = if norm { ys.iter().sum::<f64>() + 1e-4 } else { 1. };
            ys.into_iter().map(move |y| y / sum).collect::<Vec<_>>()
        };
        xs.iter().map(|x| x.chunks(sizes.k).flat_map(mapped).collect()).collect()
    };
    let q = map(&q, "q", flag(config, "norm_q", false));
    let k = map(&k, "k", flag(config, "norm_k", false));
    let out = attend(&sizes, [&q, &k, &v], flag(config, "norm_feature_map", false), |_, _, _| 0.);
    let out = match config["output_norm"].as_str() {
        Some("identity") => out,
        _ => head_norm(config, params, &format!("{prefix}.norm"), sizes.v, &out),
    };
    linear(params, &format!("{prefix}.o_proj"), &out)
}

pub fn gated_linear_attention(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let sizes = Sizes::new(config, [0.5, 1.]);
    let [q, k, v] = projections(config, params, prefix, xs);
    let gates =
        linear(params, &format!("{prefix}.gk_proj.1"), &linear(params, &format!("{prefix}.gk_proj.0"), xs));
    let (normalizer, least) = (number(config, "gate_logit_normalizer", 16.), config["clamp_min"].as_f64());
    let decay = |t: usize, h: usize, i: usize| {
        let logit = gates[t][h / sizes.group * sizes.k + i];
        (-(-logit).exp().ln_1p() / normalizer).max(least.unwrap_or(f64::NEG_INFINITY))
    };
    let [q, k] = [q, k].map(|x| pointwise(&config["feature_map"], fla_activation, x));
    let out = attend(&sizes, [&q, &k, &v], false, decay);
    gated_output(config, params, prefix, &sizes, fla_activation, &out, xs)
}

pub fn multi_scale_retention(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let sizes = Sizes::new(config, [1., 2.]);
    let [q, k, v] = projections(config, params, prefix, xs);
    let half = sizes.k / 2;
    let rotate = |xs: Sequence| -> Sequence {
        let turned = |(t, x): (usize, Vec<f64>)| {
            let mut y = x.clone();
            for at in (0..x.len()).step_by(sizes.k).flat_map(|head| head..head + half) {
                let angle = t as f64 / 10000f64.powf((at % sizes.k) as f64 / half as f64);
                y[at] = x[at] * angle.cos() - x[at + half] * angle.sin();
                y[at + half] = x[at + half] * angle.cos() + x[at] * angle.sin();
            }
            y
        };
        xs.into_iter().enumerate().map(turned).collect()
    };
    let [q, k] = [q, k].map(|x| rotate(pointwise(&config["feature_map"], transformers_activation, x)));
    let out = attend(&sizes, [&q, &k, &v], false, |_, h, _| (1. - 2f64.powf(-5. - h as f64)).ln());
    gated_output(config, params, prefix, &sizes, transformers_activation, &out, xs)
}

struct Sizes {
    heads: usize,
    /// Query heads for each key-value head.
    group: usize,
    k: usize,
    v: usize,
}

impl Sizes {
    fn new(config: &Value, expand: [f64; 2]) -> Self {
        let hidden = number(config, "hidden_size", 0.);
        let heads = number(config, "num_heads", 0.);
        let head = |name, default| (hidden * number(config, name, default) / heads) as usize;
        Self {
            heads: heads as usize,
            group: (heads / number(config, "num_kv_heads", heads)) as usize,
            k: head("expand_k", expand[0]),
            v: head("expand_v", expand[1]),
        }
    }
}

/// The recurrence of the design: decay, add, read; `decay(t, h, i)` is a logarithm.
fn attend(
    sizes: &Sizes,
    [q, k, v]: [&Sequence; 3],
    normalize: bool,
    decay: impl Fn(usize, usize, usize) -> f64,
) -> Sequence {
    // A feature map may have changed the width of a head.
    let width = q[0].len() / sizes.heads;
    let scale = 1. / (width as f64).sqrt();
    let mut out = vec![vec![0.; sizes.heads * sizes.v]; q.len()];
    for h in 0..sizes.heads {
        let shared = h / sizes.group;
        let mut state = vec![vec![0.; sizes.v]; width];
        let mut sum = vec![0.; width];
        for t in 0..q.len() {
            let mut denominator = 1e-10;
            for i in 0..width {
                let (q, k) = (q[t][h * width + i], k[t][shared * width + i]);
                let keep = decay(t, h, i).exp();
                sum[i] += k;
                denominator += scale * q * sum[i];
                for (j, s) in state[i].iter_mut().enumerate() {
                    *s = keep * *s + k * v[t][shared * sizes.v + j];
                    out[t][h * sizes.v + j] += scale * q * *s;
                }
            }
            if normalize {
                out[t][h * sizes.v..][..sizes.v].iter_mut().for_each(|o| *o /= denominator);
            }
        }
    }
    out
}

fn projections(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> [Sequence; 3] {
    ["q", "k", "v"].map(|name| {
        let ys = linear(params, &format!("{prefix}.{name}_proj"), xs);
        match flag(config, "use_short_conv", false) {
            true => short_conv(params, &format!("{prefix}.{name}_conv1d"), &ys, silu),
            false => ys,
        }
    })
}

fn gated_output(
    config: &Value,
    params: &Params,
    prefix: &str,
    sizes: &Sizes,
    activation: fn(&str, f64) -> f64,
    out: &Sequence,
    xs: &Sequence,
) -> Sequence {
    let gated = flag(config, "use_output_gate", true);
    let gate_fn = config["gate_fn"].as_str().unwrap_or("swish");
    let fused = gated && gate_fn == "swish" && flag(config, "fuse_norm", true);
    let name = if fused { "g_norm_swish_gate" } else { "g_norm" };
    let mut ys = head_norm(config, params, &format!("{prefix}.{name}"), sizes.v, out);
    if gated {
        let gates = linear(params, &format!("{prefix}.g_proj"), xs);
        for (y, gate) in ys.iter_mut().flatten().zip(gates.iter().flatten()) {
            *y *= activation(gate_fn, *gate);
        }
    }
    linear(params, &format!("{prefix}.o_proj"), &ys)
}

fn head_norm(config: &Value, params: &Params, name: &str, width: usize, xs: &Sequence) -> Sequence {
    let affine = flag(config, "elementwise_affine", true);
    let weight = affine.then(|| params[&format!("{name}.weight")].1.as_slice());
    let eps = number(config, "norm_eps", 1e-5);
    xs.iter().map(|x| x.chunks(width).flat_map(|head| rms_norm(head, weight, eps)).collect()).collect()
}

fn feature_map(params: &Params, kind: &str, name: &str, x: &[f64]) -> Vec<f64> {
    let layer = |layer: &str| linear(params, &format!("{name}.{layer}"), &vec![x.to_vec()]).remove(0);
    match kind {
        "elementwise_product" => layer("layer1").iter().zip(layer("layer2")).map(|(a, b)| a * b).collect(),
        "hedgehog" => {
            let y = layer("layer");
            let powers: Vec<f64> =
                y.iter().map(|y| (2. * y).exp()).chain(y.iter().map(|y| (-2. * y).exp())).collect();
            let sum: f64 = powers.iter().sum();
            powers.iter().map(|power| power / sum).collect()
        }
        "t2r" => layer("layer").iter().map(|y| y.max(0.)).collect(),
        "dpfp" => {
            let both: Vec<f64> = x.iter().map(|x| x.max(0.)).chain(x.iter().map(|x| (-x).max(0.))).collect();
            let n = both.len();
            (1..=4)
                .flat_map(|shift| (0..n).map(|i| both[i] * both[(i + n - shift) % n]).collect::<Vec<_>>())
                .collect()
        }
        "elu" => x.iter().map(|x| if *x < 0. { x.exp() } else { x + 1. }).collect(),
        "relu" => x.iter().map(|x| x.max(0.)).collect(),
        "identity" => x.to_vec(),
        _ => panic!("feature map {kind}"),
    }
}

fn pointwise(name: &Value, activation: fn(&str, f64) -> f64, xs: Sequence) -> Sequence {
    match name.as_str() {
        Some(name) => xs.into_iter().map(|x| x.into_iter().map(|x| activation(name, x)).collect()).collect(),
        None => xs,
    }
}
