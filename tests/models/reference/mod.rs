//! The models once more, from their definition: one sequence, scalar loops, f64. Slow, and nothing in common with the
//! crate but the names of fields and parameters.

mod attention;
mod delta;
mod hybrid;
mod rwkv7;
mod selective;

use crate::scalar::{sigmoid, silu};
use candle_core::{DType, Result, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;

pub use attention::{gated_linear_attention, linear_attention, multi_scale_retention};
pub use delta::{delta_net, gated_delta_net, kimi_delta_attention};
pub use rwkv7::{rwkv7_attention, rwkv7_feed_forward};
pub use selective::{hgrn2_attention, mamba2};

/// `[T][channels]`
pub type Sequence = Vec<Vec<f64>>;

/// Parameters by name: shape and values.
pub type Params = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

pub fn params<'a>(tensors: impl IntoIterator<Item = (String, &'a Tensor)>) -> Result<Params> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    tensors.into_iter().map(|(name, tensor)| Ok((name, (tensor.dims().to_vec(), values(tensor)?)))).collect()
}

/// The slope of `loss` along one number of a parameter.
pub fn central_difference(
    params: &mut Params,
    name: &str,
    at: usize,
    loss: &impl Fn(&Params) -> Result<f64>,
) -> Result<f64> {
    const STEP: f64 = 1e-6;
    let centre = params[name].1[at];
    let mut shifted = |by: f64| {
        params.get_mut(name).expect("a parameter").1[at] = centre + by;
        loss(params)
    };
    let (above, below) = (shifted(STEP)?, shifted(-STEP)?);
    shifted(0.)?;
    Ok((above - below) / (2. * STEP))
}

/// Logits of a whole model, `[T][vocab_size]`.
pub fn model(config: &Value, params: &Params, ids: &[u32]) -> Sequence {
    let config = config.get("text_config").unwrap_or(config);
    let hybrid = |model: &str| hybrid::blocks(config, params, model, ids);
    let (embeddings, hidden) = match config["model_type"].as_str() {
        // The text part that is not by itself.
        Some("qwen3_5") => ("model.language_model.embed_tokens", hybrid("model.language_model")),
        Some("qwen3_5_text" | "qwen3_next" | "minimax" | "olmo_hybrid" | "kimi_linear") => {
            ("model.embed_tokens", hybrid("model"))
        }
        Some("mamba2") => ("backbone.embeddings", mamba2_blocks(config, params, ids)),
        Some("rwkv7") => ("model.embeddings", rwkv7::blocks(config, params, ids)),
        _ => ("model.embeddings", decoder(config, params, ids)),
    };
    linear(params, if flag(config, "tie_word_embeddings", false) { embeddings } else { "lm_head" }, &hidden)
}

/// Blocks of a mixer and an MLP.
fn decoder(config: &Value, params: &Params, ids: &[u32]) -> Sequence {
    let mut config = config.clone();
    let mixer = match config["model_type"].as_str() {
        Some("linear_attn") => linear_attention,
        Some("gla") => gated_linear_attention,
        // Its configuration has short convolutions, its layers do not.
        Some("retnet") => {
            config["use_short_conv"] = false.into();
            multi_scale_retention
        }
        Some("hgrn2") => hgrn2_attention,
        Some("delta_net") => delta_net,
        Some("gated_deltanet") => gated_delta_net,
        Some("kda") => kimi_delta_attention,
        other => panic!("model type {other:?}"),
    };
    config["gate_fn"] = config["hidden_act"].clone();
    let config = &config;
    let norm = |xs: &Sequence, name: &str| norm(config, params, name, xs);
    let mut xs: Sequence = ids.iter().map(|id| row(params, "model.embeddings", *id as usize)).collect();
    for layer in 0..number(config, "num_hidden_layers", 24.) as usize {
        let prefix = format!("model.layers.{layer}");
        let mixed =
            mixer(config, params, &format!("{prefix}.attn"), &norm(&xs, &format!("{prefix}.attn_norm")));
        xs = add(&xs, &mixed);
        let ys = norm(&xs, &format!("{prefix}.mlp_norm"));
        xs = add(&xs, &mlp(config, params, &format!("{prefix}.mlp"), &ys));
    }
    norm(&xs, "model.norm")
}

fn mamba2_blocks(config: &Value, params: &Params, ids: &[u32]) -> Sequence {
    let mut xs: Sequence = ids.iter().map(|id| row(params, "backbone.embeddings", *id as usize)).collect();
    for layer in 0..number(config, "num_hidden_layers", 48.) as usize {
        let prefix = format!("backbone.layers.{layer}");
        let ys = norm(config, params, &format!("{prefix}.norm"), &xs);
        xs = add(&xs, &mamba2(config, params, &format!("{prefix}.mixer"), &ys));
    }
    norm(config, params, "backbone.norm_f", &xs)
}

fn norm(config: &Value, params: &Params, name: &str, xs: &Sequence) -> Sequence {
    let weight = params[&format!("{name}.weight")].1.as_slice();
    let eps = number(config, "layer_norm_epsilon", number(config, "norm_eps", 1e-6));
    xs.iter().map(|x| rms_norm(x, Some(weight), eps)).collect()
}

/// A short convolution and a function.
fn short_conv(params: &Params, name: &str, xs: &Sequence, act: impl Fn(f64) -> f64) -> Sequence {
    let (shape, weight) = &params[&format!("{name}.weight")];
    let bias = params.get(&format!("{name}.bias"));
    let width = shape[2];
    let at = |t: usize, c: usize| {
        let taps = (0..width).filter(|i| t + i + 1 >= width);
        let sum: f64 = taps.map(|i| weight[c * width + i] * xs[t + i + 1 - width][c]).sum();
        act(sum + bias.map_or(0., |(_, bias)| bias[c]))
    };
    (0..xs.len()).map(|t| (0..shape[0]).map(|c| at(t, c)).collect()).collect()
}

/// A vector of parameters.
fn vector<'a>(params: &'a Params, name: &str) -> &'a [f64] {
    &params[name].1
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
