//! What layers can do beyond what the models' configurations ask of them.

use crate::reference;
use crate::scalar;
use crate::support::*;
use candle_core::{DType, Result, Tensor};
use candle_linear_attn::Mode;
use candle_linear_attn::nn::*;
use candle_nn::{VarBuilder, VarMap};
use serde_json::{Value, json};

const HIDDEN: usize = 8;
const TOKENS: usize = 7;

type Forward<'a> = &'a dyn Fn(&Tensor, Option<&mut LayerCache>) -> Result<Tensor>;
type Reference = fn(&Value, &reference::Params, &str, &reference::Sequence) -> reference::Sequence;

/// Parameters that differ from one another, so that none can stand in for another.
fn vary(varmap: &VarMap) -> Result<()> {
    for (i, (_, var)) in sorted(varmap).iter().enumerate() {
        var.set(&(pseudo_random(var.dims(), 100 + i as u64)? * 0.5)?)?;
    }
    Ok(())
}

fn fresh(varmap: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(varmap, DType::F32, &CPU).pp("layer")
}

/// Output, output in pieces, and that the input and every parameter have a gradient, the latter the central difference.
fn check(what: &str, forward: Forward, varmap: &VarMap, config: &Value, reference: Reference) -> Result<()> {
    vary(varmap)?;
    let xs = candle_core::Var::from_tensor(&pseudo_random(&[1, TOKENS, HIDDEN], 5)?)?;
    let vars = sorted(varmap);
    let params = reference::params(vars.iter().map(|(name, var)| (name.clone(), var.as_tensor())))?;
    let rows = xs.squeeze(0)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let expected = Tensor::new(reference(config, &params, "layer", &rows), &CPU)?.unsqueeze(0)?;
    let ys = forward(&xs, None)?;
    assert_close(what, &ys, &expected, 1e-5)?;

    let mut cache = LayerCache::new();
    let mut pieces = Vec::new();
    for (start, len) in [(0, 1), (1, 3), (4, 3)] {
        pieces.push(forward(&xs.narrow(1, start, len)?, Some(&mut cache))?);
    }
    assert_eq!(cache.tokens(), TOKENS);
    assert!(cache.bytes() > 0);
    assert_close(what, &Tensor::cat(&pieces, 1)?, &expected, 1e-5)?;

    let gradients = ys.sqr()?.sum_all()?.backward()?;
    let all = vars.iter().map(|(name, var)| (name.as_str(), var)).chain([("input", &xs)]);
    let mut params = params;
    let loss = |params: &reference::Params| -> Result<f64> {
        Ok(reference(config, params, "layer", &rows).iter().flatten().map(|y| y * y).sum())
    };
    for (name, var) in all {
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("{what}: {name} has no gradient"));
        let size = gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
        assert!(size.is_finite() && size > 0., "{what}: gradient of {name} is {size}");
        let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
        for at in [0, gradient.len() / 2, gradient.len() - 1].into_iter().filter(|_| name != "input") {
            let expected = reference::central_difference(&mut params, name, at, &loss)?;
            let error = (gradient[at] as f64 - expected).abs();
            let size = size.sqrt() as f64;
            assert!(
                error < 1e-4 * size,
                "{what}: gradient of {name} at {at}: {} for {expected}",
                gradient[at]
            );
        }
    }
    Ok(())
}

#[test]
fn linear_attention_without_an_output_norm() -> Result<()> {
    let varmap = VarMap::new();
    let config =
        LinearAttentionConfig { hidden_size: HIDDEN, num_heads: 2, output_norm: false, ..Default::default() };
    let layer = LinearAttention::new(&config, fresh(&varmap))?;
    let json = json!({ "hidden_size": HIDDEN, "num_heads": 2, "feature_map": "elementwise_product",
        "output_norm": "identity" });
    check("no norm", &|xs, cache| layer.forward(xs, cache), &varmap, &json, reference::linear_attention)
}

