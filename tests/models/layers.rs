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

/// Output, output in pieces, and that every parameter and the input have a gradient.
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
    for (name, var) in all {
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("{what}: {name} has no gradient"));
        let size = gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
        assert!(size.is_finite() && size > 0., "{what}: gradient of {name} is {size}");
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
    let odd = MultiScaleRetentionConfig { hidden_size: 6, num_heads: 2, ..Default::default() };
    assert_says(&message(MultiScaleRetention::new(&odd, vb())), &["3 key channels", "even"]);
}
