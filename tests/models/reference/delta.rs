//! The layers of the delta rules.

use super::*;

/// Heads of queries and keys, of values, and their widths.
pub struct Heads {
    pub count: usize,
    pub values: usize,
    pub k: usize,
    pub v: usize,
}

/// The recurrence of the design: decay, take back what the key finds, write, read; `decay(t, h, i)` is a logarithm.
pub fn attend(
    heads: &Heads,
    [q, k, v]: [&Sequence; 3],
    decay: impl Fn(usize, usize, usize) -> f64,
    beta: impl Fn(usize, usize) -> f64,
) -> Sequence {
    let scale = 1. / (heads.k as f64).sqrt();
    let mut out = vec![vec![0.; heads.values * heads.v]; q.len()];
    for h in 0..heads.values {
        let shared = h / (heads.values / heads.count) * heads.k;
        let mut state = vec![vec![0.; heads.v]; heads.k];
        for t in 0..q.len() {
            let (q, k) = (&q[t][shared..shared + heads.k], &k[t][shared..shared + heads.k]);
            for (i, row) in state.iter_mut().enumerate() {
                row.iter_mut().for_each(|s| *s *= decay(t, h, i).exp());
            }
            for j in 0..heads.v {
                let found: f64 = (0..heads.k).map(|i| state[i][j] * k[i]).sum();
                let written = beta(t, h) * (v[t][h * heads.v + j] - found);
                for i in 0..heads.k {
                    state[i][j] += k[i] * written;
                    out[t][h * heads.v + j] += scale * q[i] * state[i][j];
                }
            }
        }
    }
    out
}

/// q, k and v behind their convolutions and `act`.
fn project(
    config: &Value,
    params: &Params,
    prefix: &str,
    xs: &Sequence,
    qk: fn(f64) -> f64,
) -> [Sequence; 3] {
    [("q", qk), ("k", qk), ("v", silu)].map(|(name, act)| {
        let ys = linear(params, &format!("{prefix}.{name}_proj"), xs);
        match flag(config, "use_short_conv", true) {
            true => short_conv(params, &format!("{prefix}.{name}_conv1d"), &ys, act),
            false => ys.iter().map(|y| y.iter().map(|y| act(*y)).collect()).collect(),
        }
    })
}

pub fn by_head(xs: &Sequence, width: usize, map: impl Fn(&[f64]) -> Vec<f64>) -> Sequence {
    xs.iter().map(|x| x.chunks(width).flat_map(&map).collect()).collect()
}

pub fn l2_norm(x: &[f64], eps: f64) -> Vec<f64> {
    let norm = (x.iter().map(|x| x * x).sum::<f64>() + eps).sqrt();
    x.iter().map(|x| x / norm).collect()
}

/// A gate and the function on it.
type Gate = (Sequence, fn(f64) -> f64);

/// The norm of each head and, with one, its gate; then the last projection.
fn output(
    config: &Value,
    params: &Params,
    prefix: &str,
    width: usize,
    out: &Sequence,
    gate: Option<Gate>,
) -> Sequence {
    let weight = vector(params, &format!("{prefix}.o_norm.weight"));
    let mut ys = by_head(out, width, |x| rms_norm(x, Some(weight), number(config, "norm_eps", 1e-5)));
    if let Some((gate, act)) = gate {
        ys.iter_mut().flatten().zip(gate.iter().flatten()).for_each(|(y, gate)| *y *= act(*gate));
    }
    linear(params, &format!("{prefix}.o_proj"), &ys)
}