#[test]
fn gated_linear_attention_with_every_gate_function() -> Result<()> {
    for gate_fn in ["relu", "sigmoid", "logsigmoid", "silu", "sqrelu", "gelu"] {
        let varmap = VarMap::new();
        let config = GatedLinearAttentionConfig {
            hidden_size: HIDDEN,
            num_heads: 2,
            use_short_conv: true,
            conv_size: 3,
            conv_bias: true,
            gate_fn: Activation::from_fla(gate_fn)?,
            gate_logit_normalizer: 4.,
            gate_low_rank_dim: 3,
            fuse_norm: false,
            ..Default::default()
        };
        let layer = GatedLinearAttention::new(&config, fresh(&varmap))?;
        let json = json!({ "hidden_size": HIDDEN, "num_heads": 2, "use_short_conv": true, "gate_fn": gate_fn,
            "gate_logit_normalizer": 4, "fuse_norm": false });
        check(
            gate_fn,
            &|xs, cache| layer.forward(xs, cache),
            &varmap,
            &json,
            reference::gated_linear_attention,
        )?;
    }
    Ok(())
}

#[test]
fn retention_with_short_convolutions_and_every_gate_function() -> Result<()> {
    let names = ["gelu", "gelu_new", "linear", "mish", "quick_gelu", "relu", "relu2", "sigmoid", "tanh"];
    for gate_fn in names {
        let varmap = VarMap::new();
        let config = MultiScaleRetentionConfig {
            hidden_size: HIDDEN,
            num_heads: 2,
            num_kv_heads: Some(1),
            use_short_conv: true,
            conv_bias: true,
            gate_fn: Activation::from_transformers(gate_fn)?,
            ..Default::default()
        };
        let mut layer = MultiScaleRetention::new(&config, fresh(&varmap))?;
        layer.set_mode(Mode::Chunk);
        let json = json!({ "hidden_size": HIDDEN, "num_heads": 2, "num_kv_heads": 1, "use_short_conv": true,
            "gate_fn": gate_fn });
        check(
            gate_fn,
            &|xs, cache| layer.forward(xs, cache),
            &varmap,
            &json,
            reference::multi_scale_retention,
        )?;
    }
    Ok(())
}

#[test]
fn layers_of_the_delta_rules_with_biases_in_their_convolutions() -> Result<()> {
    let varmap = VarMap::new();
    let config = DeltaNetConfig { hidden_size: HIDDEN, num_heads: 2, conv_bias: true, ..Default::default() };
    let layer = DeltaNet::new(&config, fresh(&varmap))?;
    let json = json!({ "hidden_size": HIDDEN, "num_heads": 2 });
    check("delta_net", &|xs, cache| layer.forward(xs, cache), &varmap, &json, reference::delta_net)?;

    let json =
        json!({ "hidden_size": HIDDEN, "num_heads": 1, "num_v_heads": 2, "head_dim": 3, "expand_v": 2 });
    let varmap = VarMap::new();
    let config = GatedDeltaNetConfig {
        hidden_size: HIDDEN,
        num_heads: 1,
        num_v_heads: Some(2),
        head_dim: 3,
        conv_bias: true,
        conv_size: 8,
        ..Default::default()
    };
    let layer = GatedDeltaNet::new(&config, fresh(&varmap))?;
    check("gated", &|xs, cache| layer.forward(xs, cache), &varmap, &json, reference::gated_delta_net)?;

    let varmap = VarMap::new();
    let config = KimiDeltaAttentionConfig {
        hidden_size: HIDDEN,
        num_heads: 1,
        num_v_heads: Some(2),
        head_dim: 3,
        expand_v: 2.,
        conv_bias: true,
        ..Default::default()
    };
    let layer = KimiDeltaAttention::new(&config, fresh(&varmap))?;
    check("kda", &|xs, cache| layer.forward(xs, cache), &varmap, &json, reference::kimi_delta_attention)
}

