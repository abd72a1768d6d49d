//! The models that mix linear and softmax attention.

use super::delta::{self, Heads, by_head, l2_norm};
use super::*;
use crate::scalar::transformers_activation;

/// Everything between the embeddings and the head.
pub fn blocks(config: &Value, params: &Params, model: &str, ids: &[u32]) -> Sequence {
    let mut xs: Sequence =
        ids.iter().map(|id| row(params, &format!("{model}.embed_tokens"), *id as usize)).collect();
    let types = config["layer_types"].as_array().expect("layer_types");
    for (layer, kind) in types.iter().enumerate() {
        let block = Block { config, params, prefix: format!("{model}.layers.{layer}"), layer };
        xs = match config["model_type"].as_str() {
            Some("minimax") => block.minimax(&xs, kind == "full_attention"),
            Some("olmo_hybrid") => block.olmo(&xs, kind == "full_attention"),
            Some("kimi_linear") => block.kimi(&xs, kind == "full_attention"),
            _ => block.qwen(&xs, kind == "full_attention"),
        };
    }
    let last = Block { config, params, prefix: model.into(), layer: 0 };
    last.norm("norm", &xs)
}

struct Block<'a> {
    config: &'a Value,
    params: &'a Params,
    prefix: String,
    layer: usize,
}

/// Softmax attention: heads, key-value heads, widths of keys and of values.
struct Shape {
    heads: usize,
    kv_heads: usize,
    k: usize,
    v: usize,
}

