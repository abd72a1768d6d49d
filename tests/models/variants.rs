//! Every configuration that the model types promise, against the reference: logits, gradients, caches.

use crate::reference;
use crate::support::*;
use candle_core::{D, DType, Result, Tensor};
use candle_linear_attn::Mode;
use candle_linear_attn::models::Model;
use candle_nn::VarMap;
use serde_json::Value;

const TOKENS: usize = 9;

/// Fields besides the sizes of a small model.
const VARIANTS: &[&str] = &[
    r#""model_type": "linear_attn""#,
    r#""model_type": "linear_attn", "tie_feature_map_qk": true, "tie_word_embeddings": true"#,
    r#""model_type": "linear_attn", "feature_map": "hedgehog", "norm_feature_map": true"#,
    r#""model_type": "linear_attn", "feature_map": "hedgehog", "tie_feature_map_qk": true, "num_kv_heads": 1"#,
    r#""model_type": "linear_attn", "feature_map": "t2r", "norm_q": true, "norm_k": true"#,
    r#""model_type": "linear_attn", "feature_map": "t2r", "tie_feature_map_qk": true, "fuse_norm": false"#,
    r#""model_type": "linear_attn", "feature_map": "dpfp", "expand_k": 0.5, "expand_v": 1.5"#,
    // Heads of 512 mapped channels.
    r#""model_type": "linear_attn", "feature_map": "dpfp", "hidden_size": 64, "num_heads": 1, "num_hidden_layers": 1"#,
    r#""model_type": "linear_attn", "feature_map": "elu", "norm_feature_map": true, "norm_q": true, "num_heads": 4, "num_kv_heads": 2"#,
    r#""model_type": "linear_attn", "feature_map": "relu", "elementwise_affine": false"#,
    r#""model_type": "linear_attn", "feature_map": "identity", "hidden_act": "powlu", "intermediate_size": null"#,
    r#""model_type": "gla""#,
    r#""model_type": "gla", "use_short_conv": true"#,
    r#""model_type": "gla", "use_short_conv": true, "conv_size": 1, "use_output_gate": false"#,
    r#""model_type": "gla", "num_heads": 4, "num_kv_heads": 2, "use_short_conv": true, "conv_size": 3"#,
    r#""model_type": "gla", "num_heads": 4, "num_kv_heads": 1, "fuse_norm": false, "norm_eps": 0.01"#,
    r#""model_type": "gla", "feature_map": "relu", "clamp_min": -0.03, "expand_k": 1, "expand_v": 2"#,
    r#""model_type": "gla", "feature_map": "gelu", "elementwise_affine": null, "tie_word_embeddings": true"#,
    r#""model_type": "gla", "feature_map": "sqrelu", "hidden_act": "silu""#,
    r#""model_type": "gla", "feature_map": "sigmoid", "hidden_ratio": null, "intermediate_size": null"#,
    r#""model_type": "gla", "feature_map": "logsigmoid", "num_hidden_layers": 1"#,
    r#""model_type": "gla", "feature_map": "swish", "num_heads": 1"#,
    r#""model_type": "retnet""#,
    r#""model_type": "retnet", "num_heads": 4, "num_kv_heads": 2, "tie_word_embeddings": true"#,
    r#""model_type": "retnet", "use_output_gate": false, "expand_k": 0.5, "expand_v": 1"#,
    r#""model_type": "retnet", "fuse_norm": false, "elementwise_affine": false"#,
    r#""model_type": "retnet", "hidden_act": "silu", "feature_map": "gelu""#,
    r#""model_type": "retnet", "feature_map": "relu2", "intermediate_size": null"#,
    r#""model_type": "retnet", "feature_map": "mish", "use_short_conv": true"#,
    r#""model_type": "retnet", "feature_map": "quick_gelu", "num_kv_heads": 1"#,
    r#""model_type": "retnet", "feature_map": "tanh""#,
    r#""model_type": "hgrn2", "expand_ratio": 8"#,
    r#""model_type": "hgrn2", "expand_ratio": 4, "num_hidden_layers": 3, "use_short_conv": true, "norm_eps": 0.1"#,
    r#""model_type": "hgrn2", "expand_ratio": null, "use_short_conv": true, "conv_size": 2, "use_lower_bound": false"#,
    r#""model_type": "hgrn2", "expand_ratio": 5, "num_heads": null, "use_lower_bound": false, "hidden_size": 15"#,
    r#""model_type": "hgrn2", "expand_ratio": 7, "use_lower_bound": false, "elementwise_affine": false"#,
    r#""model_type": "mamba2", "head_dim": 16, "state_size": 5"#,
    r#""model_type": "mamba2", "head_dim": 4, "state_size": 3, "n_groups": 2, "num_heads": 8, "conv_kernel": 2"#,
    r#""model_type": "mamba2", "head_dim": 8, "state_size": 3, "n_groups": 2, "num_heads": null, "norm_before_gate": true"#,
    r#""model_type": "mamba2", "head_dim": 16, "state_size": 4, "norm_before_gate": true, "D_has_hdim": true"#,
    r#""model_type": "mamba2", "head_dim": 16, "state_size": 4, "rmsnorm": false, "use_bias": true, "use_conv_bias": false"#,
    r#""model_type": "mamba2", "head_dim": 8, "expand": 1, "state_size": 4, "rmsnorm": false, "hidden_act": "gelu""#,
    r#""model_type": "mamba2", "head_dim": 16, "state_size": 4, "hidden_act": "relu", "tie_word_embeddings": true"#,
    r#""model_type": "mamba2", "head_dim": 16, "state_size": 4, "dt_limit": [0.9, 1.1], "residual_in_fp32": false"#,
    r#""model_type": "mamba2", "head_dim": 8, "num_heads": 4, "state_size": 3, "n_groups": 2, "layer_norm_epsilon": 0.01, "time_step_limit": [0.9, 1.2]"#,
    r#""model_type": "mamba2", "head_dim": 8, "num_heads": 4, "state_size": 3, "n_groups": 4, "time_step_min": 0.01, "hidden_act": "tanh""#,
    r#""model_type": "delta_net""#,
    r#""model_type": "delta_net", "allow_neg_eigval": true, "use_gate": true, "expand_k": 0.5, "expand_v": 1.5"#,
    r#""model_type": "delta_net", "use_beta": false, "qk_norm": "sum", "qk_activation": "elu", "conv_size": 3"#,
    r#""model_type": "delta_net", "use_short_conv": false, "qk_activation": "relu", "allow_neg_eigval": true"#,
    r#""model_type": "delta_net", "use_short_conv": false, "use_output_norm": false, "use_beta": false"#,
    r#""model_type": "delta_net", "qk_activation": "identity", "tie_word_embeddings": true, "hidden_act": "powlu""#,
    r#""model_type": "gated_deltanet", "head_dim": 6"#,
    r#""model_type": "gated_deltanet", "head_dim": 4, "num_v_heads": 6, "expand_v": 1.25, "allow_neg_eigval": true"#,
    r#""model_type": "gated_deltanet", "head_dim": 6, "use_gate": false, "use_short_conv": false"#,
    r#""model_type": "gated_deltanet", "head_dim": 6, "output_gate_activation": "sigmoid", "conv_size": 2"#,
    r#""model_type": "kda", "head_dim": 6"#,
    r#""model_type": "kda", "head_dim": 6, "safe_gate": true, "lower_bound": -5, "allow_neg_eigval": true"#,
    r#""model_type": "kda", "head_dim": 4, "num_v_heads": 4, "expand_v": 1.5, "lower_bound": -8.5"#,
    r#""model_type": "kda", "head_dim": 4, "use_short_conv": false, "num_heads": 1"#,
    r#""model_type": "rwkv7", "head_dim": 8"#,
    r#""model_type": "rwkv7", "head_dim": null, "num_heads": 4, "num_hidden_layers": 3, "decay_low_rank_dim": 3"#,
    r#""model_type": "rwkv7", "head_dim": 8, "value_dim": 32, "norm_first": false, "norm_bias": false, "fuse_norm": false"#,
    r#""model_type": "rwkv7", "head_dim": 16, "hidden_act": "gelu", "value_dim": [16, 16], "gate_low_rank_dim": 5"#,
    r#""model_type": "rwkv7", "head_dim": 8, "intermediate_size": null, "hidden_ratio": 3, "tie_word_embeddings": true"#,
];