#[test]
fn hgrn2_with_a_bias_and_an_epsilon_of_its_own() -> Result<()> {
    let varmap = VarMap::new();
    let config = Hgrn2AttentionConfig {
        hidden_size: HIDDEN,
        expand_ratio: 3,
        use_short_conv: true,
        conv_bias: true,
        norm_eps: 0.3,
        ..Default::default()
    };
    let layer = Hgrn2Attention::new(&config, None, fresh(&varmap))?;
    let json =
        json!({ "hidden_size": HIDDEN, "expand_ratio": 3, "use_short_conv": true, "output_norm_eps": 0.3 });
    check("hgrn2", &|xs, cache| layer.forward(xs, cache), &varmap, &json, reference::hgrn2_attention)
}

#[test]
fn lower_bounds_grow_from_nothing_to_all_but_the_first_share() -> Result<()> {
    let varmap = VarMap::new();
    let bounds = LowerBounds::new(3, 2, &fresh(&varmap))?;
    assert!(bounds.of(0)?.is_none());
    for layer in 1..3 {
        let expected = Tensor::full(layer as f32 / 3., 2, &CPU)?;
        assert_close("bound", &bounds.of(layer)?.expect("a bound"), &expected, 1e-6)?;
    }
    Ok(())
}

#[test]
fn mamba2_with_a_short_convolution_of_every_width() -> Result<()> {
    for conv_kernel in [1, 2, 3, 8] {
        let varmap = VarMap::new();
        let config = Mamba2Config {
            hidden_size: HIDDEN,
            head_dim: 4,
            state_size: 3,
            conv_kernel,
            conv_init: Some(0.5),
            ..Default::default()
        };
        let layer = Mamba2::new(&config, fresh(&varmap))?;
        let json = json!({ "hidden_size": HIDDEN, "head_dim": 4, "state_size": 3 });
        check("mamba2", &|xs, cache| layer.forward(xs, cache), &varmap, &json, reference::mamba2)?;
    }
    Ok(())
}

#[test]
fn rwkv7_layers_by_themselves() -> Result<()> {
    let json = json!({ "hidden_size": HIDDEN });
    let first_values = candle_core::Var::from_tensor(&pseudo_random(&[1, TOKENS, HIDDEN], 6)?)?;
    for layer in 0..2 {
        let varmap = VarMap::new();
        let config = Rwkv7AttentionConfig {
            hidden_size: HIDDEN,
            head_dim: 4,
            decay_low_rank_dim: 3,
            layer: (layer, 2),
            ..Default::default()
        };
        let attn = Rwkv7Attention::new(&config, fresh(&varmap))?;
        let forward = |xs: &Tensor, cache: Option<&mut LayerCache>| {
            let start = cache.as_deref().map_or(0, LayerCache::tokens);
            let first = first_values.narrow(1, start, xs.dim(1)?)?;
            Ok(attn.forward(xs, Some(&first), cache)?.0)
        };
        let reference: Reference = match layer {
            0 => |config, params, prefix, xs| reference::rwkv7_attention(config, params, prefix, xs, None).0,
            _ => |config, params, prefix, xs| {
                let first =
                    pseudo_random(&[TOKENS, HIDDEN], 6).and_then(|x| x.to_dtype(DType::F64)?.to_vec2());
                reference::rwkv7_attention(config, params, prefix, xs, Some(&first.unwrap())).0
            },
        };
        check("rwkv7", &forward, &varmap, &json, reference)?;
        let xs = pseudo_random(&[1, TOKENS, HIDDEN], 5)?;
        let gradients = forward(&xs, None)?.sum_all()?.backward()?;
        assert_eq!(gradients.get(&first_values).is_some(), layer > 0);
        let alone = attn.forward(&xs, None, None);
        match layer {
            0 => assert_eq!(alone?.1.dims(), [1, TOKENS, HIDDEN]),
            _ => assert_says(&message(alone), &["first_values", "needs them"]),
        }
    }
    let varmap = VarMap::new();
    let config = Rwkv7FeedForwardConfig {
        hidden_size: HIDDEN,
        intermediate_size: 12,
        hidden_act: Activation::SquaredRelu,
        layer: (1, 2),
    };
    let ffn = Rwkv7FeedForward::new(&config, fresh(&varmap))?;
    check("ffn", &|xs, cache| ffn.forward(xs, cache), &varmap, &json, reference::rwkv7_feed_forward)
}

