//! The three models once more, from their definition: one sequence, scalar loops, f64. Slow, and nothing in common with
//! the crate but the names of fields and parameters.

use candle_core::{DType, Result, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;

/// `[T][channels]`
pub type Sequence = Vec<Vec<f64>>;

/// Parameters by name: shape and values.
pub type Params = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

pub fn params<'a>(tensors: impl IntoIterator<Item = (String, &'a Tensor)>) -> Result<Params> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    tensors.into_iter().map(|(name, tensor)| Ok((name, (tensor.dims().to_vec(), values(tensor)?)))).collect()
}

/// Logits of a whole model, `[T][vocab_size]`.
pub fn model(config: &Value, params: &Params, ids: &[u32]) -> Sequence {
    let mut config = config.clone();
    let mixer = match config["model_type"].as_str() {
        Some("linear_attn") => linear_attention,
        Some("gla") => gated_linear_attention,
        // Its configuration has short convolutions, its layers do not.
        Some("retnet") => {
            config["use_short_conv"] = false.into();
            multi_scale_retention
        }
        other => panic!("model type {other:?}"),
    };
    config["gate_fn"] = config["hidden_act"].clone();
    let config = &config;
    let tied = flag(config, "tie_word_embeddings", false);
    let norm = |xs: &Sequence, name: &str| {
        let weight = params[&format!("{name}.weight")].1.as_slice();
        xs.iter().map(|x| rms_norm(x, Some(weight), number(config, "norm_eps", 1e-6))).collect::<Sequence>()
    };
    let mut xs: Sequence = ids.iter().map(|id| row(params, "model.embeddings", *id as usize)).collect();
    for layer in 0..number(config, "num_hidden_layers", 24.) as usize {
        let prefix = format!("model.layers.{layer}");
        let mixed = mixer(config, params, &format!("{prefix}.attn"), &norm(&xs, &format!("{prefix}.attn_norm")));
        xs = add(&xs, &mixed);
        let ys = norm(&xs, &format!("{prefix}.mlp_norm"));
        xs = add(&xs, &mlp(config, params, &format!("{prefix}.mlp"), &ys));
    }
    linear(params, if tied { "model.embeddings" } else { "lm_head" }, &norm(&xs, "model.norm"))
}

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
    let gates = linear(params, &format!("{prefix}.gk_proj.1"), &linear(params, &format!("{prefix}.gk_proj.0"), xs));
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
            for at in (0..x.len()).step_by(sizes.k).flat_map(|head| (head..head + half)) {
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
            true => short_conv(params, &format!("{prefix}.{name}_conv1d"), &ys),
            false => ys,
        }
    })
}