fn attend(shape: &Shape, [q, k, v]: [&Sequence; 3]) -> Sequence {
    let &Shape { heads, kv_heads, k: width, v: v_width } = shape;
    let mut out = vec![vec![0.; heads * v_width]; q.len()];
    for t in 0..q.len() {
        for h in 0..heads {
            let shared = h / (heads / kv_heads);
            let score = |s: usize| {
                let dot: f64 = (0..width).map(|i| q[t][h * width + i] * k[s][shared * width + i]).sum();
                dot / (width as f64).sqrt()
            };
            let weights: Vec<f64> = (0..=t).map(|s| score(s).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (s, weight) in weights.iter().enumerate() {
                for j in 0..v_width {
                    out[t][h * v_width + j] += weight / sum * v[s][shared * v_width + j];
                }
            }
        }
    }
    out
}

fn multiplied(xs: &Sequence, ys: &Sequence, f: impl Fn(f64) -> f64) -> Sequence {
    xs.iter().zip(ys).map(|(x, y)| x.iter().zip(y).map(|(x, y)| x * f(*y)).collect()).collect()
}

fn part(xs: &Sequence, start: usize, len: usize) -> Sequence {
    xs.iter().map(|x| x[start..start + len].to_vec()).collect()
}

impl Block<'_> {
    fn size(&self, name: &str) -> usize {
        number(self.config, name, f64::NAN) as usize
    }

    fn linear(&self, name: &str, xs: &Sequence) -> Sequence {
        linear(self.params, &format!("{}.{name}", self.prefix), xs)
    }

    fn vector(&self, name: &str) -> &[f64] {
        vector(self.params, &format!("{}.{name}", self.prefix))
    }

    fn has(&self, name: &str) -> bool {
        self.params.contains_key(&format!("{}.{name}", self.prefix))
    }

    /// Of each part of `width` channels; Qwen's weights are stored as their difference from 1.
    fn norm_of(&self, name: &str, xs: &Sequence, width: usize, eps: f64, zero_centered: bool) -> Sequence {
        let shift = if zero_centered { 1. } else { 0. };
        let weight: Vec<f64> = self.vector(&format!("{name}.weight")).iter().map(|w| w + shift).collect();
        by_head(xs, width, |x| rms_norm(x, Some(&weight), eps))
    }

    fn norm(&self, name: &str, xs: &Sequence) -> Sequence {
        let qwen = self.config["model_type"].as_str().is_some_and(|name| name.starts_with("qwen"));
        self.norm_of(name, xs, xs[0].len(), number(self.config, "rms_norm_eps", f64::NAN), qwen)
    }

    fn act(&self, x: f64) -> f64 {
        transformers_activation(self.config["hidden_act"].as_str().expect("hidden_act"), x)
    }

    fn mlp(&self, name: &str, [gate, up, down]: [&str; 3], xs: &Sequence) -> Sequence {
        let [gate, up] = [gate, up].map(|part| self.linear(&format!("{name}.{part}"), xs));
        self.linear(&format!("{name}.{down}"), &multiplied(&up, &gate, |gate| self.act(gate)))
    }

    fn dense(&self, name: &str, xs: &Sequence) -> Sequence {
        self.mlp(name, ["gate_proj", "up_proj", "down_proj"], xs)
    }

    /// Half-split rotation of the first channels of each head.
    fn rotate(&self, xs: &Sequence, width: usize, default_theta: f64, default_part: f64) -> Sequence {
        let rope = &self.config["rope_parameters"];
        let theta = number(rope, "rope_theta", number(self.config, "rope_theta", default_theta));
        let part =
            number(rope, "partial_rotary_factor", number(self.config, "partial_rotary_factor", default_part));
        let factor = if rope["rope_type"] == "linear" { number(rope, "factor", 1.) } else { 1. };
        let half = (width as f64 * part) as usize / 2;
        let turned = |(t, x): (usize, &Vec<f64>)| {
            let mut y = x.clone();
            for head in (0..x.len()).step_by(width) {
                for i in 0..half {
                    let angle = t as f64 / factor / theta.powf(i as f64 / half as f64);
                    let (a, b) = (x[head + i], x[head + i + half]);
                    y[head + i] = a * angle.cos() - b * angle.sin();
                    y[head + i + half] = b * angle.cos() + a * angle.sin();
                }
            }
            y
        };
        xs.iter().enumerate().map(turned).collect()
    }

    fn softmax_shape(&self) -> Shape {
        let heads = self.size("num_attention_heads");
        let usual = (self.size("hidden_size") / heads) as f64;
        let width = number(self.config, "head_dim", usual) as usize;
        let kv_heads = number(self.config, "num_key_value_heads", heads as f64) as usize;
        Shape { heads, kv_heads, k: width, v: width }
    }

    /// Attention without norms.
    fn plain_attention(&self, xs: &Sequence) -> Sequence {
        let shape = self.softmax_shape();
        let [q, k, v] = ["q", "k", "v"].map(|name| self.linear(&format!("self_attn.{name}_proj"), xs));
        let [q, k] = [q, k].map(|x| self.rotate(&x, shape.k, 1e6, 1.));
        self.linear("self_attn.o_proj", &attend(&shape, [&q, &k, &v]))
    }

    fn qwen(&self, xs: &Sequence, full: bool) -> Sequence {
        let ys = self.norm("input_layernorm", xs);
        let xs = add(xs, &if full { self.qwen_attention(&ys) } else { self.qwen_delta(&ys) });
        let ys = self.norm("post_attention_layernorm", &xs);
        if !self.has("mlp.gate.weight") {
            return add(&xs, &self.dense("mlp", &ys));
        }
        let scores = |logits: &[f64]| {
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            logits.iter().map(|l| l.exp() / sum).collect()
        };
        let top = self.size("num_experts_per_tok");
        let normalize = flag(self.config, "norm_topk_prob", true);
        let proj = ["gate_proj", "up_proj", "down_proj"];
        let routed = self.experts("mlp", proj, &ys, (scores, None), (top, normalize, 1.));
        let shared = self.dense("mlp.shared_expert", &ys);
        let gate = self.linear("mlp.shared_expert_gate", &ys);
        let shared: Sequence = shared
            .iter()
            .zip(&gate)
            .map(|(y, gate)| y.iter().map(|y| y * sigmoid(gate[0])).collect())
            .collect();
        add(&xs, &add(&routed, &shared))
    }

    fn qwen_attention(&self, xs: &Sequence) -> Sequence {
        let shape = self.softmax_shape();
        let (both, width) = (self.linear("self_attn.q_proj", xs), shape.k);
        let half = |start| -> Sequence {
            let of = |x: &Vec<f64>| {
                x.chunks(2 * width).flat_map(|head| head[start..start + width].to_vec()).collect()
            };
            both.iter().map(of).collect()
        };
        let eps = number(self.config, "rms_norm_eps", f64::NAN);
        let made = |x: &Sequence, name: &str| {
            self.rotate(
                &self.norm_of(&format!("self_attn.{name}_norm"), x, width, eps, true),
                width,
                1e4,
                0.25,
            )
        };
        let q = made(&half(0), "q");
        let k = made(&self.linear("self_attn.k_proj", xs), "k");
        let v = self.linear("self_attn.v_proj", xs);
        let out = attend(&shape, [&q, &k, &v]);
        self.linear("self_attn.o_proj", &multiplied(&out, &half(width), sigmoid))
    }

    fn qwen_delta(&self, xs: &Sequence) -> Sequence {
        let heads = Heads {
            count: self.size("linear_num_key_heads"),
            values: self.size("linear_num_value_heads"),
            k: self.size("linear_key_head_dim"),
            v: self.size("linear_value_head_dim"),
        };
        let (keys, values) = (heads.count * heads.k, heads.values * heads.v);
        let [qkv, z, b, a] = if self.has("linear_attn.in_proj_ba.weight") {
            let group = heads.values / heads.count;
            let qkvz = self.linear("linear_attn.in_proj_qkvz", xs);
            let ba = self.linear("linear_attn.in_proj_ba", xs);
            let of = |xs: &Sequence, ends: &[usize], i: usize| -> Sequence {
                let head = |x: &[f64]| x[ends[i]..ends[i + 1]].to_vec();
                xs.iter().map(|x| x.chunks(ends[ends.len() - 1]).flat_map(head).collect()).collect()
            };
            let (k, v) = (heads.k, group * heads.v);
            let ends = [0, k, 2 * k, 2 * k + v, 2 * k + 2 * v];
            let qkv = (0..xs.len())
                .map(|t| (0..3).flat_map(|i| of(&qkvz, &ends, i)[t].clone()).collect())
                .collect();
            [qkv, of(&qkvz, &ends, 3), of(&ba, &[0, group, 2 * group], 0), of(&ba, &[0, group, 2 * group], 1)]
        } else {
            ["qkv", "z", "b", "a"].map(|name| self.linear(&format!("linear_attn.in_proj_{name}"), xs))
        };
        let qkv =
            short_conv(self.params, &format!("{}.linear_attn.conv1d", self.prefix), &qkv, |x| self.act(x));
        let [q, k] = [0, keys].map(|start| by_head(&part(&qkv, start, keys), heads.k, |x| l2_norm(x, 1e-6)));
        let v = part(&qkv, 2 * keys, values);
        let (rate, offset) = (self.vector("linear_attn.A_log"), self.vector("linear_attn.dt_bias"));
        let decay = |t: usize, h: usize, _| -rate[h].exp() * (a[t][h] + offset[h]).exp().ln_1p();
        let out = delta::attend(&heads, [&q, &k, &v], decay, |t, h| sigmoid(b[t][h]));
        let eps = number(self.config, "rms_norm_eps", f64::NAN);
        let out = self.norm_of("linear_attn.norm", &out, heads.v, eps, false);
        self.linear("linear_attn.out_proj", &multiplied(&out, &z, silu))
    }

    /// Every expert on every token, most of them times 0.
    fn experts(
        &self,
        name: &str,
        proj: [&str; 3],
        xs: &Sequence,
        (scores, bias): (impl Fn(&[f64]) -> Vec<f64>, Option<&[f64]>),
        (top, normalize, scale): (usize, bool, f64),
    ) -> Sequence {
        let logits = self.linear(&format!("{name}.gate"), xs);
        let count = logits[0].len();
        let groups = number(self.config, "num_expert_group", 1.) as usize;
        let top_groups = number(self.config, "topk_group", 1.) as usize;
        let weights: Vec<Vec<f64>> = logits
            .iter()
            .map(|logits| {
                let scores = scores(logits);
                let rank = |e: usize| scores[e] + bias.map_or(0., |bias| bias[e]);
                let size = count / groups;
                let strength = |group: usize| {
                    let mut ranks: Vec<f64> = (group * size..(group + 1) * size).map(rank).collect();
                    ranks.sort_by(|a, b| b.total_cmp(a));
                    ranks.iter().take(2).sum::<f64>()
                };
                let mut order: Vec<usize> = (0..groups).collect();
                order.sort_by(|a, b| strength(*b).total_cmp(&strength(*a)));
                let allowed = &order[..top_groups];
                let mut chosen: Vec<usize> = (0..count).filter(|e| allowed.contains(&(e / size))).collect();
                chosen.sort_by(|a, b| rank(*b).total_cmp(&rank(*a)));
                chosen.truncate(top);
                let sum: f64 = if normalize { chosen.iter().map(|e| scores[*e]).sum() } else { 1. };
                (0..count).map(|e| if chosen.contains(&e) { scale * scores[e] / sum } else { 0. }).collect()
            })
            .collect();
        let mut out = vec![vec![0.; xs[0].len()]; xs.len()];
        for e in 0..count {
            let ys = self.mlp(&format!("{name}.experts.{e}"), proj, xs);
            for (out, (y, weights)) in out.iter_mut().zip(ys.iter().zip(&weights)) {
                out.iter_mut().zip(y).for_each(|(o, y)| *o += weights[e] * y);
            }
        }
        out
    }

    fn minimax(&self, xs: &Sequence, full: bool) -> Sequence {
        let join = |xs: &Sequence, ys: &Sequence, of: &str| -> Sequence {
            let factor = |name: &str| number(self.config, &format!("{of}_{name}_factor"), 1.);
            let sum = |(x, y): (&f64, &f64)| x * factor("alpha") + y * factor("beta");
            xs.iter().zip(ys).map(|(x, y)| x.iter().zip(y).map(sum).collect()).collect()
        };
        let xs = self.norm("input_layernorm", xs);
        let (ys, of) = if full {
            (self.plain_attention(&xs), "full_attn")
        } else {
            (self.lightning(&xs), "linear_attn")
        };
        let xs = self.norm("post_attention_layernorm", &join(&xs, &ys, of));
        let scores = |logits: &[f64]| logits.iter().map(|l| l.exp()).collect();
        let top = self.size("num_experts_per_tok");
        let ys = self.experts("block_sparse_moe", ["w1", "w3", "w2"], &xs, (scores, None), (top, true, 1.));
        join(&xs, &ys, "mlp")
    }

    fn lightning(&self, xs: &Sequence) -> Sequence {
        let Shape { heads, k: width, .. } = self.softmax_shape();
        let qkv: Sequence = self
            .linear("self_attn.qkv_proj", xs)
            .iter()
            .map(|x| x.iter().map(|x| self.act(*x)).collect())
            .collect();
        let layers = self.size("num_hidden_layers") as f64;
        let depth = 1. - self.layer as f64 / (layers - 1. + 1e-5) + 1e-5;
        let mut out = vec![vec![0.; heads * width]; xs.len()];
        for h in 0..heads {
            let keep = (-(2f64.powf(-8. / heads as f64)).powi(h as i32 + 1) * depth).exp();
            let mut state = vec![vec![0.; width]; width];
            for t in 0..xs.len() {
                let [q, k, v] = [0, 1, 2].map(|i| &qkv[t][(3 * h + i) * width..][..width]);
                for i in 0..width {
                    for j in 0..width {
                        state[i][j] = keep * state[i][j] + k[i] * v[j];
                        out[t][h * width + j] += q[i] * state[i][j];
                    }
                }
            }
        }
        let out = self.norm_of("self_attn.norm", &out, heads * width, 1e-6, false);
        let gate = self.linear("self_attn.output_gate", xs);
        self.linear("self_attn.out_proj", &multiplied(&out, &gate, sigmoid))
    }

    fn olmo(&self, xs: &Sequence, full: bool) -> Sequence {
        if !full {
            let ys = self.norm("attention_layer_norm", xs);
            let xs = add(xs, &self.olmo_delta(&ys));
            return add(&xs, &self.dense("mlp", &self.norm("feedforward_layer_norm", &xs)));
        }
        let shape = self.softmax_shape();
        let eps = number(self.config, "rms_norm_eps", f64::NAN);
        let [q, k] = ["q", "k"].map(|name| {
            let x = self.linear(&format!("self_attn.{name}_proj"), xs);
            let x = self.norm_of(&format!("self_attn.{name}_norm"), &x, x[0].len(), eps, false);
            let none = self.config["rope_parameters"].get("rope_theta").is_some_and(Value::is_null);
            if none { x } else { self.rotate(&x, shape.k, 1e4, 1.) }
        });
        let v = self.linear("self_attn.v_proj", xs);
        let ys = self.linear("self_attn.o_proj", &attend(&shape, [&q, &k, &v]));
        let xs = add(xs, &self.norm("post_attention_layernorm", &ys));
        add(&xs, &self.norm("post_feedforward_layernorm", &self.dense("mlp", &xs)))
    }

    fn olmo_delta(&self, xs: &Sequence) -> Sequence {
        let heads = self.size("num_attention_heads") as f64;
        let keys = number(self.config, "linear_num_key_heads", heads);
        let width = number(
            self.config,
            "linear_key_head_dim",
            (0.75 * self.size("hidden_size") as f64 / keys).floor(),
        );
        let config = serde_json::json!({
            "num_heads": keys,
            "num_v_heads": number(self.config, "linear_num_value_heads", heads),
            "head_dim": width,
            "expand_v": number(self.config, "linear_value_head_dim", 2. * width) / width,
            "allow_neg_eigval": flag(self.config, "linear_allow_neg_eigval", true),
        });
        delta::gated_delta_net(&config, self.params, &format!("{}.linear_attn", self.prefix), xs)
    }

    fn kimi(&self, xs: &Sequence, full: bool) -> Sequence {
        let ys = self.norm("input_layernorm", xs);
        let xs = add(xs, &if full { self.latent(&ys) } else { self.kimi_delta(&ys) });
        let ys = self.norm("post_attention_layernorm", &xs);
        if !self.has("block_sparse_moe.gate.weight") {
            return add(&xs, &self.dense("mlp", &ys));
        }
        let softmax = self.config["moe_router_activation_func"] == "softmax";
        let scores = move |logits: &[f64]| {
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            logits.iter().map(|l| if softmax { l.exp() / sum } else { sigmoid(*l) }).collect()
        };
        let bias = self.vector("block_sparse_moe.gate.e_score_correction_bias");
        let top = self.size("num_experts_per_token");
        let scale = number(self.config, "routed_scaling_factor", 2.446);
        let how = (top, flag(self.config, "moe_renormalize", true), scale);
        let mut routed = self.experts("block_sparse_moe", ["w1", "w3", "w2"], &ys, (scores, Some(bias)), how);
        if self.has("block_sparse_moe.shared_experts.up_proj.weight") {
            routed = add(&routed, &self.dense("block_sparse_moe.shared_experts", &ys));
        }
        add(&xs, &routed)
    }

    fn latent(&self, xs: &Sequence) -> Sequence {
        let (heads, rank) = (self.size("num_attention_heads"), self.size("kv_lora_rank"));
        let [nope, rope, v_width] =
            ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"].map(|name| self.size(name));
        let latent_norm = |name: &str, x: &Sequence| self.norm_of(name, x, x[0].len(), 1e-6, false);
        let q = if self.has("self_attn.q_proj.weight") {
            self.linear("self_attn.q_proj", xs)
        } else {
            let down = self.linear("self_attn.q_a_proj", xs);
            self.linear("self_attn.q_b_proj", &latent_norm("self_attn.q_a_layernorm", &down))
        };
        let latent = self.linear("self_attn.kv_a_proj_with_mqa", xs);
        let own = latent_norm("self_attn.kv_a_layernorm", &part(&latent, 0, rank));
        let own = self.linear("self_attn.kv_b_proj", &own);
        let key = |(own, latent): (&Vec<f64>, &Vec<f64>)| {
            let head = |own: &[f64]| own[..nope].iter().chain(&latent[rank..]).copied().collect::<Vec<_>>();
            own.chunks(nope + v_width).flat_map(head).collect()
        };
        let k: Sequence = own.iter().zip(&latent).map(key).collect();
        let v: Sequence = own
            .iter()
            .map(|x| x.chunks(nope + v_width).flat_map(|head| head[nope..].to_vec()).collect())
            .collect();
        let shape = Shape { heads, kv_heads: heads, k: nope + rope, v: v_width };
        self.linear("self_attn.o_proj", &attend(&shape, [&q, &k, &v]))
    }

    fn kimi_delta(&self, xs: &Sequence) -> Sequence {
        let within = &self.config["linear_attn_config"];
        let size =
            |inner: &str, name: &str| number(within, inner, number(self.config, name, f64::NAN)) as usize;
        let count = size("num_heads", "linear_num_heads");
        let width = size("head_dim", "linear_head_dim");
        let heads = Heads { count, values: count, k: width, v: width };
        let [q, k, v] = ["q", "k", "v"].map(|name| {
            let ys = self.linear(&format!("self_attn.{name}_proj"), xs);
            short_conv(self.params, &format!("{}.self_attn.{name}_conv1d", self.prefix), &ys, silu)
        });
        let [q, k] = [q, k].map(|x| by_head(&x, width, |x| l2_norm(x, 1e-6)));
        let low_rank = |name: &str| {
            self.linear(
                &format!("self_attn.{name}_b_proj"),
                &self.linear(&format!("self_attn.{name}_a_proj"), xs),
            )
        };
        let f = low_rank("f");
        let (rate, offset) = (self.vector("self_attn.A_log"), self.vector("self_attn.dt_bias"));
        let decay = |t: usize, h: usize, i: usize| {
            -rate[h].exp() * (f[t][h * width + i] + offset[h * width + i]).exp().ln_1p()
        };
        let betas = self.linear("self_attn.b_proj", xs);
        let out = delta::attend(&heads, [&q, &k, &v], decay, |t, h| sigmoid(betas[t][h]));
        let eps = number(self.config, "rms_norm_eps", f64::NAN);
        let out = self.norm_of("self_attn.o_norm", &out, width, eps, false);
        self.linear("self_attn.o_proj", &multiplied(&out, &low_rank("g"), sigmoid))
    }
}
