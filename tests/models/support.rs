//! What the tests share.

use candle_core::{DType, Device, Result, Tensor};
use candle_linear_attn::models::{Config, Model};
use candle_nn::{VarBuilder, VarMap};
use std::path::PathBuf;

pub const CPU: Device = Device::Cpu;

/// The checkpoints of the original implementation, with the logits it computed.
pub const GOLDEN: [&str; 19] = [
    "linear_attn",
    "linear_attn-elu",
    "gla",
    "gla-tied",
    "retnet",
    "hgrn2",
    "mamba2",
    "mamba2-hf",
    "delta_net",
    "gated_deltanet",
    "gated_deltanet-gva",
    "kda",
    "rwkv7",
    "qwen3_5",
    "qwen3_5-multimodal",
    "qwen3_next",
    "minimax",
    "olmo_hybrid",
    "kimi_linear",
];

pub fn golden_folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/models").join(name)
}

/// `||x - reference|| / ||reference||`
pub fn relative_error(x: &Tensor, reference: &Tensor) -> Result<f64> {
    let (x, reference) = (x.to_dtype(DType::F64)?, reference.to_dtype(DType::F64)?);
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok((norm(&(x - &reference)?)? / norm(&reference)?).sqrt())
}

/// Fails unless `x` is within `limit` of the reference; NaN is not.
pub fn assert_close(what: &str, x: &Tensor, reference: &Tensor, limit: f64) -> Result<()> {
    assert_eq!(x.dims(), reference.dims(), "{what}: shape");
    let error = relative_error(x, reference)?;
    assert!(error <= limit, "{what}: relative error {error:.3e}, at most {limit:.1e} is allowed");
    Ok(())
}

/// A small model with the given fields besides the sizes. Its parameters are large enough that every part of it shows
/// in the logits, which those of a fresh model are not.
pub fn small_model(fields: &str) -> Result<(Model, VarMap)> {
    let config = small_config(fields)?;
    let varmap = VarMap::new();
    Model::new(&config, VarBuilder::from_varmap(&varmap, DType::F32, &CPU))?;
    for (i, (_, var)) in sorted(&varmap).iter().enumerate() {
        let shift = if var.rank() == 1 { 1. } else { 0. };
        var.set(&(pseudo_random(var.dims(), i as u64)? * 0.4)?.affine(1., shift * 0.5)?)?;
    }
    let model = Model::new(&config, VarBuilder::from_varmap(&varmap, DType::F32, &CPU))?;
    Ok((model, varmap))
}

/// The fields that give a model of this type two heads, or as many as it takes, of a few channels.
pub fn small_heads(model_type: &str) -> String {
    let more = match model_type {
        "hgrn2" => r#", "expand_ratio": 8"#,
        "mamba2" => r#", "head_dim": 16, "state_size": 4"#,
        "gated_deltanet" | "kda" => r#", "head_dim": 6"#,
        "rwkv7" => r#", "head_dim": 8"#,
        "qwen3_5" | "qwen3_5_text" => QWEN,
        "qwen3_next" => QWEN_NEXT,
        "minimax" => MINIMAX,
        "olmo_hybrid" => OLMO,
        "kimi_linear" => KIMI,
        _ => "",
    };
    format!(r#""model_type": "{model_type}"{more}"#)
}

/// One block of each kind, heads of few channels, a part of which is rotated.
pub const QWEN: &str = r#", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"]"#;

/// The same, and few experts, all of which get tokens.
pub const QWEN_NEXT: &str = r#", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"], "num_experts": 3, "num_experts_per_tok": 2,
    "moe_intermediate_size": 10, "shared_expert_intermediate_size": 6"#;

pub const MINIMAX: &str =
    r#", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3"#;

pub const OLMO: &str = r#", "num_attention_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 9"#;

pub const KIMI: &str = r#", "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 7,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5, "linear_num_heads": 2, "linear_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"], "num_experts": 3, "num_experts_per_token": 2,
    "moe_intermediate_size": 10"#;

pub fn small_config(fields: &str) -> Result<Config> {
    let sizes = r#""hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 11, "intermediate_size": 24"#;
    // A key that comes twice has its last value.
    let mut config = format!("{{{sizes}, {fields}}}");
    if config.contains(r#""qwen3_5""#) {
        config = format!(r#"{{"model_type": "qwen3_5", "text_config": {config}}}"#);
    }
    Config::from_json_str(&config)
}

/// Whether a parameter takes part in choices alone, so that its gradient is 0: its authors set it by other means.
pub fn only_chooses(parameter: &str) -> bool {
    parameter.ends_with("e_score_correction_bias")
}

/// The parameters by name.
pub fn sorted(varmap: &VarMap) -> Vec<(String, candle_core::Var)> {
    let data = varmap.data().lock().unwrap();
    let mut vars: Vec<_> = data.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    vars
}

/// About uniform in [-1, 1], the same every time: Candle's generator cannot be seeded on a CPU.
pub fn pseudo_random(dims: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.
    };
    Tensor::from_vec((0..dims.iter().product()).map(|_| next()).collect(), dims, &CPU)
}

/// Token ids below `vocab`, `[batch, tokens]`.
pub fn pseudo_tokens(batch: usize, tokens: usize, vocab: u32) -> Result<Tensor> {
    let ids = (0..batch * tokens).map(|i| (i as u32 * 7 + i as u32 / 5) % vocab).collect();
    Tensor::from_vec::<_, u32>(ids, (batch, tokens), &CPU)
}

/// The message of an error, which there must be.
pub fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("this must fail"),
        Err(error) => error.to_string(),
    }
}

/// Fails unless the message holds every part.
pub fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{message}\" does not say \"{part}\"");
    }
}