fn short_conv(params: &Params, name: &str, xs: &Sequence) -> Sequence {
    let (shape, weight) = &params[&format!("{name}.weight")];
    let bias = params.get(&format!("{name}.bias"));
    let width = shape[2];
    let at = |t: usize, c: usize| {
        let taps = (0..width).filter(|i| t + i + 1 >= width);
        let sum: f64 = taps.map(|i| weight[c * width + i] * xs[t + i + 1 - width][c]).sum();
        silu(sum + bias.map_or(0., |(_, bias)| bias[c]))
    };
    (0..xs.len()).map(|t| (0..shape[0]).map(|c| at(t, c)).collect()).collect()
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

fn rms_norm(x: &[f64], weight: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scaled = x.iter().map(|x| x / (mean_square + eps).sqrt());
    match weight {
        Some(weight) => scaled.zip(weight).map(|(x, w)| x * w).collect(),
        None => scaled.collect(),
    }
}

fn mlp(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let gate = linear(params, &format!("{prefix}.gate_proj"), xs);
    let mut ys = linear(params, &format!("{prefix}.up_proj"), xs);
    for (y, g) in ys.iter_mut().flatten().zip(gate.iter().flatten()) {
        *y *= match config["hidden_act"].as_str() {
            Some("powlu") if *g > 0. => g.powf(3. / (g.sqrt() + 1.)) * sigmoid(*g),
            _ => silu(*g),
        };
    }
    linear(params, &format!("{prefix}.down_proj"), &ys)
}

fn feature_map(params: &Params, kind: &str, name: &str, x: &[f64]) -> Vec<f64> {
    let layer = |layer: &str| linear(params, &format!("{name}.{layer}"), &vec![x.to_vec()]).remove(0);
    match kind {
        "elementwise_product" => layer("layer1").iter().zip(layer("layer2")).map(|(a, b)| a * b).collect(),
        "hedgehog" => {
            let y = layer("layer");
            let powers: Vec<f64> = y.iter().map(|y| (2. * y).exp()).chain(y.iter().map(|y| (-2. * y).exp())).collect();
            let sum: f64 = powers.iter().sum();
            powers.iter().map(|power| power / sum).collect()
        }
        "t2r" => layer("layer").iter().map(|y| y.max(0.)).collect(),
        "dpfp" => {
            let both: Vec<f64> = x.iter().map(|x| x.max(0.)).chain(x.iter().map(|x| (-x).max(0.))).collect();
            let n = both.len();
            (1..=4).flat_map(|shift| (0..n).map(|i| both[i] * both[(i + n - shift) % n]).collect::<Vec<_>>()).collect()
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

pub fn fla_activation(name: &str, x: f64) -> f64 {
    match name {
        "gelu" => gelu_tanh(x),
        "sqrelu" => x.max(0.).powi(2),
        "logsigmoid" => -(-x).exp().ln_1p(),
        "relu" | "sigmoid" | "silu" | "swish" => transformers_activation(name, x),
        _ => panic!("activation {name}"),
    }
}

pub fn transformers_activation(name: &str, x: f64) -> f64 {
    match name {
        "relu" => x.max(0.),
        "relu2" => x.max(0.).powi(2),
        "sigmoid" => sigmoid(x),
        "silu" | "swish" => silu(x),
        "tanh" => x.tanh(),
        "linear" => x,
        "mish" => x * x.exp().ln_1p().tanh(),
        "quick_gelu" => x * sigmoid(1.702 * x),
        "gelu" | "gelu_python" => x * 0.5 * (1. + erf(x / 2f64.sqrt())),
        _ if name.starts_with("gelu") => gelu_tanh(x),
        _ => panic!("activation {name}"),
    }
}

fn gelu_tanh(x: f64) -> f64 {
    x * 0.5 * (1. + ((2. / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// By its series, which converges fast enough for the arguments here.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2. / std::f64::consts::PI.sqrt()
}

fn sigmoid(x: f64) -> f64 {
    1. / (1. + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

fn row(params: &Params, name: &str, index: usize) -> Vec<f64> {
    let (shape, values) = &params[&format!("{name}.weight")];
    values[index * shape[1]..][..shape[1]].to_vec()
}

fn linear(params: &Params, name: &str, xs: &Sequence) -> Sequence {
    let (shape, weight) = &params[&format!("{name}.weight")];
    let bias = params.get(&format!("{name}.bias"));
    let at = |x: &[f64], o: usize| {
        let products = weight[o * shape[1]..][..shape[1]].iter().zip(x).map(|(w, x)| w * x);
        products.sum::<f64>() + bias.map_or(0., |(_, bias)| bias[o])
    };
    xs.iter().map(|x| (0..shape[0]).map(|o| at(x, o)).collect()).collect()
}

fn add(xs: &Sequence, ys: &Sequence) -> Sequence {
    let sum = |(x, y): (&Vec<f64>, &Vec<f64>)| x.iter().zip(y).map(|(x, y)| x + y).collect();
    xs.iter().zip(ys).map(sum).collect()
}

fn number(config: &Value, name: &str, default: f64) -> f64 {
    config[name].as_f64().unwrap_or(default)
}

/// A null that is there is false, as it is to Python.
fn flag(config: &Value, name: &str, default: bool) -> bool {
    config.get(name).map_or(default, |value| value == true)
}
