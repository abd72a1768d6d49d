//! Small models whose operators, convolutions and norms are the kernels, against the same models on the CPU.

use crate::on_kernels;
use crate::support::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_linear_attn::models::Model;
use candle_nn::{VarBuilder, VarMap};

const TYPES: [&str; 14] = [
    "linear_attn",
    "gla",
    "retnet",
    "hgrn2",
    "mamba2",
    "delta_net",
    "gated_deltanet",
    "kda",
    "rwkv7",
    "qwen3_5",
    "qwen3_next",
    "minimax",
    "olmo_hybrid",
    "kimi_linear",
];

/// The same parameters on another device.
fn moved(fields: &str, from: &VarMap, device: &Device) -> Result<(Model, VarMap)> {
    let config = small_config(fields)?;
    let varmap = VarMap::new();
    let build = || Model::new(&config, VarBuilder::from_varmap(&varmap, DType::F32, device));
    build()?;
    for ((name, to), (_, var)) in sorted(&varmap).into_iter().zip(sorted(from)) {
        assert_eq!(to.dims(), var.dims(), "{name}");
        to.set(&var.to_device(device)?)?;
    }
    // Once more, as some parameters are worked on when a model is made.
    Ok((build()?, varmap))
}

fn check(model_type: &str, more: &str) -> Result<()> {
    let fields = format!(r#"{}, "use_short_conv": true{more}"#, small_heads(model_type));
    let (model, varmap) = small_model(&fields)?;
    let ids = pseudo_tokens(2, 19, 11)?;
    let expected = model.forward(&ids, None)?;
    let cotangent = pseudo_random(expected.dims(), 3)?;
    let expected_grads = (&expected * &cotangent)?.sum_all()?.backward()?;
    on_kernels(|device| {
        let (model, moved_vars) = moved(&fields, &varmap, device)?;
        let ids = ids.to_device(device)?;
        let logits = model.forward(&ids, None)?;
        assert_close(model_type, &logits.to_device(&CPU)?, &expected, 1e-4)?;
        let grads = (logits * cotangent.to_device(device)?)?.sum_all()?.backward()?;
        for ((name, var), (_, moved)) in sorted(&varmap).into_iter().zip(sorted(&moved_vars)) {
            let (Some(want), Some(found)) = (expected_grads.get(&var), grads.get(&moved)) else {
                assert!(only_chooses(&name), "{model_type}: {name} has no gradient");
                continue;
            };
            if want.sqr()?.sum_all()?.to_scalar::<f32>()? > 1e-8 {
                assert_close(&format!("{model_type}: {name}"), &found.to_device(&CPU)?, want, 1e-3)?;
            }
        }
        let mut cache = model.new_cache();
        for (from, len) in [(0, 5), (5, 1), (6, 1), (7, 12)] {
            let logits = model.forward(&ids.narrow(1, from, len)?, Some(&mut cache))?.to_device(&CPU)?;
            let want = expected.narrow(1, from, len)?;
            assert_close(&format!("{model_type}, from token {from}"), &logits, &want, 1e-4)?;
        }
        Ok(())
    })
}

/// Without gradients, as checkpoints run: projections and convolutions are joined, sums are left to norms, and in bf16 softmax
/// attention has a kernel. The whole, then in steps, against f32 on the CPU.
fn check_frozen(model_type: &str, more: &str, dtype: DType, limit: f64) -> Result<()> {
    let fields = format!(r#"{}, "use_short_conv": true{more}"#, small_heads(model_type));
    let (_, varmap) = small_model(&fields)?;
    let config = small_config(&fields)?;
    let build = |dtype: DType, device: &Device| {
        let tensors = sorted(&varmap).into_iter().map(|(name, var)| {
            Ok((name, var.as_detached_tensor().to_dtype(DType::BF16)?.to_device(device)?.to_dtype(dtype)?))
        });
        Model::new(&config, VarBuilder::from_tensors(tensors.collect::<Result<_>>()?, dtype, device))
    };
    let ids = pseudo_tokens(2, 19, 11)?;
    let expected = build(DType::F32, &CPU)?.forward(&ids, None)?;
    on_kernels(|device| {
        let model = build(dtype, device)?;
        let ids = ids.to_device(device)?;
        let on_cpu = |x: Tensor| x.to_dtype(DType::F32)?.to_device(&CPU);
        assert_close(model_type, &on_cpu(model.forward(&ids, None)?)?, &expected, limit)?;
        // What many tokens leave few go on from, and the other way round.
        for pieces in [[(0, 5), (5, 1), (6, 1), (7, 12)], [(0, 12), (12, 1), (13, 1), (14, 5)]] {
            let mut cache = model.new_cache();
            for (from, len) in pieces {
                let logits = on_cpu(model.forward(&ids.narrow(1, from, len)?, Some(&mut cache))?)?;
                let want = expected.narrow(1, from, len)?;
                assert_close(&format!("{model_type}, from token {from}"), &logits, &want, limit)?;
            }
        }
        Ok(())
    })
}

#[test]
fn models_in_bf16_agree_with_f32() {
    // An expert chosen otherwise, by a rounding, is another result.
    for model_type in
        TYPES.into_iter().filter(|name| !["qwen3_next", "minimax", "kimi_linear"].contains(name))
    {
        check_frozen(model_type, "", DType::BF16, 0.1).unwrap_or_else(|e| panic!("{model_type}: {e}"));
    }
}

#[test]
fn models_without_gradients_agree_with_the_cpu() {
    for model_type in TYPES {
        check_frozen(model_type, "", DType::F32, 1e-4).unwrap_or_else(|e| panic!("{model_type}: {e}"));
    }
    // Nothing is projected besides q, k and v, whose outputs are no multiple of 8.
    check_frozen("delta_net", r#", "use_beta": false, "expand_k": 0.25, "expand_v": 0.25"#, DType::F32, 1e-4)
        .unwrap();
}

#[test]
fn models_agree_with_the_cpu() {
    for model_type in TYPES {
        check(model_type, "").unwrap_or_else(|e| panic!("{model_type}: {e}"));
    }
    // Heads of one width are split another way.
    check("qwen3_5", r#", "linear_value_head_dim": 4"#).unwrap();
}

/// All gradients in one tensor, of a model that computes in `dtype` with parameters in f32.
fn gradient(fields: &str, varmap: &VarMap, dtype: DType, device: &Device) -> Result<Tensor> {
    let model = Model::new(&small_config(fields)?, VarBuilder::from_varmap(varmap, dtype, device))?;
    let logits = model.forward(&pseudo_tokens(2, 19, 11)?.to_device(device)?, None)?;
    assert_eq!(logits.dtype(), dtype);
    let cotangent = pseudo_random(logits.dims(), 3)?.to_device(device)?;
    let grads = (logits.to_dtype(DType::F32)? * cotangent)?.sum_all()?.backward()?;
    let flat = |(name, var): (String, Var)| match grads.get(&var) {
        Some(grad) => {
            assert_eq!(grad.dtype(), DType::F32, "{name}");
            grad.flatten_all()?.to_device(&CPU)
        }
        None => candle_core::bail!("{name} has no gradient"),
    };
    Tensor::cat(&sorted(varmap).into_iter().map(flat).collect::<Result<Vec<_>>>()?, 0)
}

/// How much rounding matters to a gradient depends on the model. It is measured: what rounding each parameter once does.
#[test]
fn gradients_in_bf16_are_those_in_f32_on_the_cpu_but_for_rounding() -> Result<()> {
    for model_type in TYPES {
        let fields = format!(r#"{}, "use_short_conv": true"#, small_heads(model_type));
        let (_, varmap) = small_model(&fields)?;
        for (_, var) in sorted(&varmap) {
            var.set(&(var.as_detached_tensor() * 0.5)?)?;
        }
        let expected = gradient(&fields, &varmap, DType::F32, &CPU)?;
        let (_, rounded) = moved(&fields, &varmap, &CPU)?;
        for (_, var) in sorted(&rounded) {
            var.set(&var.as_detached_tensor().to_dtype(DType::BF16)?.to_dtype(DType::F32)?)?;
        }
        let rounded = gradient(&fields, &rounded, DType::F32, &CPU)?;
        let limit = 0.02 + 3. * relative_error(&rounded, &expected)?;
        assert!(limit < 0.5, "{model_type}: {limit}");
        on_kernels(|device| {
            let (_, moved_vars) = moved(&fields, &varmap, device)?;
            let found = gradient(&fields, &moved_vars, DType::BF16, device)?;
            assert_close(model_type, &found, &expected, limit)
        })?;
    }
    Ok(())
}