/// Of the models that mix linear and softmax attention: the type, and fields that come after the sizes of a small one.
const HYBRIDS: &[(&str, &str)] = &[
    ("qwen3_5", ""),
    ("qwen3_5", r#", "tie_word_embeddings": true"#),
    (
        "qwen3_5_text",
        r#", "num_key_value_heads": 1, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 100}"#,
    ),
    (
        "qwen3_5_text",
        r#", "num_key_value_heads": 4, "head_dim": null, "attention_bias": true, "partial_rotary_factor": 1.0"#,
    ),
    (
        "qwen3_5_text",
        r#", "hidden_act": "gelu", "layer_types": null, "full_attention_interval": 2, "rms_norm_eps": 0.01"#,
    ),
    (
        "qwen3_5_text",
        r#", "rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 50}, "linear_conv_kernel_dim": 3"#,
    ),
    ("qwen3_next", ""),
    ("qwen3_next", r#", "norm_topk_prob": false, "tie_word_embeddings": true, "linear_num_value_heads": 2"#),
    ("qwen3_next", r#", "num_experts": 0, "linear_value_head_dim": 4"#),
    ("qwen3_next", r#", "decoder_sparse_step": 2"#),
    ("qwen3_next", r#", "mlp_only_layers": [1], "num_experts_per_tok": 3, "hidden_act": "relu2""#),
    ("minimax", ""),
    (
        "minimax",
        r#", "head_dim": null, "num_key_value_heads": null, "hidden_act": "gelu_new", "rope_theta": 50"#,
    ),
    (
        "minimax",
        r#", "full_attn_alpha_factor": 1.5, "full_attn_beta_factor": 0.7, "linear_attn_alpha_factor": 0.8, "linear_attn_beta_factor": 2, "mlp_alpha_factor": 0.9, "mlp_beta_factor": 1.3"#,
    ),
    (
        "minimax",
        r#", "layer_types": ["linear_attention", "linear_attention"], "num_attention_heads": 3, "num_key_value_heads": 1"#,
    ),
    ("olmo_hybrid", ""),
    (
        "olmo_hybrid",
        r#", "rope_parameters": {"rope_theta": null}, "linear_allow_neg_eigval": false, "num_key_value_heads": 1"#,
    ),
    (
        "olmo_hybrid",
        r#", "linear_key_head_dim": null, "linear_value_head_dim": null, "attention_bias": true, "layer_types": ["full_attention", "linear_attention"]"#,
    ),
    ("kimi_linear", ""),
    (
        "kimi_linear",
        r#", "q_lora_rank": 5, "attention_bias": true, "moe_renormalize": false, "num_shared_experts": 2"#,
    ),
    (
        "kimi_linear",
        r#", "num_experts": 6, "num_experts_per_token": 3, "num_expert_group": 3, "topk_group": 2, "routed_scaling_factor": 1, "num_shared_experts": 0"#,
    ),
    (
        "kimi_linear",
        r#", "moe_router_activation_func": "softmax", "first_k_dense_replace": 0, "layer_types": null, "linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2], "num_heads": 3, "head_dim": 4, "short_conv_kernel_size": 2}"#,
    ),
    ("kimi_linear", r#", "num_experts": 0, "num_key_value_heads": null, "tie_word_embeddings": true"#),
];

/// The fields of all of them.
fn variants() -> Vec<String> {
    let hybrid = |(model_type, more): &(&str, &str)| format!("{}{more}", small_heads(model_type));
    VARIANTS.iter().map(|fields| fields.to_string()).chain(HYBRIDS.iter().map(hybrid)).collect()
}

/// A variant with its tokens and everything the reference needs.
struct Case {
    model: Model,
    varmap: VarMap,
    config: Value,
    ids: Tensor,
}

impl Case {
    fn new(fields: &str) -> Result<Self> {
        let (model, varmap) = small_model(fields)?;
        let config = serde_json::from_str(&model.config().to_json()).expect("to_json is JSON");
        Ok(Self { model, varmap, config, ids: pseudo_tokens(1, TOKENS, 11)? })
    }

    fn params(&self) -> Result<reference::Params> {
        let vars = sorted(&self.varmap);
        reference::params(vars.iter().map(|(name, var)| (name.clone(), var.as_tensor())))
    }

    fn reference(&self, params: &reference::Params) -> Result<Tensor> {
        let ids = self.ids.flatten_all()?.to_vec1::<u32>()?;
        let logits = reference::model(&self.config, params, &ids);
        Tensor::new(logits, &CPU)?.unsqueeze(0)
    }
}

#[test]
fn logits_are_those_of_the_definition() -> Result<()> {
    for fields in &variants() {
        let mut case = Case::new(fields)?;
        let expected = case.reference(&case.params()?)?;
        for mode in [Mode::Auto, Mode::Recurrent, Mode::Chunk, Mode::FusedChunk] {
            case.model.set_mode(mode);
            assert_close(
                &format!("{fields} {mode:?}"),
                &case.model.forward(&case.ids, None)?,
                &expected,
                2e-5,
            )?;
        }
    }
    Ok(())
}

/// Every parameter gets a gradient, and it is the central difference of the reference.
#[test]
fn every_parameter_gets_its_gradient() -> Result<()> {
    for fields in &variants() {
        let case = Case::new(fields)?;
        let logits = case.model.forward(&case.ids, None)?;
        let weights = pseudo_random(logits.dims(), 77)?;
        let gradients = (&logits * &weights)?.sum_all()?.backward()?;
        let loss = |params: &reference::Params| -> Result<f64> {
            (case.reference(params)? * weights.to_dtype(DType::F64)?)?.sum_all()?.to_scalar::<f64>()
        };
        let mut params = case.params()?;
        for (name, var) in sorted(&case.varmap) {
            let Some(gradient) = gradients.get(&var) else { panic!("{fields}: {name} has no gradient") };
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            let (mut error, mut size) = (0., 0.);
            for at in (0..4).map(|i| (i * 37 + 5) % gradient.len()) {
                let expected = reference::central_difference(&mut params, &name, at, &loss)?;
                error += (gradient[at] as f64 - expected).powi(2);
                size += expected.powi(2);
            }
            // As many numbers of the parameter are, on the whole, so large.
            let whole: f64 = gradient.iter().map(|g| f64::from(*g).powi(2)).sum();
            let usual = whole * 4. / gradient.len() as f64;
            // The floor is for parameters whose gradient is small beside the others', and its rounding is not.
            let relative = error.sqrt() / size.max(usual).sqrt().max(1e-3);
            // Layer norms of layer norms, and the square of ReLU between them, leave f32 fewer digits.
            let limit = if fields.contains("rwkv7") { 3e-4 } else { 1e-4 };
            assert!(relative < limit, "{fields}: gradient of {name}: relative error {relative:.2e}");
        }
    }
    Ok(())
}

#[test]
fn any_split_of_the_sequence_gives_the_same_logits() -> Result<()> {
    for fields in &variants() {
        let case = Case::new(fields)?;
        let ids = pseudo_tokens(2, TOKENS, 11)?;
        let whole = case.model.forward(&ids, None)?;
        for pieces in [&[1, 8][..], &[2, 7], &[5, 4], &[8, 1], &[3, 0, 2, 1, 3], &[1; TOKENS]] {
            let mut cache = case.model.new_cache();
            let mut logits = Vec::new();
            for piece in pieces.iter().filter(|piece| **piece > 0) {
                let ids = ids.narrow(1, cache.tokens(), *piece)?;
                logits.push(case.model.forward(&ids, Some(&mut cache))?);
            }
            assert_close(&format!("{fields} {pieces:?}"), &Tensor::cat(&logits, 1)?, &whole, 3e-5)?;
        }
    }
    Ok(())
}

#[test]
fn later_tokens_do_not_reach_earlier_logits() -> Result<()> {
    for fields in &variants() {
        let case = Case::new(fields)?;
        let mut other = case.ids.flatten_all()?.to_vec1::<u32>()?;
        other[5..].iter_mut().for_each(|id| *id = (*id + 3) % 11);
        let other = Tensor::from_vec(other, (1, TOKENS), &CPU)?;
        let [a, b] = [&case.ids, &other].map(|ids| case.model.forward(ids, None));
        let [a, b] = [a?.narrow(1, 0, 5)?, b?.narrow(1, 0, 5)?];
        assert_close(fields, &a, &b, 1e-6)?;
    }
    Ok(())
}

#[test]
fn sixteen_bits_run_every_variant() -> Result<()> {
    for fields in &variants() {
        let case = Case::new(fields)?;
        let whole = case.model.forward(&case.ids, None)?;
        for (dtype, limit) in [(DType::F16, 2e-2), (DType::BF16, 1.5e-1)] {
            let tensors =
                sorted(&case.varmap).into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
            let vb = candle_nn::VarBuilder::from_tensors(tensors, dtype, &CPU);
            let model = Model::new(case.model.config(), vb)?;
            let mut cache = model.new_cache();
            let first = model.forward(&case.ids.narrow(1, 0, 6)?, Some(&mut cache))?;
            let rest = model.forward(&case.ids.narrow(1, 6, 3)?, Some(&mut cache))?;
            assert_eq!(first.dtype(), dtype);
            assert_close(&format!("{fields} {dtype:?}"), &Tensor::cat(&[first, rest], 1)?, &whole, limit)?;
        }
    }
    Ok(())
}

/// Sixteen-bit parameters can be trained as they are.
#[test]
fn sixteen_bit_parameters_get_gradients() -> Result<()> {
    for model_type in candle_linear_attn::models::SUPPORTED {
        let config = small_config(&small_heads(model_type))?;
        let varmap = VarMap::new();
        let model = Model::new(&config, candle_nn::VarBuilder::from_varmap(&varmap, DType::BF16, &CPU))?;
        let logits = model.forward(&pseudo_tokens(1, TOKENS, 11)?, None)?.to_dtype(DType::F32)?;
        let gradients = candle_nn::ops::log_softmax(&logits, D::Minus1)?.sum_all()?.backward()?;
        for (name, var) in sorted(&varmap) {
            let gradient =
                gradients.get(&var).unwrap_or_else(|| panic!("{model_type}: {name} has no gradient"));
            assert_eq!(gradient.dtype(), DType::BF16, "{model_type}: {name}");
        }
    }
    Ok(())
}

/// A parameter that has changed shows in the next forward: no layer works on a copy.
#[test]
fn updates_of_parameters_take_effect() -> Result<()> {
    for fields in [
        r#""model_type": "linear_attn", "feature_map": "hedgehog""#,
        r#""model_type": "gla", "use_short_conv": true"#,
    ] {
        let case = Case::new(fields)?;
        case.model.forward(&case.ids, None)?;
        for (_, var) in sorted(&case.varmap) {
            var.set(&(var.as_tensor() * 0.7)?)?;
        }
        let expected = case.reference(&case.params()?)?;
        assert_close(fields, &case.model.forward(&case.ids, None)?, &expected, 2e-5)?;
    }
    Ok(())
}