#[test]
fn activations_hold_at_the_edges() -> Result<()> {
    let names = ["relu", "sigmoid", "logsigmoid", "silu", "sqrelu", "gelu"];
    let points = [-200f32, -90., -20., -1e-3, 0., 1e-3, 20., 90., 200.];
    for name in names {
        let xs = candle_core::Var::new(&points, &CPU)?;
        let ys = Activation::from_fla(name)?.forward(&xs)?;
        let gradient = ys.sum_all()?.backward()?;
        let gradient = gradient.get(&xs).expect("a gradient").to_vec1::<f32>()?;
        for ((x, y), slope) in points.iter().zip(ys.to_vec1::<f32>()?).zip(gradient) {
            let at = |x: f64| match name {
                // Where exp(-x) would overflow.
                "logsigmoid" => x.min(0.) - (-x.abs()).exp().ln_1p(),
                _ => scalar::fla_activation(name, x),
            };
            let expected = at(*x as f64);
            assert!((y as f64 - expected).abs() <= 1e-6 * (1. + expected.abs()), "{name}({x}) is {y}");
            let difference = (at(*x as f64 + 1e-6) - at(*x as f64 - 1e-6)) / 2e-6;
            let kink = *x == 0. && name == "relu";
            assert!(
                kink || (slope as f64 - difference).abs() <= 1e-5 * (1. + difference.abs()),
                "{name}'({x}) is {slope}"
            );
        }
    }
    Ok(())
}

#[test]
fn elu_plus_one_keeps_small_features() -> Result<()> {
    let xs = candle_core::Var::new(&[-30f32, -3., 0., 2.], &CPU)?;
    let ys = Activation::EluPlusOne.forward(&xs)?;
    let expected = Tensor::new(&[(-30f64).exp(), (-3f64).exp(), 1., 3.], &CPU)?;
    for i in 0..4 {
        assert_close("elu + 1", &ys.get(i)?.unsqueeze(0)?, &expected.get(i)?.unsqueeze(0)?, 1e-6)?;
    }
    let gradient = ys.sum_all()?.backward()?;
    let gradient = gradient.get(&xs).expect("a gradient").to_vec1::<f32>()?;
    assert_eq!(gradient[2..], [1., 1.]);
    assert!((gradient[1] - (-3f32).exp()).abs() < 1e-7);
    Ok(())
}

/// The cache holds values only: a generation during training must not keep the graphs of all its tokens.
#[test]
fn caches_hold_no_graph() -> Result<()> {
    let varmap = VarMap::new();
    let config = GatedLinearAttentionConfig { hidden_size: HIDDEN, num_heads: 2, ..Default::default() };
    let layer = GatedLinearAttention::new(&config, fresh(&varmap))?;
    let mut cache = LayerCache::new();
    layer.forward(&pseudo_random(&[1, 3, HIDDEN], 1)?, Some(&mut cache))?;
    assert!(!cache.state().expect("a state").kv.track_op());
    Ok(())
}

#[test]
fn inputs_need_not_be_contiguous() -> Result<()> {
    let varmap = VarMap::new();
    let config = GatedLinearAttentionConfig { hidden_size: HIDDEN, num_heads: 2, ..Default::default() };
    let layer = GatedLinearAttention::new(&config, fresh(&varmap))?;
    let xs = pseudo_random(&[HIDDEN, TOKENS, 2], 3)?.transpose(0, 2)?;
    assert_close("transposed", &layer.forward(&xs, None)?, &layer.forward(&xs.contiguous()?, None)?, 1e-6)
}

