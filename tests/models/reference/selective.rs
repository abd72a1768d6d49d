//! HGRN-2 and Mamba-2.

use super::*;
use crate::scalar::{fla_activation, transformers_activation};

pub fn hgrn2_attention(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let hidden = number(config, "hidden_size", 0.) as usize;
    let width =
        config["expand_ratio"].as_f64().unwrap_or(hidden as f64 / number(config, "num_heads", 0.)) as usize;
    let heads = hidden / width;
    let value_width = hidden / heads;
    let project = |name: &str| {
        let ys = linear(params, &format!("{prefix}.{name}_proj"), xs);
        match flag(config, "use_short_conv", false) {
            true => short_conv(params, &format!("{prefix}.{name}_conv1d"), &ys, |x| x),
            false => ys,
        }
    };
    let (q, f, v) = (project("q"), project("f"), project("i"));
    let bound = lower_bound(config, params, prefix);
    let mut out = vec![vec![0.; hidden]; xs.len()];
    for h in 0..heads {
        let mut state = vec![vec![0.; value_width]; width];
        for t in 0..xs.len() {
            for (i, state) in state.iter_mut().enumerate() {
                let at = h * width + i;
                let open = bound[at] + (1. - bound[at]) * sigmoid(f[t][at]);
                let q = silu(q[t][at]) / (width as f64).sqrt();
                for (j, s) in state.iter_mut().enumerate() {
                    *s = open * *s + (1. - open) * v[t][h * value_width + j];
                    out[t][h * value_width + j] += q * *s;
                }
            }
        }
    }
    let affine = flag(config, "elementwise_affine", true);
    let weight = affine.then(|| vector(params, &format!("{prefix}.g_norm.weight").clone()));
    let normed = out.iter().map(|x| rms_norm(x, weight, number(config, "output_norm_eps", 1e-5))).collect();
    linear(params, &format!("{prefix}.o_proj"), &normed)
}

/// The layer's number is in the name of its parameters.
fn lower_bound(config: &Value, params: &Params, prefix: &str) -> Vec<f64> {
    let Some((shape, logits)) =
        params.get("model.lower_bounds").filter(|_| flag(config, "use_lower_bound", true))
    else {
        return vec![0.; 1 << 10];
    };
    let layer: usize = prefix.split('.').nth(2).unwrap().parse().unwrap();
    let (layers, channels) = (shape[0], shape[1]);
    let power = |layer: usize, c: usize| logits[layer * channels + c].exp();
    let share = |layer, c| power(layer, c) / (0..layers).map(|l| power(l, c)).sum::<f64>();
    (0..channels).map(|c| (1..=layer).map(|l| share(l, c)).sum()).collect()
}

pub fn mamba2(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let size = |name: &str, default| number(config, name, default) as usize;
    let (width, state_size, groups) = (size("head_dim", 64.), size("state_size", 128.), size("n_groups", 1.));
    let inner = (number(config, "expand", 2.) * number(config, "hidden_size", 0.)) as usize;
    let heads = inner / width;
    let transformers = config.get("layer_norm_epsilon").is_some();
    let activation = if transformers { transformers_activation } else { fla_activation };
    let act = |x: f64| activation(config["hidden_act"].as_str().unwrap_or("silu"), x);
    let projected = linear(params, &format!("{prefix}.in_proj"), xs);
    let conv_width = inner + 2 * groups * state_size;
    let part = |from: usize, len: usize| {
        projected.iter().map(|x| x[from..from + len].to_vec()).collect::<Sequence>()
    };
    let (gate, dt) = (part(0, inner), part(inner + conv_width, heads));
    let xbc = short_conv(params, &format!("{prefix}.conv1d"), &part(inner, conv_width), act);
    let parameter = |name: &str| vector(params, &format!("{prefix}.{name}"));
    // Two implementations have two names for some fields.
    let limits = config.get("time_step_limit").unwrap_or(&config["dt_limit"]);
    let limit = |i: usize, default: f64| limits[i].as_f64().unwrap_or(default);
    let mut out = vec![vec![0.; inner]; xs.len()];
    for h in 0..heads {
        let group = h / (heads / groups);
        let mut state = vec![vec![0.; width]; state_size];
        for t in 0..xs.len() {
            let dt = (dt[t][h] + parameter("dt_bias")[h]).exp().ln_1p();
            let dt = dt.max(limit(0, 0.)).min(limit(1, f64::INFINITY));
            let keep = (-parameter("A_log")[h].exp() * dt).exp();
            for j in 0..width {
                let x = xbc[t][h * width + j];
                let d = parameter("D");
                out[t][h * width + j] += x * if d.len() == heads { d[h] } else { d[h * width + j] };
                for (i, state) in state.iter_mut().enumerate() {
                    let (b, c) = (inner + group * state_size + i, inner + (groups + group) * state_size + i);
                    state[j] = keep * state[j] + dt * x * xbc[t][b];
                    out[t][h * width + j] += xbc[t][c] * state[j];
                }
            }
        }
    }
    let before = flag(config, "norm_before_gate", false);
    let gated = |y: &[f64], gate: &[f64], act: &dyn Fn(f64) -> f64| -> Vec<f64> {
        y.iter().zip(gate).map(|(y, gate)| y * act(*gate)).collect()
    };
    let grouped = |y: &[f64]| -> Vec<f64> {
        let eps = number(config, "layer_norm_epsilon", number(config, "norm_eps", 1e-5));
        let parts = y.chunks(inner / groups).flat_map(|part| rms_norm(part, None, eps));
        parts.zip(parameter("norm.weight")).map(|(y, w)| y * w).collect()
    };
    let finish = |(y, gate): (&Vec<f64>, &Vec<f64>)| match (flag(config, "rmsnorm", true), before) {
        (false, _) => gated(y, gate, &act),
        (true, true) => gated(&grouped(y), gate, &silu),
        (true, false) => grouped(&gated(y, gate, &silu)),
    };
    linear(params, &format!("{prefix}.out_proj"), &out.iter().zip(&gate).map(finish).collect())
}