pub fn delta_net(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let (hidden, count) = (number(config, "hidden_size", 0.), number(config, "num_heads", 0.));
    let width = |name| (hidden * number(config, name, 1.) / count) as usize;
    let count = count as usize;
    let heads = Heads { count, values: count, k: width("expand_k"), v: width("expand_v") };
    let act: fn(f64) -> f64 = match config["qk_activation"].as_str().unwrap_or("silu") {
        "silu" => silu,
        "relu" => |x| x.max(0.),
        "elu" => |x| if x < 0. { x.exp() } else { x + 1. },
        _ => |x| x,
    };
    let [q, k, v] = project(config, params, prefix, xs, act);
    let norm = |x: &[f64]| match config["qk_norm"].as_str() {
        Some("sum") => {
            let sum = x.iter().map(|x| x.abs()).sum::<f64>().max(1e-6);
            x.iter().map(|x| x / sum).collect()
        }
        _ => l2_norm(x, 1e-6),
    };
    let [q, k] = [q, k].map(|x| by_head(&x, heads.k, norm));
    let most = if flag(config, "allow_neg_eigval", false) { 2. } else { 1. };
    let betas = flag(config, "use_beta", true).then(|| linear(params, &format!("{prefix}.b_proj"), xs));
    let beta = |t: usize, h: usize| most * betas.as_ref().map_or(1., |betas| sigmoid(betas[t][h]));
    let out = attend(&heads, [&q, &k, &v], |_, _, _| 0., beta);
    let gated = flag(config, "use_gate", false);
    let gate = gated.then(|| (linear(params, &format!("{prefix}.g_proj"), xs), silu as fn(f64) -> f64));
    output(config, params, prefix, heads.v, &out, gate)
}

fn gated_heads(config: &Value, expand_v: f64) -> Heads {
    let size = |name: &str, default| number(config, name, default);
    let (count, k) = (size("num_heads", 0.), size("head_dim", 0.));
    Heads {
        count: count as usize,
        values: size("num_v_heads", count) as usize,
        k: k as usize,
        v: (k * size("expand_v", expand_v)).round() as usize,
    }
}

pub fn gated_delta_net(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let heads = gated_heads(config, 2.);
    let [q, k, v] = project(config, params, prefix, xs, silu);
    let [q, k] = [q, k].map(|x| by_head(&x, heads.k, |x| l2_norm(x, 1e-6)));
    let a = linear(params, &format!("{prefix}.a_proj"), xs);
    let parameter = |name: &str| vector(params, &format!("{prefix}.{name}"));
    let (rate, offset) = (parameter("A_log"), parameter("dt_bias"));
    let decay = |t: usize, h: usize, _| -rate[h].exp() * (a[t][h] + offset[h]).exp().ln_1p();
    let betas = linear(params, &format!("{prefix}.b_proj"), xs);
    let most = if flag(config, "allow_neg_eigval", false) { 2. } else { 1. };
    let out = attend(&heads, [&q, &k, &v], decay, |t, h| most * sigmoid(betas[t][h]));
    let act = match config["output_gate_activation"].as_str() {
        Some("sigmoid") => sigmoid,
        _ => silu,
    };
    let gated = flag(config, "use_gate", true);
    let gate = gated.then(|| (linear(params, &format!("{prefix}.g_proj"), xs), act as fn(f64) -> f64));
    output(config, params, prefix, heads.v, &out, gate)
}

pub fn kimi_delta_attention(config: &Value, params: &Params, prefix: &str, xs: &Sequence) -> Sequence {
    let heads = gated_heads(config, 1.);
    let [q, k, v] = project(config, params, prefix, xs, silu);
    let [q, k] = [q, k].map(|x| by_head(&x, heads.k, |x| l2_norm(x, 1e-6)));
    let low_rank = |name: &str| {
        let inner = linear(params, &format!("{prefix}.{name}.0"), xs);
        linear(params, &format!("{prefix}.{name}.1"), &inner)
    };
    let f = low_rank("f_proj");
    let parameter = |name: &str| vector(params, &format!("{prefix}.{name}"));
    let (rate, offset) = (parameter("A_log"), parameter("dt_bias"));
    let decay = |t: usize, h: usize, i: usize| {
        let x = f[t][h * heads.k + i] + offset[h * heads.k + i];
        match config["lower_bound"].as_f64() {
            Some(bound) => bound * sigmoid(rate[h].exp() * x),
            None => -rate[h].exp() * x.exp().ln_1p(),
        }
    };
    let betas = linear(params, &format!("{prefix}.b_proj"), xs);
    let most = if flag(config, "allow_neg_eigval", false) { 2. } else { 1. };
    let out = attend(&heads, [&q, &k, &v], decay, |t, h| most * sigmoid(betas[t][h]));
    output(config, params, prefix, heads.v, &out, Some((low_rank("g_proj"), sigmoid)))
}