#[test]
fn wrong_inputs_are_named() -> Result<()> {
    let varmap = VarMap::new();
    let config = GatedLinearAttentionConfig { hidden_size: HIDDEN, num_heads: 2, ..Default::default() };
    let layer = GatedLinearAttention::new(&config, fresh(&varmap))?;
    for dims in [&[1, 3, HIDDEN + 1][..], &[3, HIDDEN], &[1, 0, HIDDEN], &[0, 3, HIDDEN]] {
        let xs = Tensor::zeros(dims, DType::F32, &CPU)?;
        assert_says(&message(layer.forward(&xs, None)), &["xs", &format!("{dims:?}"), "[B, T, 8]"]);
    }
    let mut cache = LayerCache::new();
    layer.forward(&Tensor::zeros((2, 1, HIDDEN), DType::F32, &CPU)?, Some(&mut cache))?;
    let one = Tensor::zeros((1, 1, HIDDEN), DType::F32, &CPU)?;
    assert_says(&message(layer.forward(&one, Some(&mut cache))), &["batch size is 1", "2 sequences"]);
    assert_eq!(cache.tokens(), 1);
    Ok(())
}

#[test]
fn wrong_sizes_are_named() {
    let vb = || fresh(&VarMap::new());
    let gla = |config: GatedLinearAttentionConfig| message(GatedLinearAttention::new(&config, vb()));
    let base = GatedLinearAttentionConfig { hidden_size: HIDDEN, num_heads: 2, ..Default::default() };
    let with = |change: &dyn Fn(&mut GatedLinearAttentionConfig)| {
        let mut config = base.clone();
        change(&mut config);
        gla(config)
    };
    assert_says(&with(&|c| c.num_heads = 0), &["num_heads is 0"]);
    assert_says(&with(&|c| c.num_heads = 3), &["num_heads is 3", "must divide"]);
    assert_says(&with(&|c| c.hidden_size = 0), &["hidden_size is 0"]);
    assert_says(&with(&|c| c.num_kv_heads = Some(0)), &["num_kv_heads is 0"]);
    assert_says(&with(&|c| c.num_kv_heads = Some(4)), &["num_kv_heads is 4", "must divide num_heads"]);
    assert_says(&with(&|c| c.expand_k = 0.3), &["expand_k is 0.3", "whole number"]);
    assert_says(&with(&|c| c.expand_v = f64::NAN), &["expand_v is NaN"]);
    assert_says(&with(&|c| c.gate_low_rank_dim = 0), &["gate_low_rank_dim is 0"]);
    assert_says(&with(&|c| c.gate_logit_normalizer = 0.), &["gate_logit_normalizer is 0"]);
    assert_says(&with(&|c| c.conv_size = 0), &["conv_size is 0"]);
    let gated = |change: &dyn Fn(&mut GatedDeltaNetConfig)| {
        let mut config = GatedDeltaNetConfig { hidden_size: HIDDEN, head_dim: 4, ..Default::default() };
        change(&mut config);
        message(GatedDeltaNet::new(&config, vb()))
    };
    assert_says(&gated(&|c| c.num_v_heads = Some(7)), &["num_v_heads is 7", "multiple of num_heads"]);
    assert_says(&gated(&|c| c.num_v_heads = Some(0)), &["num_v_heads is 0"]);
    assert_says(&gated(&|c| c.head_dim = 0), &["head_dim is 0"]);
    assert_says(&gated(&|c| c.num_heads = usize::MAX), &["num_heads is 18446744073709551615"]);
    assert_says(&gated(&|c| c.expand_v = 0.3), &["expand_v is 0.3", "whole number"]);
    assert_says(&gated(&|c| c.conv_size = 1025), &["conv_size is 1025"]);
    let mamba = |change: &dyn Fn(&mut Mamba2Config)| {
        let mut config =
            Mamba2Config { hidden_size: HIDDEN, head_dim: 4, state_size: 3, ..Default::default() };
        change(&mut config);
        message(Mamba2::new(&config, vb()))
    };
    assert_says(&mamba(&|c| c.head_dim = 3), &["head_dim is 3", "must divide hidden_size * expand"]);
    assert_says(&mamba(&|c| c.n_groups = 3), &["n_groups is 3", "must divide the number of heads"]);
    assert_says(&mamba(&|c| c.state_size = 0), &["state_size is 0"]);
    assert_says(&mamba(&|c| c.expand = f64::NAN), &["expand is NaN"]);
    assert_says(&mamba(&|c| c.dt_limit = [1., 0.5]), &["dt_limit is [1, 0.5]"]);
    assert_says(&mamba(&|c| c.a_init_range = [0., 1.]), &["A_init_range is [0, 1]"]);
    let kda = KimiDeltaAttentionConfig { hidden_size: HIDDEN, lower_bound: Some(0.), ..Default::default() };
    assert_says(&message(KimiDeltaAttention::new(&kda, vb())), &["lower_bound is 0", "below 0"]);
    let hgrn2 = Hgrn2AttentionConfig { hidden_size: HIDDEN, expand_ratio: 9, ..Default::default() };
    assert_says(&message(Hgrn2Attention::new(&hgrn2, None, vb())), &["expand_ratio is 9", "hidden_size"]);
    let rwkv7 = Rwkv7AttentionConfig { hidden_size: HIDDEN, head_dim: 3, ..Default::default() };
    assert_says(&message(Rwkv7Attention::new(&rwkv7, vb())), &["head_dim is 3", "must divide hidden_size"]);
    let odd = MultiScaleRetentionConfig { hidden_size: 6, num_heads: 2, ..Default::default() };
    assert_says(&message(MultiScaleRetention::new(&odd, vb())), &["3 key channels", "even"]);
}

/// As activations of 16 bits beside weights of 32 are.
#[test]
fn layers_answer_in_the_dtype_of_their_input() -> Result<()> {
    let varmap = VarMap::new();
    let vb = |name: &str| fresh(&varmap).pp(name);
    let gla = GatedLinearAttentionConfig { hidden_size: HIDDEN, num_heads: 2, ..Default::default() };
    let kda =
        KimiDeltaAttentionConfig { hidden_size: HIDDEN, num_heads: 2, head_dim: 4, ..Default::default() };
    let linear = LinearAttentionConfig { hidden_size: HIDDEN, num_heads: 2, ..Default::default() };
    let retention = MultiScaleRetentionConfig { hidden_size: HIDDEN, num_heads: 2, ..Default::default() };
    let hedgehog = LinearAttentionConfig { feature_map: FeatureMapKind::Hedgehog, ..linear.clone() };
    let gla = GatedLinearAttention::new(&gla, vb("gla"))?;
    let kda = KimiDeltaAttention::new(&kda, vb("kda"))?;
    let linear = LinearAttention::new(&linear, vb("linear"))?;
    let hedgehog = LinearAttention::new(&hedgehog, vb("hedgehog"))?;
    let retention = MultiScaleRetention::new(&retention, vb("retention"))?;
    vary(&varmap)?;
    let layers: [(&str, Forward); 5] = [
        ("gla", &|xs, cache| gla.forward(xs, cache)),
        ("kda", &|xs, cache| kda.forward(xs, cache)),
        ("linear", &|xs, cache| linear.forward(xs, cache)),
        ("hedgehog", &|xs, cache| hedgehog.forward(xs, cache)),
        ("retention", &|xs, cache| retention.forward(xs, cache)),
    ];
    for dtype in [DType::F16, DType::BF16] {
        for (name, forward) in layers {
            let xs = pseudo_random(&[1, TOKENS, HIDDEN], 1)?.to_dtype(dtype)?;
            let ys = forward(&xs, None)?;
            assert_eq!(ys.dtype(), dtype, "{name}");
            assert_close(name, &ys, &forward(&xs.to_dtype(DType::F32)?, None)?, 0.05)?;
        }
    }
    Ok(())
}
